"""The parser of every command: a command line and a YAML file to one of `fastvid.config`'s dataclasses.

It reads flags as ``transformers.HfArgumentParser`` does, which takes seconds to import: ``--flag``, ``--flag True``,
``--flag=value``, dashes for underscores, lists of several values. ``--config run.yaml`` supplies defaults that the
command line overrides. All mistakes of a command line are told at once.
"""

import dataclasses
import difflib
import functools
import logging
import operator
import os
import re
import shutil
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fastvid import config
from fastvid.config.fields import words_of
from fastvid.files import shown
from fastvid.flags.foreign import MEANING, SYNONYMS, VALUES

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger("fastvid")

Config = TypeVar("Config", bound="DataclassInstance")  # a dataclass of `fastvid.config`

_UNIONS = (typing.Union, types.UnionType)
_TRUTH = {
    "yes": True,
    "true": True,
    "t": True,
    "y": True,
    "1": True,
    "no": False,
    "false": False,
    "f": False,
    "n": False,
    "0": False,
}
_PLACES = {  # flags of which an empty text would mean the folder that a command is started in
    "allowed_folder",
    "annotations",
    "checkpoint",
    "clip_feat_path",
    "clip_feature_path",
    "compare",
    "data_path",
    "drop",
    "eval_data_path",
    "html",
    "input_json_file",
    "json",
    "model_name_or_path",
    "output",
    "output_dir",
    "output_json_file",
    "path",
    "pretrain_mm_mlp_adapter",
    "projector",
    "questions_file",
    "video",
    "video_2",
    "video_dir_path",
    "video_folder",
    "video_folder_2",
    "vision_tower",
    "vision_tower_2",
}
_ALSO_PATHS = {"adapter", "eval_video_folder", "lora_weights", "media_root"}  # an empty text of these means none
_NO_JSON = (".csv", ".gz", ".parquet", ".tsv", ".xlsx", ".yaml", ".yml", ".zip")  # what nothing writes
_NEAR = 0.85  # of difflib's ratio: a letter or two are wrong
_LIKE_A_FLAG = re.compile(r"[-\u2010-\u2015\u2212]+[A-Za-z_]")  # one hyphen, or a word processor's dash
_IS_FLAG = re.compile(r"--[A-Za-z_]\S*", flags=re.DOTALL)


