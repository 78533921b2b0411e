"""Records that show by their bytes alone that nothing is wrong or unusual about them.

They are in the training form, as `fastvid convert` writes it. Of ten million records most are, and JSON's parser and
`fastvid.data.annotations.examine` would take twenty times as long for one. Every other record, also one whose text
holds "<" or an escaped ASCII letter, goes that long way: what is here promises, and is never asked to refuse.

`PLAIN` says what is plain, and looks at each character of a text. `look` finds the same without it where it can: numpy
finds the few bytes that matter, and compares what stands between the texts, for some thousand records at a time.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fastvid.data.marks import Marks
from fastvid.data.names import ASSISTANT

# Text within quotation marks of JSON, without "<" and without what could spell it; escapes of one half of a character
# are left to the parser.
_PAIR = r"u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
_ESCAPE = rf'\\(?:["\\/bfnrt]|u(?!00[0-7]|[dD][89a-fA-F])[0-9a-fA-F]{{4}}|{_PAIR})'
_TEXT = rf'[^"\\<\x00-\x1f]*+(?:{_ESCAPE}[^"\\<\x00-\x1f]*+)*+'
_NAME = r'[^"\\\x00-\x1f]'
_NOT_AS_THEY_STAND = (b"file://", b"data:")  # beginnings of names
_FILE = rf"(?!{b'|'.join(_NOT_AS_THEY_STAND).decode()}){_NAME}++"
_SOME = rf'(?!"){_TEXT}'
_COLON, _COMMA = ": ?", ", ?"
_TURN = rf'\{{"from"{_COLON}"%s"{_COMMA}"value"{_COLON}"%s"\}}'
# Of the first question: with the medium's placeholder, if there is one.
_FIRST = rf"(?(medium){_TEXT}<(?P=kind)>{_TEXT}|{_SOME})"
# Group 3 is the name of the video or image, if there is one.
PLAIN = re.compile(
    (
        rf'\{{"id"{_COLON}"{_NAME}*+"{_COMMA}'
        rf'(?P<medium>"(?P<kind>video|image)"{_COLON}"(?P<name>{_FILE})"{_COMMA})?'
        rf'"conversations"{_COLON}\[{_TURN % ("human", _FIRST)}{_COMMA}{_TURN % ("gpt", _SOME)}'
        rf"(?:{_COMMA}{_TURN % ('human', _SOME)}{_COMMA}{_TURN % ('gpt', _TEXT)})*+\]\}}"
    ).encode("ascii")
)
ROLE = ASSISTANT.encode("ascii")  # what a text must not hold besides, for a record to be plain


@dataclass(frozen=True)
class Found:
    """Which records of some are plain.

    Attributes:
        plain: [n] bool.
        names: [n, 2] int64, where the name of a plain record's video or image begins and ends; 0, 0 without one.
    """

    plain: np.ndarray
    names: np.ndarray

    @classmethod
    def none(cls, number: int) -> "Found":
        """Of records none of which is plain."""
        return cls(np.zeros(number, bool), np.zeros((number, 2), np.int64))

    @classmethod
    def joined(cls, parts: Iterable["Found"]) -> "Found":
        """Of the records of all parts in turn."""
        plain, names = zip(*((part.plain, part.names) for part in parts))
        return cls(np.concatenate(plain), np.concatenate(names))

    def __getitem__(self, some: "np.ndarray | slice") -> "Found":
        return Found(self.plain[some], self.names[some])


def look(marks: Marks, begins: np.ndarray, ends: np.ndarray, is_text: bool = True) -> Found:
    """What `PLAIN.fullmatch` says of records.

    Args:
        begins, ends: [n] int64, where the records begin and end in the bytes of `marks`; ascending.
        is_text: these are UTF-8; of others no record is plain.
    """
    if not is_text:
        return Found.none(len(begins))
    found = _laid_out(marks, begins, ends)
    for i in np.flatnonzero(~found.plain).tolist():
        match = PLAIN.fullmatch(marks.data, begins[i], ends[i])
        if match is not None:
            found.plain[i] = True
            found.names[i] = match.span(3) if match[3] is not None else 0
    return found


def laid_out(marks: Marks) -> tuple[np.ndarray, np.ndarray, Found]:
    """(begins, ends, `Found`) of records that are plain, wherever they stand among others: not of all that are."""
    before, after = marks.quotes - 1, np.minimum(marks.quotes + 1, len(marks.data) - 1)
    begins = before[(marks.values[before] == ord("{")) & (before >= 0)]
    begins = begins[np.logical_or(*(marks.holds(layout.head, begins) for layout in _LAYOUTS))]
    ends = marks.quotes[marks.values[after] == ord("}")]
    ends = ends[marks.holds(_END, ends)] + len(_END)
    which = np.searchsorted(ends, begins)
    begins, which = begins[which < len(ends)], which[which < len(ends)]
    found = _laid_out(marks, begins, ends[which])
    plain = found.plain
    return begins[plain], ends[which[plain]], found[plain]


class _Layout:
    """What stands between a record's texts, where it is written with some blank after ":" and ","."""

    def __init__(self, blank: bytes):
        def fill(text):
            return text.replace(b"_", blank)

        self.head = fill(b'{"id":_"')
        self.media = [fill(b'",_"%s":_"' % kind) for kind in _KINDS]
        self.first = fill(b'",_"conversations":_[{"from":_"human",_"value":_"')
        self.asked, self.answered = (fill(b'"},_{"from":_"%s",_"value":_"' % who) for who in (b"human", b"gpt"))


