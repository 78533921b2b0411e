"""One run at a time in an output folder: a file there says who has it."""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from fastvid.dist import processes
from fastvid.dist.parallel import World
from fastvid.files import StrPath, naming

log = logging.getLogger("fastvid")

NAME = ".running"
PATIENCE = 5.0  # seconds for the processes of a job that was just killed to go
EVERY, SILENCE = 10.0, 60.0  # seconds between signs of life, and without one until another machine's run is dead


@contextlib.contextmanager
def held(output_dir: StrPath, world: World) -> Iterator[None]:
    """Within this context `output_dir` is this run's; all ranks enter it together, and rank 0 takes the lock.

    The lock of a dead process counts for nothing. Of this machine's processes it is known who lives. Another machine's
    (or container's) touch their lock every few seconds: a lock that is not touched for a minute is a dead one's.

    Raises:
        ValueError: on every rank; another run has the folder.
        OSError: on every rank; the lock cannot be written.
    """
    lock, fault = None, None
    if world.is_main:
        try:
            lock = _taken(Path(output_dir))
        except (ValueError, OSError) as error:
            fault = error
    fault = world.gather_objects(fault)[0]
    if fault is not None:
        raise fault
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


class _Lock:
    """What rank 0 holds; `path` has its sign of life until `release`."""

    def __init__(self, path, mark, made):
        self.path, self.mark, self.made = path, mark, made
        self.released = threading.Event()
        self.thread = threading.Thread(target=self._live, name="run lock", daemon=True)
        self.thread.start()

    def _live(self):
        while not self.released.wait(EVERY):
            with contextlib.suppress(OSError):  # a full or a slow disk: the next time
                os.utime(self.path)

    def release(self):
        self.released.set()
        with contextlib.suppress(OSError):
            if _read(self.path).get("mark") == self.mark:
                self.path.unlink()
            if self.made:
                self.path.parent.rmdir()  # if nothing was written there


def _taken(folder):
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path, begin, seen = folder / NAME, time.monotonic(), None
    while True:
        mark, other = _try(path)
        if mark is not None:
            return _Lock(path, mark, made)
        ours, touched = other.get("machine") == processes.machine(), _touched(path)
        if seen is None and not ours and other:
            log.warning(
                "waiting until it is known whether the run of process %s on %s, which has %s, still lives",
                other.get("pid"),
                other.get("host"),
                path,
            )
        seen = seen or touched
        if other and ((time.monotonic() - begin > PATIENCE) if ours else touched > seen):
            raise ValueError(
                f"another run is writing to --output_dir {folder}: process {other.get('pid')} on {other.get('host')}, "
                f"since {other.get('since')}. Give this one another --output_dir, or end that one first"
            )
        time.sleep(0.2)


def _try(path):
    """(mark of the lock that is now ours, {}) or (None, what the lock of a living run says)."""
    with naming(path), _alone(path) as file:
        other = _parse(file.read())
        if other and _lives(other, path):
            return None, other
        mark = secrets.token_hex(8)
        lock = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "machine": processes.machine(),
            "started": processes.started(os.getpid()),
            "mark": mark,
        }
        os.pwrite(file.fileno(), json.dumps(lock).encode(), 0)
        os.ftruncate(file.fileno(), len(json.dumps(lock)))
        os.fsync(file.fileno())
    written = _read(path)  # where flock does nothing (some network file systems) another may have come in between
    return (mark, {}) if written.get("mark") == mark else (None, written)


@contextlib.contextmanager
def _alone(path):
    """The open file, while no other process that locks it here reads or writes it.

    The file lock is not kept: processes that this one forks would keep it when this one is dead.
    """
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NONBLOCK, 0o666), "r+b", buffering=0) as file:
        with contextlib.suppress(OSError):  # a file system without such locks
            fcntl.flock(file, fcntl.LOCK_EX)
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError(f"{path} is no regular file, and no lock of a run: remove it")
        yield file


def _lives(other, path):
    if other.get("machine") == processes.machine():
        own = other.get("pid") == os.getpid()
        return not own and processes.started(other["pid"]) == other.get("started")
    return _now(path) - _touched(path) < SILENCE


def _touched(path):
    """When, in seconds; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _now(path):
    """The time by the clock that stamps files beside `path`: a file server's may differ from ours."""
    probe = path.with_name(f"{NAME}-{secrets.token_hex(4)}")
    try:
        probe.touch()
        return probe.stat().st_mtime
    finally:
        probe.unlink(missing_ok=True)


def _read(path):
    try:
        return _parse(path.read_text(encoding="utf-8"))
    except OSError:
        return {}


def _parse(text):
    """What a lock says; nothing of one that was cut short while it was written."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("pid"), int) else {}
