"""Data files: JSON arrays, JSONL (one record per line), Parquet, and objects that hold the records one level down."""

import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fastvid.data.parquet import MAGIC, read_parquet
from fastvid.files import StrPath, atomic_file, shown, wrong_content

log = logging.getLogger("fastvid")

# Fields of the records that this package reads: an object with one of them is a record, not a wrapping of records.
_OF_RECORDS = {
    "conversations",
    "conversation",
    "messages",
    "query",
    "QA",
    "instruction",
    "q",
    "Q",
    "question",
    "video",
    "videos",
    "video_id",
    "video_name",
    "image",
    "images",
    "audio",
}
_BEGINNINGS = {b"PK\x03\x04": "is a zip archive; unpack it"}
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}
BLANK = " \t\r\n"  # what JSON has as white space, and a blank line is made of
_PER_LINE = "expected a JSON array or one JSON object per line"
_ENDINGS = (".json", ".jsonl", ".parquet")
_OPEN_ALREADY = ("/dev/stdin", "/dev/fd/", "/proc/self/fd/")  # a shell's <(command): a pipe with somebody who writes


def place(path: StrPath, index: int) -> str:
    """How all messages name a record: the file, and the record's number in it, counted from 0."""
    return f"{shown(path)}: record {index} (from 0)"


def kind_of(value: object) -> str:
    """What a JSON value is, in words."""
    return _KINDS.get(type(value), "a number")


def read_records(path: StrPath) -> list[Any]:
    """The records of a data file; which kind of file it is shows in its content.

    Lines end at "\\n" only: texts may hold U+2028 and its like. A byte-order mark and blank lines are skipped. An
    object around the records, such as {"data": [records]} or {id: record}, is taken off, and that is said.

    Raises:
        ValueError: naming the file that cannot be read, or the line of what is no JSON or no UTF-8.
    """
    if is_parquet(path):
        return list(read_parquet(path))
    text = read_text(path)
    first = text.lstrip(BLANK)[:1]
    if first == "[":
        return _parse(text, path)
    if not first:
        raise ValueError(f"{shown(path)} is empty: expected a JSON array or one JSON object per line")
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip(BLANK):
            continue
        try:
            records.append(_parse(line, path, number))
        except ValueError:
            if records or (whole := _object(text)) is None:
                raise
            records.append(whole)  # one object over several lines
            break
    if len(records) == 1 and isinstance(records[0], dict) and not is_record(records[0]):
        return _unwrapped(records[0], path)
    return records


class RecordWriter:
    """Records that go to a file as they come: JSONL, or one JSON array as ``json.dump`` writes it by default.

    Args:
        file: open for writing bytes.
        path: its name; JSONL if it ends in .jsonl.
    """

    def __init__(self, file: IO[bytes], path: StrPath):
        self._file, self._lines, self._count = file, Path(path).suffix == ".jsonl", 0

    def append(self, record: Any) -> None:
        before = b"" if self._lines else b", " if self._count else b"["
        self._file.write(before + json.dumps(record).encode("ascii") + b"\n" * self._lines)
        self._count += 1

    def finish(self) -> None:
        """Write what ends the file."""
        self._file.write(b"" if self._lines else b"]" if self._count else b"[]")

    def __len__(self) -> int:
        return self._count


def write_records(path: StrPath, records: list[Any]) -> None:
    """Write JSONL if `path` ends in .jsonl, else one JSON array as ``json.dump`` writes it by default; atomically."""
    with atomic_file(path) as file:
        writer = RecordWriter(file, path)
        for record in records:
            writer.append(record)
        writer.finish()


def iterate(path: StrPath) -> Iterator[Any]:
    """The records of a data file in turn, which are held one by one if its form allows it; otherwise `read_records`."""
    return read_parquet(path) if is_parquet(path) else iter(read_records(path))


def is_record(value: dict[str, Any]) -> bool:
    """Whether an object has a field of the records that this package reads, and so wraps no records."""
    return not _OF_RECORDS.isdisjoint(value)


def is_open_already(path: StrPath) -> bool:
    """Whether a path is a shell's pipe, which can be read once."""
    return str(path).startswith(_OPEN_ALREADY)


def is_parquet(path: StrPath) -> bool:
    """Whether a file begins as Parquet does; False of a pipe, and of what cannot be read."""
    try:
        if not os.path.isfile(path) or is_open_already(path):
            return False
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


