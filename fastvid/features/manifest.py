"""The manifest of an extraction: one JSON line per video, with its status.

An entry about a feature file ("file") says what it was made with, and its "sha256". It is about that file alone: of two
formats in one folder each has its own entries. A pickle, which has no header, gets a line ahead of the file
("writing"), so that one whose extraction is killed is known as well.

One process at a time writes ``manifest.jsonl``: the one that has its lease. Others that write at the same time have
files of their own, ``manifest-<owner>.jsonl``, for what several machines append to one file on a network file system
may be lost. Readers take all of them, and the newest entry wins, by its "time", wherever it stands. The clocks of the
machines have to agree only as far as two of them write about one video without having read each other's entry. Whoever
has ``manifest.jsonl`` adds the lines of processes that are done or dead, and removes their files. A process that was
taken for dead, because it was silent for so long, notices that its file is gone or its lease lost, and writes to a new
file.

Lines are appended by single writes. A line that a crash has torn is skipped when reading and closed off when writing.
"""

import errno
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from fastvid.files import StrPath, naming

NAME = "manifest.jsonl"
_BEFORE, _AFTER = "manifest-", ".jsonl"  # the owner's name between them
_TRIES = 5  # of a write to a file that others may remove
_PATIENCE = 0.5  # seconds that a process waits at its end for one that ends at the same time
_TICK = 1e-6  # seconds, to which entries tell their time
_SYNCED = ("writing", "failed")  # another machine has to see these before it may take the video


class Leases(Protocol):
    """What a manifest asks of its folder's leases (`fastvid.video.leases.Leases`)."""

    owner: str

    def take(self, name: str) -> bool: ...

    def release(self, name: str) -> None: ...

    def keeps(self, name: str) -> bool: ...

    def lives(self, owner: str) -> bool: ...

    def owners(self) -> list[str]: ...


class Manifest:
    """The entries of the manifests in a folder; once it is open, entries can be added.

    Attributes:
        path: the file that is written to.
        entries: the last entry of each video, by name.
        files: the last entry about each feature file, by its path in the folder.
        failed_elsewhere: videos that other processes could not extract since this object was made.
    """

    def __init__(self, folder: StrPath):
        self.folder, self.path = Path(folder), Path(folder) / NAME
        self.entries, self.files, self.failed_elsewhere = {}, {}, set()
        self._file: int | None = None
        self._leases: Leases | None = None
        self._read_to = {}  # of each file: (inode, bytes that were read)
        self._note(self._unread(_paths(folder)))
        self.failed_elsewhere.clear()

    def open(self, leases: Leases | None = None) -> None:
        """Make the folder and the file where they are missing, and close off a torn line.

        Args:
            leases: open `Leases` of the folder; without them no other process may write here.
        """
        self._leases = leases
        self.folder.mkdir(parents=True, exist_ok=True)
        if leases is not None and not leases.take(NAME):
            self.path = self._own_path()
        self._file = _appended_to(self.path)
        if leases is not None and self.path.name == NAME:
            self._gather()

    def append(
        self,
        video: str,
        status: str,
        *,
        reason: str | None = None,
        frames: int | None = None,
        seconds: float | None = None,
        **more: Any,
    ) -> None:
        """Record the status of one video.

        Args:
            video: name relative to the folder of videos.
            status: "ok", "failed" or "skipped"; "writing" while a pickle is on its way.
            reason: why, unless ok.
            frames: frames of the whole video.
            seconds: spent on it.
            more: whatever else belongs to it: the "file" of its features, its "sha256", and as it was "written" (bytes
                and time in nanoseconds).
        """
        known = self.entries.get(video), self.files.get(more.get("file"))
        now = max(time.time(), *(when(entry) + _TICK for entry in known if entry is not None), 0.0)
        entry = {
            "video": video,
            "status": status,
            "reason": reason,
            "frames": frames,
            "seconds": seconds,
            "time": round(now, 6),
            **more,
        }
        self._know(entry)
        self._write([entry], sync=status in _SYNCED and self._leases is not None)

    def _write(self, entries, sync):
        """Append entries to this process's file; to a new one if another process took this one for dead."""
        assert self._file is not None, "the manifest is not open"
        content = "".join(f"{json.dumps(entry)}\n" for entry in entries).encode()
        if self._leases is not None and self.path.name == NAME and not self._leases.keeps(NAME):
            self._reopen(self._own_path())
        for tries in range(1, _TRIES + 1):
            with naming(self.path):
                try:
                    os.write(self._file, content)
                    if sync:
                        os.fsync(self._file)
                    # Whoever removes a file reads it again afterwards: what is in it while it is there is not lost.
                    if self._leases is None or os.fstat(self._file).st_nlink or self.path.exists():
                        return
                except OSError as error:
                    if error.errno != errno.ESTALE or tries == _TRIES:
                        raise
            self._reopen(self.path)

    def _own_path(self):
        assert self._leases is not None
        return self.folder / f"{_BEFORE}{self._leases.owner}{_AFTER}"

    def _reopen(self, path):
        assert self._file is not None
        old, self.path = self._file, path
        self._file = _appended_to(path)
        try:
            os.close(old)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise

    def look_again(self, *, for_new: bool = False) -> bool:
        """Take in what others have written since; whether there was anything.

        Args:
            for_new: also from processes that came and went meanwhile, which takes a listing of the folder.
        """
        paths = {*self._read_to, self.folder / NAME}
        if self._leases is not None:
            paths |= {self.folder / f"{_BEFORE}{owner}{_AFTER}" for owner in self._leases.owners()}
        if for_new:
            paths |= set(_paths(self.folder))
        if self._file is not None:
            paths.discard(self.path)
        return self._note(self._unread(sorted(paths, key=_is_common)))

    def close(self) -> None:
        if self._file is None:
            return
        try:
            if self._leases is not None and self._is_ours():
                if self.path.name != NAME:
                    self._reopen(self.folder / NAME)
                self._gather()
                if self._leases.keeps(NAME):
                    self._leases.release(NAME)
        finally:
            file, self._file = self._file, None
            os.close(file)

    def _is_ours(self):
        """Whether ``manifest.jsonl`` is this process's, now or once another that ends as well has given it back."""
        assert self._leases is not None
        end = time.monotonic() + _PATIENCE
        while not (self._leases.keeps(NAME) or self._leases.take(NAME)):
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        return True

    def _gather(self):
        """Move the lines of processes that write no more to ``manifest.jsonl``, which is this one's."""
        for path in [path for path in _paths(self.folder) if path.name != NAME and not self._is_written(path)]:
            try:
                with naming(path), open(path, "rb") as file:
                    content = file.read()
                    end = content.rfind(b"\n") + 1
                    self._adopt(_parsed(content[:end]))
                    path.unlink(missing_ok=True)
                    # Its process may be only slow, and have written meanwhile.
                    self._adopt(_parsed(content[end:] + file.read()))
            except FileNotFoundError:  # another process was faster
                continue

    def _adopt(self, entries):
        """Write what another process wrote."""
        if entries:
            self._note(entries)
            self._write(entries, sync=True)

    def _is_written(self, path):
        assert self._leases is not None
        owner = path.name.removeprefix(_BEFORE).removesuffix(_AFTER)
        return owner != self._leases.owner and self._leases.lives(owner)

    def _unread(self, paths) -> list[dict]:
        """Entries of these files that were not read yet."""
        found = []
        for path in paths:
            entries, self._read_to[path] = _entries(path, self._read_to.get(path, (None, 0)))
            found += entries
        return found

    def _note(self, entries):
        for entry in entries:
            known = self.entries.get(entry["video"])
            self._know(entry)
            if entry == known or self.entries[entry["video"]] is not entry:  # moved to another file; an older one
                continue
            (self.failed_elsewhere.add if entry.get("status") == "failed" else self.failed_elsewhere.discard)(
                entry["video"]
            )
        return bool(entries)

    def _know(self, entry):
        """Take in an entry, unless a newer one is known; of two that do not differ in time the later one."""
        for known, name in ((self.entries, entry["video"]), (self.files, entry.get("file"))):
            if isinstance(name, str) and not (name in known and when(known[name]) > when(entry)):
                known[name] = entry


