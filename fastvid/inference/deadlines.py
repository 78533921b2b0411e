"""Other servers that get only so much time, however slowly they send."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any


def bounded(kind: Any, seconds: float) -> Any:
    """A class of urllib3's connections whose answers must begin, headers included, within so many seconds.

    A socket's own timeout bounds each read, and a server may send a byte at a time.
    """
    import socket

    class Bounded(kind):
        def getresponse(self):
            end = time.monotonic() + seconds
            late = f"no answer within {seconds:g} s"
            try:
                with at(end, lambda: self.sock and self.sock.shutdown(socket.SHUT_RD)):
                    response = super().getresponse()
            except Exception as error:  # of a connection that was shut down, too: as if the server had left
                if time.monotonic() > end:
                    raise TimeoutError(late) from error
                raise
            if time.monotonic() > end:
                raise TimeoutError(late)
            return response

    return Bounded


@contextmanager
def at(end: float, function: Callable[[], object]) -> Iterator[None]:
    """Call a function at a time of the monotonic clock, unless the block has ended before."""
    timer = threading.Timer(max(0, end - time.monotonic()), _quietly, (function,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _quietly(function):
    with suppress(OSError, ValueError):  # the connection has just ended
        function()
