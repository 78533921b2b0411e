"""Records that cannot be read where they lie, written as JSONL by one rank of each machine for all of them."""

import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fastvid.files import StrPath, shown

if TYPE_CHECKING:  # a command without ranks does not load torch
    from fastvid.dist.parallel import World

log = logging.getLogger("fastvid")
_ROUND = 10.0  # seconds for which a rank unpacks before it meets the others again, who wait for it


def unpacked(path: StrPath, lines: Iterator[bytes]) -> int:
    """A descriptor of a temporary file without a name that holds `lines`.

    Args:
        path: where they come from, for messages.

    Raises:
        ValueError: there is no room for it, and how much it takes.
        OSError: `lines` cannot be read.
    """
    size, writing = 0, True  # whether an error is the temporary file's

    def counted():
        nonlocal size, writing
        writing = False
        for line in lines:
            size, writing = size + len(line), True
            yield line
            writing = False
        writing = True

    try:
        with tempfile.TemporaryFile(prefix="fastvid-") as file:
            file.writelines(counted())
            file.flush()
            writing = False
            return os.dup(file.fileno())
    except OSError as error:
        if not writing:
            raise
        size += sum(map(len, lines))
        where = f" ({shown(tempfile.tempdir)})" if tempfile.tempdir else ""  # None: no folder can be written to
        raise ValueError(
            f"{shown(path)} cannot be unpacked to $TMPDIR{where}, where it takes {size:,} bytes "
            f"({error.strerror}); set TMPDIR to a folder with room for it, or write the records as JSONL"
        ) from error


def once_a_machine(world: "World | None", make: Callable[[], int], path: StrPath) -> int:
    """What `make` gives, a descriptor: the first rank of each machine calls it, and the others open its file.

    Args:
        world: all ranks of it call this; None: this process is alone.
        path: what is unpacked, for messages.

    Raises:
        ValueError: that of `make`, on every rank. Another error of it is one where it happened, and told as a
            ValueError on the other ranks.
    """
    if world is None or world.size == 1:
        return make()
    machine = _machine() or f"of rank {world.rank}"
    first = world.gather_objects(machine).index(machine)
    made = _while_others_wait(world, make if first == world.rank else None, path)
    told = None if made is None else (os.getpid(), made, _identity(made))
    told = world.gather_objects(told)[first]
    if made is None and told is not None:
        made = _opened(*told)
    again = _while_others_wait(world, make if made is None else None, path)  # before that no owner closes its own
    made = again if made is None else made
    assert made is not None
    return made


def _while_others_wait(world: "World", make: Callable[[], int] | None, path: StrPath) -> int | None:
    """What `make` gives, on ranks that have one. All ranks meet again and again until it is done.

    However long it takes, no collective takes longer than a round, and none comes to the process group's timeout.
    """
    made, error = None, None

    def run():
        nonlocal made, error
        try:
            assert make is not None
            made = make()
        except Exception as caught:  # a defect as well: the others would wait for ever
            error = caught

    thread = None if make is None else threading.Thread(target=run, name="unpack", daemon=True)
    if thread is not None:
        thread.start()
    seconds, said = _ROUND if world.timeout is None else min(_ROUND, world.timeout.total_seconds() / 4), False
    while True:
        if thread is not None:
            thread.join(seconds)
        busy = thread is not None and thread.is_alive()
        found = world.gather_objects((busy, None if error is None else _text(error, world.rank)))
        if not any(busy for busy, _ in found):
            break
        if not said:
            log.info("%s is unpacked by one rank of each machine, and the others wait for it", shown(path))
        said = True
    if error is not None:
        raise error
    if text := next((text for _, text in found if text is not None), None):
        raise ValueError(text)
    return made


def _text(error, rank):
    return str(error) if isinstance(error, ValueError) else f"rank {rank}: {type(error).__name__}: {error}"


def _opened(process, descriptor, identity):
    """A descriptor of another process's file; None where it cannot be opened, or is another file."""
    try:
        own = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:  # ranks of several users, or without /proc
        return None
    if _identity(own) == identity:
        return own
    os.close(own)  # of a process of that number in another container
    return None


def _identity(descriptor):
    """What tells a file from others."""
    there = os.fstat(descriptor)
    return there.st_dev, there.st_ino, there.st_size


def _machine():
    """What ranks have in common that see each other's descriptors; None where nothing tells."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text()
        return f"{started} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None