def parse(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Fill `config_class` from the command line, with ``--config file.yaml`` underneath.

    Args:
        config_class: a dataclass of `fastvid.config`.
        argv: arguments without the program's name; None reads ``sys.argv``.

    Raises:
        SystemExit: code 2 and one line that names every flag that cannot be used, with its remedy; code 0 after
            ``--help``.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if {"-h", "--help"} & set(argv):
        print(help_text(config_class))
        raise SystemExit(0)
    try:
        filled = _filled(config_class, argv)
        _check_places(filled)
        if isinstance(filled, config.InspectConfig):
            _check_inspection(filled)
        return filled
    except ValueError as error:
        print(f"fastvid {_command(config_class)}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from error


def config_of(command: str) -> type:
    """The dataclass of a command's flags."""
    return getattr(config, f"{command.capitalize()}Config")


def _filled(config_class: type[Config], argv: list[str]) -> Config:
    fields = {config.flag_of(field): field for field in dataclasses.fields(config_class)}
    foreign = MEANING if issubclass(config_class, config.DataConfig) else {}
    given, stray = _split(argv)
    faults = [f"unexpected argument {shown(word)}" for word in stray]
    below = _read_settings(given.pop("config")) if "config" in given else {}
    below, given = (_by_newer_names(flags, config.older_names(config_class), faults) for flags in (below, given))
    values, accepted = {}, []
    for name, (spelled, times) in (below | given).items():
        where = " in the --config file" * (name in below and name not in given)
        if name in fields:
            try:
                values[name] = _value(fields[name].type, _our_values(name, times))
                if name in _PLACES | _ALSO_PATHS:
                    value = values[name]
                    values[name] = [*map(_at_home, value)] if isinstance(value, list) else _at_home(value)
                if name in _PLACES and "" in (values[name] if isinstance(values[name], list) else [values[name]]):
                    raise ValueError("is empty, as of a variable that is not set; give a path, or leave the flag out")
            except ValueError as error:
                faults.append(f"{spelled}{where}: {error}")
        elif name not in foreign:
            faults.append(f"unknown flag {spelled}{where}{_hint(name, fields)}")
        elif foreign[name].refuses(times[-1]):
            value = "".join(f" {shown(word)}" for word in times[-1])
            faults.append(f"{spelled}{value}{where}: {foreign[name].remedy}")
        else:
            accepted.append(spelled + (f" ({foreign[name].note})" if foreign[name].note else ""))
    missing = [
        f"--{name}"
        for name, field in fields.items()
        if _required(field) and name not in values and not any(f"--{name}" in fault for fault in faults)
    ]
    if missing:
        faults.append(f"give {' and '.join(missing)}")
    if faults:
        raise ValueError("; ".join(faults))
    filled = config_class(**{fields[name].name: value for name, value in values.items()})
    if accepted and os.environ.get("RANK", "0") == "0":
        log.info("accepted, and change nothing here: %s", ", ".join(accepted))
    return filled


def _by_newer_names(given, older, faults):
    """What `_split` gives, older names of flags replaced by their newer ones."""
    for name in older.keys() & given.keys():
        spelled, newer = given[name][0], older[name]
        if newer in given:
            faults.append(f"{spelled} is the older name of --{newer}, which is given too")
        elif os.environ.get("RANK", "0") == "0":
            log.info("%s is called --%s now", spelled, newer)
    return {older.get(name, name): words for name, words in given.items()}


def _split(argv):
    """({flag's name: (flag as written, for each time that it was given the words after it)}, words before any flag)."""
    given, stray, last = {}, [], None
    for word in argv:
        if _IS_FLAG.match(word):
            spelled, sign, value = word.partition("=")
            last = spelled[2:].replace("-", "_")
            given.setdefault(last, (spelled, []))[1].append([value] if sign else [])
        elif last is None:
            stray.append(word)
        else:
            given[last][1][-1].append(word)
    return given, stray


def _read_settings(given):
    """The YAML file behind ``--config``, as `_split` gives flags."""
    import yaml

    path = _at_home(" ".join(given[1][-1]))
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.safe_load(file) or {}
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--config {shown(path)} is no YAML file of flags that can be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(settings, dict):
        raise ValueError(f"--config {shown(path)}: expected `flag: value` lines, found {type(settings).__name__}")
    return {
        str(name).replace("-", "_"): (
            f"--{name}",
            [[str(word) for word in (value if isinstance(value, list) and value else [value])]],
        )
        for name, value in settings.items()
        if value is not None and (value != [] or name in VALUES)
    }


def _at_home(path):
    """A path with the home folder for its ``~``, which shells leave in ``--flag=~/x``, and YAML everywhere."""
    return os.path.expanduser(path) if isinstance(path, str) and (path == "~" or path.startswith("~/")) else path


def _our_values(name, times):
    """The words after a flag, those of other trainers in fastvid's."""
    ours = VALUES.get(name, {})
    return [[ours.get(word, word) for word in words] for words in times]


def _value(kind, times):
    """The value of a flag.

    Args:
        kind: type of the dataclass's field.
        times: for each time that it was given, the words after it.
    """
    kind, optional = _without_none(kind)
    if typing.get_origin(kind) is list:
        words = [word for words in times for word in words]
        if not words:
            raise ValueError("give one value or more")
        return [_converted(typing.get_args(kind)[0], word) for word in words]
    words = times[-1]
    if not words and kind is bool:
        return True
    if len(words) != 1:
        hint = "; a flag begins with two hyphens (--)" * any(map(_LIKE_A_FLAG.match, words))
        raise ValueError(
            "give a value"
            if not words
            else f"takes one value; unexpected argument {', '.join(shown(word) for word in words[1:])}{hint}"
        )
    if optional and kind is not str and words[0].lower() in ("none", "null"):
        return None
    return _converted(kind, words[0])


def _converted(kind, word):
    if typing.get_origin(kind) in _UNIONS and word in words_of(kind):
        return word
    if typing.get_origin(kind) is typing.Literal:
        if word not in typing.get_args(kind):
            raise ValueError(f"{shown(word)} is none of {', '.join(typing.get_args(kind))}")
        return word
    if kind is str:
        return word
    if kind is bool:
        if word.lower() not in _TRUTH:
            raise ValueError(f"{shown(word)} is neither True nor False")
        return _TRUTH[word.lower()]
    numbers = [part for part in (int, float) if part is kind or part in typing.get_args(kind)]
    for number in numbers:
        try:
            return number(word)
        except ValueError:
            continue
    others = "".join(f", and not {other}" for other in words_of(kind))
    raise ValueError(f"{shown(word) or 'an empty text'} is no {'whole ' * (float not in numbers)}number{others}")


def _without_none(kind):
    """(The type without None, whether None was one of it)."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in _UNIONS else (kind,)
    rest = tuple(part for part in parts if part is not type(None))
    return (rest[0] if len(rest) == 1 else functools.reduce(operator.or_, rest)), len(rest) < len(parts)


def _required(field):
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _hint(name, fields):
    """What an unknown flag may have meant: another word for a flag of this command, or one with a letter wrong."""
    near = [flag for flag in SYNONYMS.get(name, ()) if flag in fields]
    near = near or difflib.get_close_matches(name, fields, n=1, cutoff=_NEAR)
    return f", did you mean --{near[0]}?" if near else ", see --help"


def _check_places(filled):
    """Look at the paths that a command will write to, before it has done its work."""
    for field in dataclasses.fields(filled):
        kind, value = field.metadata.get("writes"), getattr(filled, field.name)
        if kind is None or not value:
            continue
        if "://" in value:
            raise ValueError(f"--{field.name} {shown(value)} is a URL; name a place on this machine")
        if value == "-" and kind == "file":
            raise ValueError(f"--{field.name} -: give /dev/stdout to write there, or ./- for a file of that name")
        path = Path(value)
        if kind == "file" and path.is_dir():
            raise ValueError(f"--{field.name} {shown(path)} is a folder; name a file in it")
        if kind == "file" and field.name != "html" and path.suffix.lower() in _NO_JSON:
            raise ValueError(f"--{field.name} {shown(path)} would hold JSON; give a name that ends in .json or .jsonl")
        for folder in ([path] if kind == "folder" else []) + list(path.parents):
            if folder.is_symlink() and not folder.exists():
                raise ValueError(
                    f"--{field.name} {shown(path)}: {shown(folder)} is a link that leads nowhere; make the folder that "
                    "it leads to, or name another"
                )
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"--{field.name} {shown(path)}: {shown(folder)} is a file, not a folder; name another")


def _check_inspection(filled):
    """Refuse what shows nothing, or what would be shown nowhere."""
    faults = []
    if not filled.data_path and filled.video is None:
        faults.append("give --model_name_or_path and --data_path; or --video and --html for a page of one video")
    if filled.data_path and filled.model_name_or_path is None:
        faults.append("give --model_name_or_path, whose tokenizer makes the tokens")
    if filled.video is not None and filled.html is None:
        faults.append("--video is shown on a page: add --html FILE")
    if filled.html is not None and filled.data_path and filled.index is None:
        faults.append("--html shows one record: add --index N")
    if filled.html is not None and not filled.html.lower().endswith((".html", ".htm")):
        faults.append(f"--html {shown(filled.html)} does not end as a page does; give a name that ends in .html")
    if faults:
        raise ValueError("; ".join(faults))


def _command(config_class):
    return config_class.__name__.removesuffix("Config").lower()


def help_text(config_class: type) -> str:
    """What ``--help`` prints: the required flags, then the others in their groups, each once."""
    width = min(shutil.get_terminal_size().columns or 80, 110)
    groups = {"required": [], "flags": []}
    group = "flags"
    for field in dataclasses.fields(config_class):
        group = field.metadata.get("group", group)
        groups.setdefault("required" if _required(field) else group, []).append(field)
    lines = [f"usage: fastvid {_command(config_class)} [flags]", ""]
    for paragraph in (config_class.__doc__ or "").strip().split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    for title, members in groups.items():
        if members:
            lines += [f"{title}:", *(line for field in members for line in _help_of(field, width)), ""]
    lines += [
        "others:",
        "  --config FILE",
        *textwrap.wrap(
            "YAML file of flags; the command line overrides it. Dashes may stand for underscores in flags.",
            width,
            initial_indent=" " * 6,
            subsequent_indent=" " * 6,
        ),
    ]
    return "\n".join(lines)


def _help_of(field, width):
    kind, _ = _without_none(field.type)
    several = " ..." if typing.get_origin(kind) is list else ""
    kind = typing.get_args(kind)[0] if several else kind
    if typing.get_origin(kind) is typing.Literal:
        value = "|".join(typing.get_args(kind))
    elif words := words_of(kind):
        value = "|".join(["N", *words])
    else:
        value = {bool: "[True|False]", str: "TEXT", int: "N"}.get(kind, "X")
    default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    default = " ".join(map(str, default)) if isinstance(default, list) else default
    text = field.metadata["help"]
    if (
        not _required(field)
        and default is not None
        and default is not False
        and default != ""
        and "Default:" not in text
    ):
        text += f" Default: {default}."
    return [
        f"  --{config.flag_of(field)} {value}{several}",
        *textwrap.wrap(text, width, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
