"""Records that show by their bytes alone that nothing is wrong or unusual about them.

They are in the training form, as `fastvid convert` writes it. Of ten million records most are, and a regular expression
reads one fifteen times as fast as JSON's parser and `fastvid.data.annotations.examine` do. Every other record, also one
whose text holds "<" or an escaped ASCII letter, goes that long way: the pattern promises, and is never asked to refuse.

A pattern looks at each character of a text. `CALM` skips what needs no look, twice as fast, and numpy finds the few
bytes that do, a piece of the file at a time.
"""

import itertools
import re
from bisect import bisect_left
from collections.abc import Iterator

import numpy as np

from fastvid.data.names import ASSISTANT

# Text within quotation marks of JSON, without "<" and without what could spell it; escapes of one half of a character
# are left to the parser.
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = rf'\\(?:["\\/bfnrt]|u(?!00[0-7]|[dD][89a-fA-F])[0-9a-fA-F]{{4}}|{_PAIR})'
_TEXT = rf'[^"\\<\x00-\x1f]*+(?:{_ESCAPE}[^"\\<\x00-\x1f]*+)*+'
_NAME = r'[^"\\\x00-\x1f]'
_FILE = rf"(?!file://|data:){_NAME}++"  # those two are not taken as they stand
_SOME = rf'(?!"){_TEXT}'
_COLON, _COMMA = ": ?", ", ?"
_TURN = rf'\{{"from"{_COLON}"%s"{_COMMA}"value"{_COLON}"%s"\}}'


def _pattern(text, before):
    """Of a record; `text` matches a text within it, `before` what stands before a placeholder."""
    some = rf'(?!"){text}'
    first = rf"(?(medium){before}<(?P=kind)>{text}|{some})"  # with the medium's placeholder, if there is one
    return re.compile(
        (
            rf'\{{"id"{_COLON}"{_NAME}*+"{_COMMA}'
            rf'(?P<medium>"(?P<kind>video|image)"{_COLON}"(?P<name>{_FILE})"{_COMMA})?'
            rf'"conversations"{_COLON}\[{_TURN % ("human", first)}{_COMMA}{_TURN % ("gpt", some)}'
            rf"(?:{_COMMA}{_TURN % ('human', some)}{_COMMA}{_TURN % ('gpt', text)})*+\]\}}"
        ).encode("ascii")
    )


# Group 3 of both is the name of the video or image, if there is one.
PLAIN = _pattern(_TEXT, _TEXT)
# The same of a record without bytes that `Stirs` counts, and with as many "<" as it has placeholders.
CALM = _pattern(r'[^"]*+(?:(?<=\\)"[^"]*+)*+', r'[^"<]*+(?:(?<=\\)"[^"<]*+)*+')
ROLE = ASSISTANT.encode("ascii")  # what a text must not hold besides, for a record to be plain

_SHORT_ESCAPE = np.zeros(256, bool)
_SHORT_ESCAPE[[*b'"/bfnrt']] = True
_DIGIT = np.full(256, 1 << 16, np.int32)
_DIGIT[[*b"0123456789abcdefABCDEF"]] = [*range(16), *range(10, 16)]


class Stirs:
    """Which bytes of some records need a look, each.

    Args:
        data: UTF-8.

    Attributes:
        at: [n] int64, where control characters stand, and what begins an escape other than of a sign such as a
            quotation mark, or of one whole character beyond ASCII; ascending.
        tags: [m] int64, where "<" stands.
    """

    def __init__(self, data: bytes):
        values = np.frombuffer(data, np.uint8)
        self.tags = np.flatnonzero(values == ord("<"))
        controls, escapes = np.flatnonzero(values < ord(" ")), np.flatnonzero(values == ord("\\"))
        after, last = np.minimum(escapes + 1, len(values) - 1), len(values) - 1
        short = _SHORT_ESCAPE[values[after]] if len(escapes) else np.zeros(0, bool)
        longer = escapes[~short]
        code = np.zeros(len(longer), np.int32)
        for place in range(2, 6):
            code = code * 16 + _DIGIT[values[np.minimum(longer + place, last)]]
        whole = (values[np.minimum(longer + 1, last)] == ord("u")) & (code > 0x7F) & (code < 1 << 16)
        self.at = np.sort(np.concatenate([controls, longer[~whole | (code >> 11 == 0xD800 >> 11)]]), kind="stable")

    def within(self, begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] bool, whether something stirs between each begin and end; [n] int64, how many "<" stand there)."""
        stirred = np.searchsorted(self.at, begins) < np.searchsorted(self.at, ends)
        return stirred, np.searchsorted(self.tags, ends) - np.searchsorted(self.tags, begins)


def match_lines(data: bytes, begins: np.ndarray, ends: np.ndarray) -> Iterator[re.Match | None]:
    """What `PLAIN.fullmatch` gives of each line of UTF-8 bytes, but perhaps the pattern that matched."""
    stirred, tags = Stirs(data).within(begins, ends)
    tags[stirred] = -1
    first, last = begins.tolist(), ends.tolist()
    calm = map(CALM.fullmatch, itertools.repeat(data), first, last)
    for begin, end, match, count in zip(first, last, calm, tags.tolist()):
        if count < 0 or (match is not None and count != (match[3] is not None)):
            match = PLAIN.fullmatch(data, begin, end)
        yield match


class Matcher:
    """`PLAIN.match` of records of UTF-8 bytes, one after the other."""

    def __init__(self, data: bytes):
        stirs = Stirs(data)
        self._data, self._at, self._tags = data, stirs.at.tolist(), stirs.tags.tolist()

    def __call__(self, begin: int) -> re.Match | None:
        """The match of the record that begins at `begin`, if it is plain."""
        match = CALM.match(self._data, begin)
        end = len(self._data) if match is None else match.end()
        at = bisect_left(self._at, begin)
        if at < len(self._at) and self._at[at] < end:
            return PLAIN.match(self._data, begin)
        if match is None:
            return None
        tags = bisect_left(self._tags, end) - bisect_left(self._tags, begin)
        return match if (match[3] is not None) == tags else PLAIN.match(self._data, begin)
