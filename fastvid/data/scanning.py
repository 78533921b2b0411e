"""Where the records of a JSON or JSONL file begin and end, and which are plain, a piece of the file at a time."""

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterator

import numpy as np

from fastvid.data import records
from fastvid.data.marks import Marks
from fastvid.data.plain import PLAIN, ROLE, Found, laid_out, look

CHUNK = 2**20  # bytes that are looked at together; what is made of more takes new pages each time
_TOGETHER = 8  # chunks that a process takes at a time
_LINE = 2**12  # bytes within which most lines end
READ_AGAIN = 2**30  # bytes that are read as a whole at most, where a file is faulty or not what it seemed
BOM = b"\xef\xbb\xbf"
BLANK = records.BLANK.encode("ascii")
_SPACE = re.compile(rb"[ \t\r\n]*")
_LONE_RETURN = re.compile(rb"\r(?!\n|\Z)")  # the end of a file ends its last line, too

NO_NAME, NOT_PLAIN = -1, -2  # in `fastvid.data.on_disk.Block.name_of`

Pieces = tuple[np.ndarray, np.ndarray, list[str], np.ndarray]  # where records begin and end; of a `Block`


_NOTHING = (np.zeros(0, np.int64), np.zeros(0, np.int64), Found.none(0))
_BLANKS = np.zeros(256, bool)
_BLANKS[[*BLANK]] = True


class OtherForm(Exception):
    """A file is not what its beginning says."""


