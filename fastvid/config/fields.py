"""Fields of the configurations: a flag's help, range and group, declared where the flag is."""

import dataclasses
import math
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

LARGEST = 2**31 - 1  # of whole numbers, where a flag states nothing else: positions and row counts are int32


def flag(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field.

    Args:
        help: its ``--help`` text.
        metadata: "at_least", "above", "at_most" and "below" are a number's range (of a list, each number's); "group"
            begins a group of ``--help``; "was" is an older name, which is taken too; "writes" says that a "file", a
            "folder" or a "file or folder" is made there; "whole_from" is the number from which on only whole ones mean
            something; "check" is called with a text, and raises ValueError if it means nothing.
    """
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def steps(default: float, help: str, **metadata: Any) -> Any:
    """A field that counts steps: below 1, and above 0, it is a share of all steps."""
    return flag(default, help + "; below 1: a share of all steps.", whole_from=1, **metadata)


def range_fault(value: object, metadata: Mapping[str, Any]) -> str | None:
    """The range of a number, in words, if `value` lies outside of it.

    Whole numbers are at most `LARGEST` where nothing else is stated, and no number is nan or infinite.
    """
    low, above = metadata.get("at_least"), metadata.get("above")
    high, below = metadata.get("at_most"), metadata.get("below")
    if high is None and below is None and isinstance(value, int):
        high = LARGEST
    whole = metadata.get("whole_from", math.inf)
    if (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and math.isfinite(value)
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
        and (value < whole or value == int(value))
    ):
        return None
    lower = f"{low:g} or more" if low is not None else f"more than {above:g}" if above is not None else "a number"
    upper = (
        ""
        if high is None and below is None
        else (f", at most {high:,}" if high is not None else f", less than {below:g}")
    )
    share = f"; {whole} and more are whole numbers" if whole < math.inf else ""
    return lower + upper + share


@dataclass(frozen=True)
class Checked:
    """Values are checked by the ranges and checks that their flags state, however the configuration is made."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            numbers = value if isinstance(value, list | tuple) else [value]
            for number in numbers if has_range(each) and value is not None and value not in words_of(each.type) else ():
                if fault := range_fault(number, each.metadata):
                    raise ValueError(f"--{each.name} {number}: give {fault}")
            if "check" in each.metadata and value is not None:
                each.metadata["check"](value)


def flag_of(field: dataclasses.Field) -> str:
    """The name of a field's flag, without hyphens. Fields that Python's own words would name end in "_"."""
    return field.name.removesuffix("_")


def words_of(kind: Any) -> list[str]:
    """The words that a field of some type takes beside numbers."""
    return [
        word for part in typing.get_args(kind) if typing.get_origin(part) is Literal for word in typing.get_args(part)
    ]


def older_names(config_class: "type[DataclassInstance]") -> dict[str, str]:
    """{older name: name} of the flags of one of these dataclasses that had another."""
    return {flag.metadata["was"]: flag.name for flag in dataclasses.fields(config_class) if "was" in flag.metadata}


def has_range(flag: dataclasses.Field) -> bool:
    """Whether a field of these dataclasses is a number, or a list of numbers, whose range is checked."""
    return any(name in flag.metadata for name in ("at_least", "above", "at_most", "below"))
