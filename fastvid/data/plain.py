"""Records that show by their bytes alone that nothing is wrong or unusual about them.

They are in the training form, as `fastvid convert` writes it. Of ten million records most are, and a regular expression
reads one fifteen times as fast as JSON's parser and `fastvid.data.annotations.examine` do. Every other record, also one
whose text holds "<" or an escaped ASCII letter, goes that long way: the pattern promises, and is never asked to refuse.
"""

import re

from fastvid.data.names import ASSISTANT

# Text within quotation marks of JSON, without "<" and without what could spell it; escapes of halves of characters,
# emoji among them, are left to the parser.
_TEXT = r'[^"\\<\x00-\x1f]*+(?:\\(?:["\\/bfnrt]|u(?!00[0-7]|[dD][89a-fA-F])[0-9a-fA-F]{4})[^"\\<\x00-\x1f]*+)*+'
_NAME = r'[^"\\\x00-\x1f]'
_FILE = rf"(?!file://|data:){_NAME}++"  # those two are not taken as they stand
_SOME = rf'(?!"){_TEXT}'
_COLON, _COMMA = ": ?", ", ?"
_TURN = rf'\{{"from"{_COLON}"%s"{_COMMA}"value"{_COLON}"%s"\}}'
_FIRST = rf"(?(medium){_TEXT}<(?P=kind)>{_TEXT}|{_SOME})"  # with the medium's placeholder, if there is one

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