def lines(file: int, processes: int) -> Iterator[Pieces]:
    """What `RecordFile` notes of a JSONL file's lines; blank ones do not count."""
    size = os.fstat(file).st_size
    chunks = range(-(-size // CHUNK))
    parcels = range(-(-len(chunks) // _TOGETHER))
    processes = min(processes, len(parcels) // 2)

    def parcel(number):
        return [_chunk_of_lines(file, chunk) for chunk in chunks[number * _TOGETHER : (number + 1) * _TOGETHER]]

    if processes:
        from fastvid.data.prefetch import Prefetcher  # loads torch, which `fastvid convert` does without

        ahead = contextlib.closing(Prefetcher(parcel, processes).map(parcels))
    else:
        ahead = contextlib.nullcontext(map(parcel, parcels))
    with ahead as found:
        for pieces in itertools.chain.from_iterable(found):
            if pieces is None:
                raise OtherForm
            yield pieces


def _chunk_of_lines(file, number):
    """The lines that begin in a chunk of a file; None if some end with a carriage return alone."""
    at = number * CHUNK
    begin = _after_line(file, at - 1, at + CHUNK - 1) if number else len(BOM) * (read(file, 0, len(BOM)) == BOM)
    if begin is None:
        return _pieces(b"", at, *_NOTHING)
    end = _after_line(file, max(begin, at + CHUNK) - 1)
    assert end is not None
    data, at = read(file, begin, end - begin), begin
    if b"\r" in data and _LONE_RETURN.search(data):
        return None
    marks = Marks(data)
    values, ends = marks.values, marks.lines
    if len(data) and (not len(ends) or ends[-1] != len(data) - 1):
        ends = np.append(ends, len(data))
    begins = np.append(0, ends[:-1] + 1)[: len(ends)]
    ends = ends - (values[np.maximum(ends - 1, 0)] == ord("\r"))
    filled = ends > begins
    odd = np.flatnonzero(filled & (values[np.minimum(begins, len(data) - 1)] <= ord(" ")))
    filled[[i for i in odd.tolist() if not data[begins[i] : ends[i]].strip(BLANK)]] = False
    begins, ends = begins[filled], ends[filled]
    return _pieces(data, at, begins, ends, look(marks, begins, ends, _is_text(data)))


def _after_line(file, at, stop=None):
    """Where the first line ends that ends at or after `at`, with its "\\n"; the file's end if there is none.

    Args:
        stop: None is returned if no line ends before.
    """
    size = _LINE
    while True:
        data = read(file, at, size if stop is None else min(size, stop - at))
        if found := data.find(b"\n") + 1:
            return at + found
        if stop is not None and at + len(data) >= stop:
            return None
        at, size = at + len(data), min(2 * size, CHUNK)
        if not data:
            return at


def _pieces(data, at, begins, ends, found):
    """(where records begin, where they end, names, name of each): see `RecordFile._noted` and `Block`."""
    names = _Numbers({b"": 0})  # which stands for none
    of_each = list(map(names.__getitem__, map(data.__getitem__, map(slice, *found.names.T.tolist()))))
    name_of = np.where(found.plain, np.array(of_each, dtype=np.int32) + NO_NAME, NOT_PLAIN).astype(np.int32)
    for role in re.finditer(ROLE, data):
        holder = np.searchsorted(begins, role.start(), "right") - 1
        if holder >= 0 and role.end() <= ends[holder]:
            name_of[holder] = NOT_PLAIN
    return begins + at, ends + at, [name.decode() for name in names if name], name_of


class _Numbers(dict):
    """Numbers of what is asked for, from 0 in the order of first use."""

    def __missing__(self, key):
        number = self[key] = len(self)
        return number


def array(file: int, _: int) -> Iterator[Pieces]:
    """What `RecordFile` notes of the members of a JSON array."""
    decode, size = json.JSONDecoder().raw_decode, CHUNK
    at = len(BOM) * (read(file, 0, len(BOM)) == BOM)
    expected = b"["
    while expected:
        data = read(file, at, size)
        last = len(data) < size
        text, before, members, done = None, 0, [], 0
        quick = _Runs(data)
        # `done`: where the next member or sign is looked for; what is before it need not be read again.
        while True:
            begin = _space(data, done)
            if begin >= len(data):
                break
            if expected in (b"[", b","):
                sign = data[begin : begin + 1]
                if sign == b"]" and expected == b",":
                    if data[begin + 1 :].strip(BLANK) or read(file, at + len(data), CHUNK).strip(BLANK):
                        raise OtherForm
                    expected = b""
                    break
                if sign != expected:
                    raise OtherForm
                expected, done = b"first" if sign == b"[" else b"member", begin + 1
                continue
            if expected == b"first" and data[begin : begin + 1] == b"]":
                expected = b","
                done = begin
                continue
            if (run := quick.starting(begin)) is not None:
                members.append(run)
                expected, done = b",", int(run[1][-1])
                continue
            if text is None:  # from here on; what is cut at the end is most often the first that needs it
                text, before = data[begin:].decode("latin-1"), begin  # as many characters as bytes
            try:
                end = before + decode(text, begin - before)[1]
            except (ValueError, RecursionError):
                end = len(data)
            if end >= len(data):  # it may go on
                break
            members.append((np.array([begin]), np.array([end]), quick.alone(begin, end)))
            expected, done = b",", end
        if expected and last:
            raise OtherForm
        if members:
            begins, ends, found = zip(*members)
            yield _pieces(data, at, np.concatenate(begins), np.concatenate(ends), Found.joined(found))
        elif expected and not done:
            size *= 2
            if size > READ_AGAIN:
                raise OtherForm
            continue
        at, size = at + done, CHUNK


class _Runs:
    """Plain members of an array that follow each other, which nobody has to look at one by one."""

    def __init__(self, data):
        self._data, self._marks, self._is_text = data, Marks(data), _is_text(data)
        self._begins, self._ends, self._found = laid_out(self._marks) if self._is_text else _NOTHING
        gap, after = self._begins[1:] - self._ends[:-1], self._marks.values
        blank = _BLANKS[after[self._begins[1:] - 1]]
        follows = (after[self._ends[:-1]] == ord(",")) & ((gap == 1) | ((gap == 2) & blank))
        self._breaks = np.append(np.flatnonzero(~follows), len(follows)) + 1  # where a run ends, and the next begins

    def starting(self, begin):
        """(begins, ends, `Found`) of members in turn from the one at `begin` on; None if it is none of them."""
        first = int(np.searchsorted(self._begins, begin))
        if first == len(self._begins) or self._begins[first] != begin:
            return None
        run = slice(first, int(self._breaks[np.searchsorted(self._breaks, first, "right")]))
        return self._begins[run], self._ends[run], self._found[run]

    def alone(self, begin, end):
        """`Found` of one member that none of them is."""
        match = PLAIN.fullmatch(self._data, begin, end) if self._is_text else None
        name = (0, 0) if match is None or match[3] is None else match.span(3)
        return Found(np.array([match is not None]), np.array([name]))


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


def read(file: int, at: int, size: int) -> bytes:
    """Bytes of a file from a place on: as many as are wanted, or as there are."""
    found = os.pread(file, size, at)
    while found and len(found) < size and (more := os.pread(file, size - len(found), at + len(found))):
        found += more
    return found
