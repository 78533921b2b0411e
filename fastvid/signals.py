"""Signals that ask a command to stop: noted, so that the piece of work in hand is finished and kept."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator

# Of a scheduler, of Ctrl-C, and of a terminal or ssh session that is gone.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Seconds within which a second signal is taken for the first: a terminal sends it to all, and torchrun hands it on.
SAME = 5.0


@contextlib.contextmanager
def noted(note: Callable[[int], object]) -> Iterator[None]:
    """Within this context a signal of `STOPPING` calls ``note(number)``. A later Ctrl-C interrupts at once.

    Who starts a command with SIGHUP ignored (nohup) has it stay so. Only the main thread gets signals; in another one
    this does nothing.
    """
    first = None

    def handle(number, frame):
        nonlocal first
        if first is None:
            first = time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - first > SAME:
            raise KeyboardInterrupt
        note(number)

    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in STOPPING:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
