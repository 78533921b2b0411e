"""An answer's text as its tokens come."""

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Piece = TypeVar("Piece")

_INCOMPLETE = "\ufffd"  # what stands for a character whose bytes are not all there


class AnswerText(Generic[Piece]):
    """Text that grows with the ids of an answer, or with pieces of text; its own, joined, are the whole answer's.

    White space around it is left out, as `Chat.ask` does. What may change with the next token is held back: an
    incomplete character, white space at the end, and what a text of `stops` begins with.

    Args:
        decode: from ids, or whatever comes, to text.
        stops: texts of which the first to come ends the answer; it is not part of it.

    Attributes:
        tokens: ids that there were so far.
        stopped: whether one of `stops` has come.
    """

    def __init__(self, decode: Callable[[list[Piece]], str], stops: Sequence[str] = ()):
        self._decode, self._stops, self._sent = decode, stops, ""
        self._ids: list[Piece] = []
        self.stopped = False

    @property
    def tokens(self) -> int:
        return len(self._ids)

    def add(self, ids: Sequence[Piece]) -> str:
        """The piece that is certain now."""
        for token in ids if self._stops else ():  # one by one, so that `tokens` counts none behind a stop
            self._ids.append(token)
            text = self._decode(self._ids).lstrip()
            found = [at for at in map(text.find, self._stops) if at >= 0]
            if found:
                self.stopped = True
                return self._piece(text[: min(found)].rstrip())
        if not self._stops:
            self._ids += ids
            text = self._decode(self._ids).lstrip()
        elif not ids:
            return ""
        text = text.rstrip(_INCOMPLETE)
        held = max(
            (size for stop in self._stops for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )
        return self._piece(text[: len(text) - held].rstrip())

    def end(self) -> str:
        """The rest."""
        return "" if self.stopped else self._piece(self._decode(self._ids).strip())

    def _piece(self, text):
        piece = text[len(self._sent) :]
        self._sent += piece
        return piece
