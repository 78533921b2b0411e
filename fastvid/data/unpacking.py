"""Records that cannot be read where they lie, written as JSONL by one rank of each machine for all of them."""

import os
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from fastvid.dist.parallel import World
from fastvid.files import StrPath, shown


def unpacked(path: StrPath, lines: Iterator[bytes]) -> int:
    """A descriptor of a temporary file without a name that holds `lines`.

    Args:
        path: where they come from, for messages.

    Raises:
        ValueError: there is no room for it, and how much it takes.
    """
    size = 0
    try:
        with tempfile.TemporaryFile(prefix="fastvid-") as file:
            for line in lines:
                size += len(line)
                file.write(line)
            file.flush()
            return os.dup(file.fileno())
    except OSError as error:
        size += sum(map(len, lines))
        where = f" ({shown(tempfile.tempdir)})" if tempfile.tempdir else ""  # None: no folder can be written to
        raise ValueError(
            f"{shown(path)} cannot be unpacked to $TMPDIR{where}, where it takes {size:,} bytes "
            f"({error.strerror}); set TMPDIR to a folder with room for it, or write the records as JSONL"
        ) from error


def once_a_machine(world: World | None, make: Callable[[], int]) -> int:
    """What `make` gives, a descriptor: the first rank of each machine calls it, and the others open its file.

    Args:
        world: all ranks of it call this; None: this process is alone.

    Raises:
        ValueError: that of `make`, on every rank.
    """
    if world is None or world.size == 1:
        return make()
    machine, made, said = _machine(), None, None
    if world.gather_objects(machine).index(machine) == world.rank:
        try:
            made = make()
        except ValueError as error:
            said = str(error)
    found = world.gather_objects((machine, os.getpid(), made, said))
    if said := next((error for *_, error in found if error is not None), None):
        raise ValueError(said)
    if made is None:
        process, descriptor = next(each[1:3] for each in found if each[0] == machine and each[2] is not None)
        try:
            made = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # ranks of several users, or without /proc
            made = None
    world.gather_objects(None)  # before all have opened it, its owner must not close it
    return make() if made is None else made


def _machine():
    """What ranks have in common that see each other's descriptors."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()
