"""Where the records of a JSON or JSONL file begin and end, and which are plain, a piece of the file at a time."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from functools import partial

import numpy as np

from fastvid.data import records
from fastvid.data.plain import ROLE, Matcher, match_lines

CHUNK = 4 * 2**20  # bytes that are looked at together
READ_AGAIN = 2**30  # bytes that are read as a whole at most, where a file is faulty or not what it seemed
BOM = b"\xef\xbb\xbf"
BLANK = records.BLANK.encode("ascii")
_SPACE = re.compile(rb"[ \t\r\n]*")
_LONE_RETURN = re.compile(rb"\r(?!\n|\Z)")  # the end of a file ends its last line, too

NO_NAME, NOT_PLAIN = -1, -2  # in `fastvid.data.on_disk.Block.name_of`

Pieces = tuple[np.ndarray, np.ndarray, list[str], np.ndarray]  # where records begin and end; of a `Block`


class OtherForm(Exception):
    """A file is not what its beginning says."""


def lines(file: int, processes: int) -> Iterator[Pieces]:
    """What `RecordFile` notes of a JSONL file's lines; blank ones do not count."""
    size = os.fstat(file).st_size
    chunks = range(-(-size // CHUNK))
    look, processes = partial(_chunk_of_lines, file), min(processes, len(chunks) // 2)
    if processes:
        from fastvid.data.prefetch import Prefetcher  # loads torch, which `fastvid convert` does without

        ahead = contextlib.closing(Prefetcher(look, processes).map(chunks))
    else:
        ahead = contextlib.nullcontext(map(look, chunks))
    with ahead as found:
        for pieces in found:
            if pieces is None:
                raise OtherForm
            yield pieces


def _chunk_of_lines(file, number):
    """The lines that begin in a chunk of a file; None if some end with a carriage return alone."""
    at, size = number * CHUNK, CHUNK
    if number:
        data = read(file, at - 1, size + 1)
        skipped = data.find(b"\n")  # what begins before this chunk
        if skipped < 0:
            return _pieces(b"", at, [], [])
        at, data = at + skipped, data[skipped + 1 :]
    else:
        at = len(BOM) * (read(file, 0, len(BOM)) == BOM)
        data = read(file, at, size - at)
    while data and not data.endswith(b"\n"):
        more = read(file, at + len(data), max(len(data) // 8, 4096))
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
    filled[[i for i in odd.tolist() if not data[begins[i] : ends[i]].strip(BLANK)]] = False
    begins, ends = begins[filled], ends[filled]
    matches = match_lines(data, begins, ends) if _is_text(data) else [None] * len(begins)
    return _pieces(data, at, begins, ends, matches)


def _pieces(data, at, begins, ends, matches=()):
    """(where records begin, where they end, names, name of each): see `RecordFile._noted` and `Block`."""
    names, name_of = {}, []
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


def array(file: int, _: int) -> Iterator[Pieces]:
    """What `RecordFile` notes of the members of a JSON array."""
    decode, size = json.JSONDecoder().raw_decode, CHUNK
    at = len(BOM) * (read(file, 0, len(BOM)) == BOM)
    expected = b"["
    while expected:
        data = read(file, at, size)
        last = len(data) < size
        text, begins, ends, matches, done = None, [], [], [], 0
        plain = Matcher(data) if _is_text(data) else lambda _: None
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
            match = plain(begin)
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
            raise OtherForm
        if begins:
            yield _pieces(data, at, begins, ends, matches)
        elif expected and not done:
            size *= 2
            if size > READ_AGAIN:
                raise OtherForm
            continue
        at, size = at + done, CHUNK


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
