"""The records of a data file, read from it one by one: memory holds where each begins and ends, and nothing else.

Of JSON and JSONL a record's bytes are read where they lie. Files of other forms (Parquet, an object around the records,
pipes) are unpacked to JSONL first: into memory or, if that is much, a temporary file without a name.
"""

import contextlib
import itertools
import json
import os
import re
import shlex
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from fastvid.data import records
from fastvid.data.plain import PLAIN, ROLE
from fastvid.data.prefetch import Ahead
from fastvid.files import StrPath, shown

_CHUNK = 16 * 2**20  # bytes that are looked at together
_HELD = 64 * 2**20  # bytes of unpacked records that stay in memory
_READ_AGAIN = 2**30  # bytes that are read as a whole at most, where a file is faulty or not what it seemed
_DEEPEST = 100  # levels of objects and lists in a record, which the parser takes from wherever it is called
_BOM = b"\xef\xbb\xbf"
_BLANK = records.BLANK.encode("ascii")
_SPACE = re.compile(rb"[ \t\r\n]*")
_LONE_RETURN = re.compile(rb"\r(?!\n)")

NO_NAME, NOT_PLAIN = -1, -2  # in `Block.name_of`


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
    """

    def __init__(self, path: StrPath):
        self.path = path
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
        except _TooDeep:
            raise
        except ValueError:
            raise self.fault(number) from None
        if data.count(b"[") + data.count(b"{") > _DEEPEST and _is_deep(record):
            raise _TooDeep(self.path, number)
        return record

    def _raw(self, number):
        begin, end = self._begins[number], self._ends[number]
        if self._bytes is not None:
            return self._bytes[begin:end]
        assert self._file is not None, "it was not scanned"
        if self._seen is not None and _state(self._file) != self._seen:
            raise ValueError(f"{shown(self.path)} was changed since this run first read it; start the run again")
        return _read(self._file, begin, end - begin)

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
            yield from self._noted(self._unpacked() if form is None else form(self._file, processes))
        except _OtherForm:
            if len(self) or os.path.getsize(self.path) > _READ_AGAIN:
                raise (self._line_ends() if form is _lines else self.fault(len(self))) from None
            yield from self._noted(self._unpacked())
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
            data = _read(self._file, 0, size)
            line = data.removeprefix(_BOM).lstrip(_BLANK)
            if line[:1] == b"[":
                return _array
            if len(data) < size:
                break
            size *= 2
        try:
            value = json.loads(line.split(b"\n", 1)[0])
        except (ValueError, RecursionError):
            return None
        return _lines if isinstance(value, dict) and records.is_record(value) else None

    def _unpacked(self):
        """The records as JSONL, where they are read from now on."""
        self._seen, lines, size = None, _dumped(self.path), 0
        try:
            with tempfile.TemporaryFile(prefix="fastvid-") as file:
                for line in lines:
                    size += len(line)
                    file.write(line)
                file.flush()
                self._hold(os.dup(file.fileno()))
                if size <= _HELD:
                    self._bytes = _read(self._file, 0, _HELD)
        except OSError as error:
            size += sum(map(len, lines))
            where = f" ({shown(tempfile.tempdir)})" if tempfile.tempdir else ""  # None: no folder can be written to
            raise ValueError(
                f"{shown(self.path)} cannot be unpacked to $TMPDIR{where}, where it takes {size:,} bytes "
                f"({error.strerror}); set TMPDIR to a folder with room for it, or write the records as JSONL"
            ) from error
        assert self._file is not None
        yield from _lines(self._file, 0)

    def _hold(self, descriptor):
        """Keep a descriptor open as long as this object lives, or until the next one."""
        if self._close is not None:
            self._close()
        self._file = descriptor
        self._close = None if descriptor is None else weakref.finalize(self, os.close, descriptor)

    def fault(self, number: int) -> ValueError:
        """What is wrong with a file, one of whose records is no JSON; with its line, unless it is huge."""
        if os.path.getsize(self.path) <= _READ_AGAIN:
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


_Pieces = tuple[np.ndarray, np.ndarray, list[str], np.ndarray]  # where records begin and end; of a `Block`


class _OtherForm(Exception):
    """A file is not what its beginning says."""


class _TooDeep(ValueError):
    def __init__(self, path, number):
        super().__init__(
            f"{records.place(path, number)} is nested over {_DEEPEST} deep, which no conversation is; leave it out, or "
            "the field of it that is"
        )


def _lines(file: int, processes: int) -> Iterator[_Pieces]:
    """What `RecordFile` notes of a JSONL file's lines; blank ones do not count."""
    size = os.fstat(file).st_size
    chunks = range(-(-size // _CHUNK))
    ahead = Ahead(partial(_chunk_of_lines, file), min(processes, len(chunks) // 2))
    with contextlib.closing(ahead.map(chunks)) as found:
        for pieces in found:
            if pieces is None:
                raise _OtherForm
            yield pieces


def _chunk_of_lines(file, number):
    """The lines that begin in a chunk of a file; None if some end with a carriage return alone."""
    at, size = number * _CHUNK, _CHUNK
    if number:
        data = _read(file, at - 1, size + 1)
        skipped = data.find(b"\n")  # what begins before this chunk
        if skipped < 0:
            return _pieces(b"", at, [], [])
        at, data = at + skipped, data[skipped + 1 :]
    else:
        at = len(_BOM) * (_read(file, 0, len(_BOM)) == _BOM)
        data = _read(file, at, size - at)
    while data and not data.endswith(b"\n"):
        more = _read(file, at + len(data), max(len(data) // 8, 4096))
        if not more:
            break
        end = more.find(b"\n") + 1
        data += more[:end] if end else more
    if b"\r" in data and _LONE_RETURN.search(data):
        return None
    values = np.frombuffer(data, np.uint8)
    ends = np.flatnonzero(values == ord("\n"))
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    begins = np.append(0, ends[:-1] + 1)[: len(ends)]
    ends = ends - (values[np.maximum(ends - 1, 0)] == ord("\r"))
    filled = ends > begins
    odd = np.flatnonzero(filled & (values[np.minimum(begins, len(data) - 1)] <= ord(" ")))
    filled[[i for i in odd.tolist() if not data[begins[i] : ends[i]].strip(_BLANK)]] = False
    begins, ends = begins[filled].tolist(), ends[filled].tolist()
    return _pieces(data, at, begins, ends, map(PLAIN.fullmatch, itertools.repeat(data), begins, ends))


def _pieces(data, at, begins, ends, matches=()):
    """(where records begin, where they end, names, name of each): see `RecordFile._noted` and `Block`."""
    names, name_of = {}, []
    if not _is_text(data):
        matches = [None] * len(begins)
    for match in matches:
        if match is None:
            name_of.append(NOT_PLAIN)
            continue
        name = match[3]
        name_of.append(NO_NAME if name is None else names.setdefault(name, len(names)))
    if ROLE in data:
        for i, (begin, end) in enumerate(zip(begins, ends)):
            if data.find(ROLE, begin, end) >= 0:
                name_of[i] = NOT_PLAIN
    begins, ends = np.array(begins, dtype=np.int64), np.array(ends, dtype=np.int64)
    return begins + at, ends + at, [name.decode() for name in names], np.array(name_of, dtype=np.int32)


def _array(file: int, _: int) -> Iterator[_Pieces]:
    """What `RecordFile` notes of the members of a JSON array."""
    decode, size = json.JSONDecoder().raw_decode, _CHUNK
    at = len(_BOM) * (_read(file, 0, len(_BOM)) == _BOM)
    expected = b"["
    while expected:
        data = _read(file, at, size)
        last = len(data) < size
        text, begins, ends, matches, done = None, [], [], [], 0
        is_text = _is_text(data)
        # `done`: where the next member or sign is looked for; what is before it need not be read again.
        while True:
            begin = _space(data, done)
            if begin >= len(data):
                break
            if expected in (b"[", b","):
                sign = data[begin : begin + 1]
                if sign == b"]" and expected == b",":
                    if data[begin + 1 :].strip(_BLANK) or _read(file, at + len(data), _CHUNK).strip(_BLANK):
                        raise _OtherForm
                    expected = b""
                    break
                if sign != expected:
                    raise _OtherForm
                expected, done = b"first" if sign == b"[" else b"member", begin + 1
                continue
            if expected == b"first" and data[begin : begin + 1] == b"]":
                expected = b","
                done = begin
                continue
            match = PLAIN.match(data, begin) if is_text else None
            if match is not None:
                end = match.end()
            else:
                text = data.decode("latin-1") if text is None else text  # as many characters as bytes
                try:
                    _, end = decode(text, begin)
                except (ValueError, RecursionError):
                    end = len(data)
            if end >= len(data):  # it may go on
                break
            begins.append(begin)
            ends.append(end)
            matches.append(match)
            expected, done = b",", end
        if expected and last:
            raise _OtherForm
        if begins:
            yield _pieces(data, at, begins, ends, matches)
        elif expected and not done:
            size *= 2
            if size > _READ_AGAIN:
                raise _OtherForm
            continue
        at, size = at + done, _CHUNK


def _is_text(data):
    """Whether bytes are UTF-8, but for what may be the beginning of a character at their end."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data"
    return True


def _space(data, at):
    found = _SPACE.match(data, at)
    assert found is not None
    return found.end()


def _read(file, at, size):
    """Bytes of a file from a place on: as many as are wanted, or as there are."""
    found = os.pread(file, size, at)
    while found and len(found) < size and (more := os.pread(file, size - len(found), at + len(found))):
        found += more
    return found


def _state(descriptor):
    there = os.fstat(descriptor)
    return there.st_size, there.st_mtime_ns


def _loads(data, path, number):
    try:
        return json.loads(data.decode())
    except RecursionError:
        raise _TooDeep(path, number) from None
    except ValueError as error:
        raise ValueError(f"{records.place(path, number)} is no JSON ({error}); mend the file") from error


def _dumped(path):
    """The lines of JSONL that hold a file's records."""
    for number, record in enumerate(records.iterate(path)):
        try:
            yield json.dumps(record).encode("ascii") + b"\n"
        except RecursionError:
            raise _TooDeep(path, number) from None


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
