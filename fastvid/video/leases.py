"""Which process has leased which video: files in the output folder, so that processes share the work and may die.

A lease is a file ``.leases/<digest of a name>.<generation>.json`` that names its owner. Its owner is dead if the
process is gone (same machine), or has not touched its own file ``<owner>.owner`` for a minute (another machine). Who
takes over a dead owner's lease writes the next generation beside it, and nobody removes what a living process has: a
lease that is removed and made again could be taken by two that both saw the old one.

Every lease is a hard link to its owner's file, which is put in place whole: it exists with all its content, or does not
exist, on network file systems too.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import threading
import time
from pathlib import Path

from fastvid.dist import processes
from fastvid.files import NO_LINKS, StrPath, naming, remove_left_over

NAME = ".leases"
EVERY, SILENCE = 10.0, 60.0  # seconds between signs of life, and without one until another machine's process is dead
_LEASE = re.compile(r"([0-9a-f]{32})\.(\d+)\.json")


class Leases:
    """Leases of this process in an output folder, from `open` to `close`.

    Attributes:
        owner: name of this process in file names: machine, process number, random digits.
    """

    def __init__(self, folder: StrPath):
        self.folder = Path(folder) / NAME
        self.owner = f"{processes.machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        self._own, self._held = self._file_of(self.owner), {}
        self._begun, self._closed = False, threading.Event()

    def open(self) -> None:
        """Begin to hold leases, and remove those of dead processes.

        Raises:
            OSError: the folder cannot be written to.
        """
        self._write_own()
        self._begun = True
        threading.Thread(target=self._live, name="leases", daemon=True).start()
        self._sweep()

    def close(self) -> None:
        """Release all leases, and remove the files of this process and of dead ones."""
        if not self._begun or self._closed.is_set():
            return
        self._closed.set()
        try:
            for name in list(self._held):
                self.release(name)
            self._sweep()
        finally:  # without its own file this owner is dead, whatever leases of it are left
            self._own.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others are still there
                self.folder.rmdir()

    def take(self, name: str) -> bool:
        """Take the lease of a name; False while a living process has it. Another may have done its work already."""
        return self._take(_digest(name), name)

    def release(self, name: str) -> None:
        """Release a lease, and with it those of dead owners that it took over."""
        self._remove(*self._held.pop(name))

    def keeps(self, name: str) -> bool:
        """Whether a lease that was taken is still this owner's. It is lost to a process that took this one for dead."""
        if name in self._held and self._is_own(*self._held[name]):
            return True
        self._held.pop(name, None)
        return False

    def lives(self, owner: str) -> bool:
        """Whether the process that calls itself `owner` still lives, and has its leases open."""
        path = self._file_of(owner)
        record = _record(path)
        return record is not None and self._lives(record, path)

    def owners(self) -> list[str]:
        """All processes whose leases are open, or were when they died."""
        return sorted(name.removesuffix(".owner") for name in self._names() if name.endswith(".owner"))

    def _names(self):
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:  # another machine took this process for dead, and was the last one
            return []

    def _write_own(self):
        record = {
            "owner": self.owner,
            "machine": processes.machine(),
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "started": processes.started(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        with naming(self._own):
            while True:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Others never see it without its content. The name is one that `remove_left_over` knows.
                temporary = self.folder / f".{processes.machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp"
                # The last process to leave may just have removed the folder.
                with contextlib.suppress(FileNotFoundError):
                    temporary.write_text(json.dumps(record))
                    os.replace(temporary, self._own)
                    return

    def _touch_own(self):
        try:
            os.utime(self._own)
        except FileNotFoundError:  # another machine took this process for dead
            self._write_own()

    def _take(self, digest, name):
        dead = []  # what the generations below say, in their order
        while True:
            path = self._path(digest, len(dead))
            if self._put(path):
                # Whoever had the generation above may have given all of them back since they were read, and another
                # process may have begun anew: then this one has to begin anew as well.
                if all(_record(self._path(digest, i)) == record for i, record in enumerate(dead)):
                    self._held[name] = digest, len(dead)
                    return True
                path.unlink(missing_ok=True)
                dead = []
                continue
            record = _record(path)
            if record is None:  # given back just now
                dead = []
            elif self._lives(record, path) and not self._says_own(record, digest):
                return False
            else:
                dead.append(record)

    def _put(self, path) -> bool:
        """Make a lease file of this owner, unless there is one of anybody."""
        try:
            os.link(self._own, path)
        except FileExistsError:
            return False
        except FileNotFoundError:  # another machine took this process for dead
            self._write_own()
            return self._put(path)
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                with open(path, "xb") as file:
                    file.write(self._own.read_bytes())
            except FileExistsError:
                return False
        return True

    def _is_own(self, digest, generation) -> bool:
        """Whether a lease is this owner's and nobody took it over.

        The generation above is looked at first: who gives both back removes the lower one before it.
        """
        if self._path(digest, generation + 1).exists():
            return False
        return (_record(self._path(digest, generation)) or {}).get("owner") == self.owner

    def _says_own(self, record, digest) -> bool:
        """Whether a lease names this owner, which does not know of it: it is as a dead one's.

        It was taken over by a process that took this one for dead. Or a network file system lost the reply when it made
        the link, asked again, and was told that there is one.
        """
        return bool(record) and record["owner"] == self.owner and not self._knows(digest)

    def _knows(self, digest):
        return any(digest == held for held, _ in self._held.values())

    def _remove(self, digest, generation):
        """Remove a lease of this process, those below it first: nobody can begin anew beside one that is held."""
        if not self._is_own(digest, generation):  # another machine took this process for dead: now all are its
            return
        for i in range(generation + 1):
            self._path(digest, i).unlink(missing_ok=True)

    def _lives(self, record, path):
        """Whether the owner that the file `path` names lives; one without content may be about to get it."""
        if not record:
            return self._now() - _touched(path) < SILENCE
        if record["owner"] == self.owner:
            return True
        if record["machine"] == processes.machine():
            alive = processes.started(record["pid"]) == record["started"]
            return alive and self._file_of(record["owner"]).exists()
        return self._now() - _touched(self._file_of(record["owner"])) < SILENCE

    def _sweep(self):
        """Remove what dead processes left: each lease as its new owner, then their own files."""
        remove_left_over(self.folder)
        for digest in {match[1] for match in map(_LEASE.fullmatch, self._names()) if match}:
            if not self._knows(digest) and self._take(digest, digest):
                self.release(digest)
        for owner in self.owners():
            if owner != self.owner and not self.lives(owner):
                self._file_of(owner).unlink(missing_ok=True)

    def _live(self):
        while not self._closed.wait(EVERY):
            with contextlib.suppress(OSError):  # a slow disk: the next time
                self._touch_own()

    def _now(self):
        """The time by the clock that stamps files here: a file server's may differ from ours."""
        self._touch_own()
        return self._own.stat().st_mtime

    def _file_of(self, owner):
        return self.folder / f"{owner}.owner"

    def _path(self, digest, generation):
        return self.folder / f"{digest}.{generation}.json"


def _digest(name):
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:32]


def _record(path) -> dict | None:
    """What a lease, or an owner's file, says; {} if it is not written yet, None if there is none."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    fields = {"owner", "machine", "pid", "started"}
    return found if isinstance(found, dict) and fields <= found.keys() and isinstance(found["pid"], int) else {}


def _touched(path):
    """When, in seconds; 0 where it is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0
