"""Memory of the host, where a CPU computes."""

import ctypes

# mallopt's parameters (malloc.h) and what they become: nothing is mapped by itself, and nothing goes back to the system.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_KEEPING = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 64 * 2**20}


def keep_freed() -> bool:
    """Let this process use freed memory again instead of returning it to the system.

    Otherwise every step asks for its large tensors anew, and the system clears them page by page: a tenth of a step's
    time on two cores. Returns whether the C library could be told (glibc).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in _KEEPING.items())