_KINDS = (b"video", b"image")
_END = b'"}]}'
_LAYOUTS = (_Layout(b" "), _Layout(b""))
_OF_ID, _OF_NAME, _OF_LIST, _OF_TURN = 4, 4, 2, 8  # quotation marks of the parts of a record


def _laid_out(marks, begins, ends):
    """`Found` of records in one of `_LAYOUTS`; of others nothing is said, and they are not `plain`.

    A record without `stirs` whose quotation marks are as many as those of a plain one is looked at where these must be.
    """
    quotes = np.searchsorted(marks.quotes, begins)
    of_turns = np.searchsorted(marks.quotes, ends) - quotes - _OF_ID - _OF_LIST
    named = of_turns % (2 * _OF_TURN) == _OF_NAME
    fits = (named | (of_turns % (2 * _OF_TURN) == 0)) & (of_turns >= 2 * _OF_TURN)
    fits &= np.searchsorted(marks.stirs, begins) == np.searchsorted(marks.stirs, ends)
    tag = np.searchsorted(marks.tags, begins)
    fits &= np.searchsorted(marks.tags, ends) - tag == named  # the placeholder's, and no other
    found = Found.none(len(begins))
    for layout in _LAYOUTS:
        at = np.flatnonzero(fits)
        at = at[marks.holds(layout.head, begins[at])]
        if len(at):
            some, quote, turns = named[at], quotes[at], of_turns[at] // _OF_TURN
            plain, names = _follow(marks, layout, begins[at], ends[at], some, quote, turns, tag[at])
            found.plain[at] |= plain
            found.names[at[plain & some]] = names[plain[some]]
    return found


def _follow(marks, layout, begins, ends, named, quotes, turns, tag):
    """([n] bool, whether records go on from their heads as `layout` says; [m, 2] int64, names of those `named`).

    Args:
        quotes, tag: [n] int64, numbers of each one's first of `marks.quotes`, and of `marks.tags`.
        turns: [n] int64, how many turns each must have.
    """

    def closing(number):
        return marks.quotes[quotes + number]

    good = np.ones(len(begins), bool)
    closed = closing(_OF_ID - 1)
    # The name of a video or image, and its placeholder.
    after_id, tags = closed[named], marks.tags[tag[named]]
    opened, closed = after_id + len(layout.media[0]), closed.copy()
    closed[named] = closing(_OF_ID + _OF_NAME - 1)[named]
    names = np.stack([opened, closed[named]], axis=1)
    kinds = [marks.holds(key, after_id) & marks.holds(b"<%s>" % kind, tags) for kind, key in zip(_KINDS, layout.media)]
    not_as_they_stand = [marks.holds(beginning, opened) for beginning in _NOT_AS_THEY_STAND]
    good[named] = np.logical_or(*kinds) & ~np.logical_or(*not_as_they_stand) & (names[:, 1] > names[:, 0])
    escape = np.append(marks.escapes, len(marks.data))
    good &= escape[np.searchsorted(escape, begins)] > closed  # none in the id, nor in the name
    good &= marks.holds(layout.first, closed)
    opened, quote = closed + len(layout.first), _OF_ID + _OF_LIST + _OF_NAME * named + _OF_TURN - 1
    closed = closing(quote)
    good &= closed > opened
    good[named] &= (tags >= opened[named]) & (tags < closed[named])
    on = np.flatnonzero(good)  # whose turns are followed
    for turn in range(1, int(turns.max())):
        on = on[turns[on] > turn]
        between = layout.asked if turn % 2 == 0 else layout.answered
        good[on] &= marks.holds(between, closed[on])
        opened = closed[on] + len(between)
        closed[on] = marks.quotes[quotes[on] + quote[on] + _OF_TURN * turn]
        if turn % 2 == 0 or turn == 1:  # later answers may be empty
            good[on] &= closed[on] > opened
        on = on[good[on]]
    good &= marks.holds(_END, closed) & (ends == closed + len(_END))
    return good, names
