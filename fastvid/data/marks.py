"""Where the bytes of a piece of a JSON file stand that mean something: quotation marks, escapes, ends of lines."""

import numpy as np

_SHORT_ESCAPE = np.zeros(256, bool)
_SHORT_ESCAPE[[*b'"/bfnrt']] = True
_DIGIT = np.full(256, 1 << 16, np.int32)
_DIGIT[[*b"0123456789abcdefABCDEF"]] = [*range(16), *range(10, 16)]
_QUOTE, _ESCAPE = ord('"'), ord("\\")
_PIECE = 2**17  # bytes that a processor's cache holds besides what is made of them
_NOWHERE = np.zeros(0, np.int64)


class Marks:
    """Places in some bytes, all of which one pass finds.

    Args:
        data: UTF-8.

    Attributes:
        data: the same.
        values: [bytes] uint8, the same.
        lines: [n] int64, where "\\n" stands; ascending, as all of these.
        quotes: where a quotation mark stands, but not behind a backslash.
        escapes: where a backslash stands.
        tags: where "<" stands.
        stirs: where control characters stand, also "\\n", and what begins an escape other than of a sign such as a
            quotation mark, or of one whole character beyond ASCII. Of a record without them, every quotation mark in
            `quotes` begins or ends a text, and no other does.
    """

    def __init__(self, data: bytes):
        self.data, self.values = data, np.frombuffer(data, np.uint8)
        values = self.values
        at = np.concatenate([_found(values[i : i + _PIECE]) + i for i in range(0, len(values), _PIECE)] or [_NOWHERE])
        byte = values[at]
        quoted = byte == _QUOTE
        quotes, others = at[quoted], at[~quoted]
        byte = values[others]
        self.tags, self.escapes = others[byte == ord("<")], others[byte == _ESCAPE]
        controls = others[byte < ord(" ")]
        self.lines = controls[values[controls] == ord("\n")]
        last = len(values) - 1
        after = values[np.minimum(self.escapes + 1, last)]
        if (after == _QUOTE).any():
            quotes = quotes[values[quotes - 1] != _ESCAPE]  # what is before the first byte does not matter
        self.quotes = quotes
        longer, after = (some[~_SHORT_ESCAPE[after]] for some in (self.escapes, after))
        code = np.zeros(len(longer), np.int32)
        for place in range(2, 6):
            code = code * 16 + _DIGIT[values[np.minimum(longer + place, last)]]
        whole = (after == ord("u")) & (code > 0x7F) & (code < 1 << 16)
        odd = longer[~whole | (code >> 11 == 0xD800 >> 11)]
        self.stirs = np.sort(np.concatenate([controls, odd]), kind="stable") if len(odd) else controls

    def holds(self, text: bytes, at: np.ndarray) -> np.ndarray:
        """[n] bool, whether `text`, without zeros, stands at each place."""
        most = len(self.data) - len(text)
        if most < 0:
            return np.zeros(len(at), bool)
        windows = np.ndarray((most + 1,), f"S{len(text)}", self.data, strides=(1,))
        return (windows[np.minimum(at, most)] == text) & (at <= most)


def _found(values):
    """[n] int64, where control characters, quotation marks, escapes, "<", and a few others stand."""
    found = values <= _QUOTE
    found &= values != ord(" ")
    found |= (values & 0x9F) == 0x1C  # "<" and "\\", and a control character and "|" besides
    return np.flatnonzero(found)
