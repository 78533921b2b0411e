"""Waiting for what other processes and threads do.

A busy machine takes its time: a limit here ends a test that hangs, and measures nothing.
"""

import threading
import time
from contextlib import contextmanager

LONG = 240  # seconds: far from what anything takes, and below pytest's own limit for a test


def wait_until(condition, seconds=LONG):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.01)


@contextmanager
def meanwhile(condition, act):
    """While the context lasts, a thread waits until a condition holds and acts; it acts too when that takes too long,
    and then the context raises."""
    found = []

    def run():
        try:
            wait_until(condition)
        except BaseException as error:
            found.append(error)
        act()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if found:
        raise found[0]
