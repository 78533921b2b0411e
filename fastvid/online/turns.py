"""Which video an encoder does next."""

import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from fastvid.online.board import Board

_PAUSE = 0.2  # seconds until a video that another process has leased is tried again


class Turns:
    """Videos by number, in the order in which samples need them; those that a reader waits for come before all others.

    Args:
        order: numbers of the videos that will be needed.
        board: `Board` of all.

    Attributes:
        stopped: whether no more are wanted.
    """

    def __init__(self, order: Iterable[int], board: Board):
        self._waiting, self._later, self._busy = OrderedDict.fromkeys(order), {}, set()
        self._board, self._changed, self.stopped = board, threading.Condition(), False

    def first(self, numbers: Sequence[int]) -> None:
        """Do these before all others, in this order."""
        with self._changed:
            for number in reversed(numbers):
                if number not in self._busy and not self._board.state(number):
                    self._later.pop(number, None)
                    self._waiting[number] = None
                    self._waiting.move_to_end(number, last=False)
            self._changed.notify_all()

    def next(self) -> int | None:
        """The next video, once there is one; None if all are finished, or no more are wanted."""
        with self._changed:
            while not self.stopped and self._board.finished < self._board.count:
                for number in [number for number, due in self._later.items() if due <= time.monotonic()]:
                    del self._later[number]
                    self._waiting[number] = None
                    self._waiting.move_to_end(number, last=False)
                if self._waiting:
                    number, _ = self._waiting.popitem(last=False)
                    self._busy.add(number)
                    return number
                self._changed.wait(_PAUSE)
            return None

    def leave(self, number: int, *, again: bool = False) -> None:
        """A thread is done with a video.

        Args:
            again: another process has it; come to it again.
        """
        with self._changed:
            self._busy.discard(number)
            if again:
                self._later[number] = time.monotonic() + _PAUSE
            self._changed.notify_all()

    def stop(self) -> None:
        with self._changed:
            self.stopped = True
            self._changed.notify_all()
