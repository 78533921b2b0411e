"""The options of a multiple choice: which of them a benchmark's answer means."""

import json
import re
from collections.abc import Sequence
from typing import Any

from fastvid.files import shown

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LABEL = re.compile(r"\(?([A-Z])[.):]\s+")  # "A. apples", "(A) apples"


def without_labels(options: tuple[str, ...]) -> tuple[str, ...]:
    """Options without their letters, where all are written with these: "A. apples", "B. pears"."""
    if all((found := _LABEL.match(option)) and found[1] == letter for option, letter in zip(options, LETTERS)):
        return tuple(_LABEL.sub("", option, count=1) for option in options)
    return options


def right_option(options: Sequence[Any], answer: Any, where: str) -> int:
    """The number of the option that an answer means: by its text, its letter, or its number.

    Args:
        options: texts or numbers.
        where: they stand, for messages.

    Raises:
        ValueError: it means none, or may mean two.
    """
    if answer in options and type(answer) in (int, float) and answer != options.index(answer):
        if isinstance(answer, float) or not 0 <= answer < len(options):
            return options.index(answer)
        raise ValueError(
            f'{where}: "answer" is {answer}, which is an option and the number (from 0) of another; write the options '
            "and the answer as texts"
        )
    options = tuple(map(str, options))
    if isinstance(answer, str) and answer in options:
        if answer in LETTERS[: len(options)] and len(answer) == 1 and LETTERS.index(answer) != options.index(answer):
            raise ValueError(
                f'{where}: "answer" is {json.dumps(answer)}, which is an option and the letter of another; give the '
                "option's number from 0"
            )
        return options.index(answer)
    if isinstance(answer, str) and len(answer) == 1 and answer in LETTERS[: len(options)]:
        return LETTERS.index(answer)
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(options):
        return answer
    raise ValueError(
        f'{where}: "answer" is {shown(json.dumps(answer, ensure_ascii=False))}, which is none of the options; give an '
        "option's text, its letter, or its number from 0"
    )
