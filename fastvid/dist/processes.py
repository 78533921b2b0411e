"""Which process is meant, on which machine, and whether it still lives."""

import os
import socket
import zlib
from pathlib import Path


def machine() -> str:
    """Of all processes whose numbers can be compared with those of this one: 8 hexadecimal digits.

    Containers of one machine number their processes apart, and so does a machine that has started anew.
    """
    parts = [socket.gethostname()]
    for read in (lambda: Path("/proc/sys/kernel/random/boot_id").read_text(), lambda: os.readlink("/proc/self/ns/pid")):
        try:
            parts.append(read())
        except OSError:  # no Linux
            continue
    return f"{zlib.crc32(' '.join(parts).encode()):08x}"


def started(pid: int) -> str | None:
    """When a process of this machine began, in the system's own count; None if there is no such process (any more).

    A number is given again to later processes: the same number and the same start are the same process.
    """
    try:
        # The name, in brackets, may hold anything. After it: state, …; the start is the 22nd field of all.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self/stat").exists():
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "unknown"