def read_manifest(folder: StrPath) -> dict[str, dict[str, Any]]:
    """The last entry of each video, by name; {} where there is no manifest. Torn lines are skipped."""
    return Manifest(folder).entries


def read_files(folder: StrPath) -> dict[str, dict[str, Any]]:
    """The last entry about each feature file, by its path in the folder; {} where there is no manifest."""
    return Manifest(folder).files


def _paths(folder):
    """The manifests in a folder, the common one last: it gets the lines of another before that one is removed. It may
    not be there, or be made right now."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    own = sorted(name for name in names if name.startswith(_BEFORE) and name.endswith(_AFTER))
    return [Path(folder, name) for name in [*own, NAME]]


def _is_common(path):
    return path.name == NAME


def _appended_to(path):
    """A manifest, open to append whole lines to."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with naming(path):
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
    return file


def _entries(path, read_to):
    """(entries of a manifest that were not read yet, up to where it is read now), each (inode, bytes)."""
    with naming(path):
        try:
            with open(path, "rb") as file:
                there, (inode, start) = os.fstat(file.fileno()), read_to
                if inode != there.st_ino or start > there.st_size:  # another file of that name
                    start = 0
                file.seek(start)
                content = file.read()
        except FileNotFoundError:  # its lines were moved to the common one
            return [], (None, 0)
    return _parsed(content), (there.st_ino, start + content.rfind(b"\n") + 1)


def _parsed(content) -> list[dict]:
    """The entries in a part of a manifest."""
    lines = [line for line in content.splitlines() if line]
    try:  # together, in half the time
        entries = json.loads(b"[%s]" % b",".join(lines))
    except ValueError:  # one is torn by a crash, or still being written
        entries = filter(None, map(_entry, lines))
    return [entry for entry in entries if isinstance(entry, dict) and isinstance(entry.get("video"), str)]


def _entry(line):
    try:
        return json.loads(line)
    except ValueError:
        return None


def when(entry: Mapping[str, Any]) -> float:
    """When an entry was made, in the time of day; those of older versions do not say, and come first."""
    made = entry.get("time")
    return made if isinstance(made, int | float) else 0.0
