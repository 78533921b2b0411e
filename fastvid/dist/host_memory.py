"""Memory of the host: what a CPU computes in, and Python's own garbage."""

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator
from pathlib import Path

# mallopt's parameters (malloc.h).
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4
# Nothing is mapped by itself, and nothing goes back to the system.
_KEEPING = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * 2**20}
# Large blocks are mapped by themselves. malloc's own threshold would rise with the blocks it sees, up to 32 MiB.
_RETURNING = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 8 * 2**20, _M_TRIM_THRESHOLD: 128 * 2**10, _M_TOP_PAD: 0}

# What a container's processes may use: control groups of version 2 and 1.
_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def total() -> int:
    """Bytes that processes here may use: the machine's, or the container's limit where that is less."""
    found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for path in _LIMITS:
        try:
            found.append(int(path.read_text()))
        except (OSError, ValueError):  # not there, not readable, or "max"
            continue
    return min(found)


def keep_freed(keep: bool) -> bool:
    """Say what this process does with freed memory, from now on.

    Args:
        keep: use it again. Otherwise every step asks for its large tensors anew, and the system clears them page by
            page: a tenth of a step's time on two cores. What is kept lies in pieces that do not fit what is needed
            next, though, up to as much again as a step needs at its peak. False returns every large block to the
            system, which takes a fifth of the time or more where everything is recomputed.

    Returns whether the C library could be told (glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    options = _KEEPING if keep else _RETURNING
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in options.items())


@contextlib.contextmanager
def collecting_later() -> Iterator[None]:
    """Turn Python's automatic garbage collection off while very many objects are made that stay.

    It would look at all of them again and again: a quarter of the time that it takes to list 100,000 videos.
    """
    automatic = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if automatic:
            gc.enable()


@contextlib.contextmanager
def collecting_when_told() -> Iterator[None]:
    """Turn Python's automatic garbage collection off, and leave what exists now out of every collection.

    It would come at another moment on every rank, and look at all records of the data set each time. Who is in this
    context calls `gc.collect` now and then.
    """
    automatic = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if automatic:
            gc.enable()