def read_text(path: StrPath) -> str:
    """The text of a file, with "\\n" as the end of each line and no byte-order mark.

    Raises:
        ValueError: naming the file that cannot be read, or is no UTF-8.
    """
    if not is_open_already(path) and (reason := wrong_content(path)):
        remedy = "" if Path(path).is_file() else f"; {_what_to_give(path)}"
        raise ValueError(f"{shown(path)} {reason}{remedy}")
    try:
        data = Path(path).read_bytes()
        for beginning, reason in _BEGINNINGS.items():
            if data.startswith(beginning):
                raise ValueError(f"{shown(path)} {reason}")
        return data.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{shown(path)}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise ValueError(f"{shown(path)} cannot be read ({error.strerror}); {_what_to_give(path)}") from error


def _what_to_give(path):
    """The remedy for a path that is no data file."""
    name, path = str(path), Path(path)
    pieces = [piece.strip() for piece in name.split(",")]
    if "://" in name:
        return "download it first, and give its path"
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir() if file.suffix in _ENDINGS)
        return f"give the data files in it{': ' * bool(files)}{', '.join(map(shown, files[:5]))}"
    if len(pieces) > 1 and not path.exists():
        return f"give several files with spaces between them: {shown(' '.join(pieces))}"
    if re.search(r"[*?\[]", name) and not path.exists():
        return "write a pattern without quotation marks, so that the shell puts the files' names in its place"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in _ENDINGS and not path.parent.exists():
        return f"download a data set of the hub first (hf download {name} --repo-type dataset), and give its JSON file"
    return "give the path of a JSON, JSONL or Parquet file"


def _parse(text, path, number=None):
    """The value of a JSON text, which is the whole of a file or its line `number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = _hint(text, error, path, number)
        raise ValueError(
            f"{shown(path)}: line {number or error.lineno}, column {error.colno}: {error.msg}{'; ' * bool(hint)}{hint}"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        where = shown(path) if number is None else f"{shown(path)}: line {number}"
        raise ValueError(f"{where} is not what a data file can hold ({error})") from error


def _hint(text, error, path, number):
    """What is wrong with a text that is no JSON, and the remedy; "" where nothing is likely."""
    if Path(path).suffix in (".yaml", ".yml"):
        return "YAML is no data file: give the JSON files that it lists"
    if Path(path).suffix in (".csv", ".tsv"):
        return "a table is no data file: write each of its rows as a JSON object"
    before, after = text[: error.pos].rstrip(), text[error.pos :].lstrip()
    if after.startswith(("'", "None", "True", "False")):
        return "this is Python's notation: write the file with json.dump"
    if after.startswith(("//", "/*", "#")):
        return "JSON has no comments: take them out"
    if (after[:1] in ("]", "}") and before.endswith(",")) or error.msg.startswith("Illegal trailing comma"):
        return "take out the comma before the bracket"
    if error.msg.startswith("Invalid control character"):
        return r"within a text, line breaks are written as \n and tabs as \t: write the file with json.dump"
    if before and (not after or error.msg.startswith("Unterminated string")):
        cut = "cut short: copy or write the file again"
        return f"the file is {cut}" if number is None else f"{_PER_LINE}, and this one is {cut}"
    return "" if number is None else _PER_LINE


def _object(text):
    """The one object that a text is; None if it is not."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _unwrapped(wrapping, path):
    """The records in a file's only object, where it wraps them; else that object."""
    lists = {
        name: value
        for name, value in wrapping.items()
        if isinstance(value, list) and all(isinstance(record, dict) for record in value)
    }
    filled = {name: value for name, value in lists.items() if value or name == "data"}
    if len(filled) > 1:
        raise ValueError(
            f"{shown(path)} holds several lists of records ({', '.join(map(shown, filled))}); write the "
            "one to use to a file of its own"
        )
    if filled:
        ((name, records),) = filled.items()
        log.warning('%s: the records are those under "%s"', shown(path), shown(name))
        return records
    if wrapping and all(isinstance(record, dict) for record in wrapping.values()):
        log.warning("%s: one object of records by name; the names are their ids", shown(path))
        return [{"id": name, **record} for name, record in wrapping.items()]
    return [wrapping]
