"""The records of a data file, read from it one by one: memory holds where each begins and ends, and nothing else.

Of JSON and JSONL a record's bytes are read where they lie. Files of other forms (Parquet, an object around the records,
pipes) are unpacked to JSONL first: into memory or, if that is much, a temporary file without a name.
"""

import json
import os
import shlex
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvid.data import records, scanning
from fastvid.data.unpacking import once_a_machine, unpacked
from fastvid.files import StrPath, shown

if TYPE_CHECKING:  # `fastvid convert` does not load torch
    from fastvid.dist.parallel import World

_HELD = 64 * 2**20  # bytes of unpacked records that stay in memory
_DEEPEST = 100  # levels of objects and lists in a record, which the parser takes from wherever it is called


@dataclass(frozen=True)
class Block:
    """Some records of a file, next to each other.

    Attributes:
        first: number of the first of them in it, from 0.
        names: of videos and images.
        name_of: [n] int32, the name in `names` of each plain record's (`fastvid.data.plain`); or `NO_NAME` of one of
            text alone, or `NOT_PLAIN` of a record that must be examined.
    """

    first: int
    names: list[str]
    name_of: np.ndarray


class RecordFile:
    """The records of a data file, which can be asked for once it was scanned.

    Args:
        path: JSON, JSONL or Parquet, as `fastvid.data.records.read_records` reads it.
        world: ranks that all scan it, one of which unpacks it on each machine; None: this process is alone.
    """

    def __init__(self, path: StrPath, world: "World | None" = None):
        self.path, self._world = path, world
        self._file: int | None = None  # a descriptor
        self._close: weakref.finalize | None = None
        self._bytes: bytes | None = None
        self._seen: tuple[int, int] | None = None
        self._begins, self._ends = array("q"), array("q")

    def __len__(self) -> int:
        return len(self._begins)

    def __getitem__(self, number: int) -> Any:
        """A record, as `read_records` gives it. From any process that was forked.

        Raises:
            ValueError: the file was changed since it was scanned.
        """
        return _loads(self._raw(number), self.path, number)

    def examined(self, number: int) -> Any:
        """A record, while the file is scanned.

        Raises:
            ValueError: the record is no JSON, told with its line; or it is nested too deep.
        """
        try:
            data = self._raw(number)
            record = _loads(data, self.path, number)
        except TooDeep:
            raise
        except ValueError:
            raise self.fault(number) from None
        if data.count(b"[") + data.count(b"{") > _DEEPEST and _is_deep(record):
            raise TooDeep(self.path, number)
        return record

    def _raw(self, number):
        begin, end = self._begins[number], self._ends[number]
        if self._bytes is not None:
            return self._bytes[begin:end]
        assert self._file is not None, "it was not scanned"
        if self._seen is not None and _state(self._file) != self._seen:
            raise ValueError(f"{shown(self.path)} was changed since this run first read it; start the run again")
        return scanning.read(self._file, begin, end - begin)

    def sizes(self) -> np.ndarray:
        """[n] int64, the bytes of each record as it is written."""
        return np.frombuffer(self._ends, np.int64) - np.frombuffer(self._begins, np.int64)

    def scan(self, processes: int = 0) -> Iterator[Block]:
        """Yield the records in blocks of some thousand, and note their places. Once, to the end.

        Args:
            processes: as many look at a large file's lines; 0: this one.

        Raises:
            ValueError: as `read_records`.
        """
        form = self._open()
        try:
            yield from self._noted(self._unpacked(processes) if form is None else form(self._file, processes))
        except scanning.OtherForm:
            if len(self) or os.path.getsize(self.path) > scanning.READ_AGAIN:
                raise (self._line_ends() if form is scanning.lines else self.fault(len(self))) from None
            yield from self._noted(self._unpacked(processes))
        if self._bytes is not None:
            self._hold(None)

    def _noted(self, pieces):
        for begins, ends, *found in pieces:
            first = len(self._begins)
            self._begins.frombytes(begins.tobytes())
            self._ends.frombytes(ends.tobytes())
            yield Block(first, *found)

    def _open(self) -> Callable | None:
        """What reads the file in blocks; None if it has to be unpacked."""
        if records.is_open_already(self.path) or not os.path.isfile(self.path) or records.is_parquet(self.path):
            return None
        self._hold(os.open(self.path, os.O_RDONLY | os.O_CLOEXEC))
        assert self._file is not None
        self._seen = _state(self._file)
        size, line = 64 * 1024, b""
        while b"\n" not in line:  # the first line with something in it
            data = scanning.read(self._file, 0, size)
            line = data.removeprefix(scanning.BOM).lstrip(scanning.BLANK)
            if line[:1] == b"[":
                return scanning.array
            if len(data) < size:
                break
            size *= 2
        try:
            value = json.loads(line.split(b"\n", 1)[0])
        except (ValueError, RecursionError):
            return None
        return scanning.lines if isinstance(value, dict) and records.is_record(value) else None

    def _unpacked(self, processes):
        """The records as JSONL, where they are read from now on."""
        self._seen = None
        self._hold(once_a_machine(self._world, lambda: unpacked(self.path, _dumped(self.path)), self.path))
        assert self._file is not None
        if os.fstat(self._file).st_size <= _HELD:
            self._bytes = scanning.read(self._file, 0, _HELD)
        yield from scanning.lines(self._file, processes)

    def _hold(self, descriptor):
        """Keep a descriptor open as long as this object lives, or until the next one."""
        if self._close is not None:
            self._close()
        self._file = descriptor
        self._close = None if descriptor is None else weakref.finalize(self, os.close, descriptor)

    def fault(self, number: int) -> ValueError:
        """What is wrong with a file, one of whose records is no JSON; with its line, unless it is huge."""
        if os.path.getsize(self.path) <= scanning.READ_AGAIN:
            try:
                records.read_records(self.path)
            except ValueError as error:
                return error
        return ValueError(f"{records.place(self.path, number)}, or what stands around it, is no JSON; mend the file")

    def _line_ends(self):
        path = shown(self.path)
        return ValueError(
            f"{path}: some lines end with a carriage return alone; write it with line feeds "
            f"(tr '\\r' '\\n' < {shlex.quote(path)} > NEW.jsonl), and give that"
        )


class TooDeep(ValueError):
    """A record is nested too deep to be looked at.

    Attributes:
        reason: continues a sentence that begins with the record.
    """

    def __init__(self, path: StrPath, number: int):
        self.reason = f"is nested over {_DEEPEST} deep, which no conversation is"
        super().__init__(
            f"{records.place(path, number)} is nested over {_DEEPEST} deep, which no conversation is; leave it out, or "
            "the field of it that is"
        )


def _state(descriptor):
    there = os.fstat(descriptor)
    return there.st_size, there.st_mtime_ns


def _loads(data, path, number):
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise TooDeep(path, number) from None
    except ValueError as error:
        raise ValueError(f"{records.place(path, number)} is no JSON ({error}); mend the file") from error


def _dumped(path):
    """The lines of JSONL that hold a file's records."""
    for number, record in enumerate(records.iterate(path)):
        try:
            yield json.dumps(record).encode("ascii") + b"\n"
        except RecursionError:
            raise TooDeep(path, number) from None


def _is_deep(value):
    """Whether a JSON value is nested over `_DEEPEST` deep."""
    level = [value]
    for _ in range(_DEEPEST):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
    return any(isinstance(each, (dict, list)) for each in level)
