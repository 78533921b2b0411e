"""The manifest of an extraction: one JSON line per video, with what became of it.

A line about a feature file ("file") says what it was made with, and its "sha256". It vouches for that very file only:
of two formats in one folder each has its own lines. A pickle, which has no header, gets a line ahead of the file
("writing"), so that one whose extraction is killed is known as well.

One process at a time writes ``manifest.jsonl``: the one that has its lease. Others that write at the same time have
files of their own, ``manifest-<owner>.jsonl``, for what several machines append to one file on a network file system
may be lost. Readers take all of them, and the newest entry wins. Whoever has ``manifest.jsonl`` adds the lines of
processes that are done or dead, and removes their files.

Lines are appended by single writes. A line that a crash has torn is skipped when reading and closed off when writing.
"""

import json
import os
import time
from pathlib import Path

from fastvid.files import naming

NAME = "manifest.jsonl"
_BEFORE, _AFTER = "manifest-", ".jsonl"  # the owner's name between them
_SYNCED = ("writing", "failed")  # another machine has to know of these before it may take the video


class Manifest:
    """What the manifests in a folder say; once it is opened, more can be said.

    Attributes:
        path: the file that is written to.
        entries: the last entry of each video, by name.
        files: the last entry about each feature file, by its path in the folder.
        failed_elsewhere: videos that other processes could not extract since this object was made.
    """

    def __init__(self, folder):
        self.folder, self.path = Path(folder), Path(folder) / NAME
        self.entries, self.files, self.failed_elsewhere = {}, {}, set()
        self._file = self._leases = None
        self._read_to = {}  # bytes of each file that were read
        self._note(self._unread(_paths(folder)))
        self.failed_elsewhere.clear()

    def open(self, leases=None):
        """Make the folder and the file where they are missing, and close off a torn line.

        Args:
            leases: open `Leases` of the folder; without them no other process may write here.
        """
        self._leases = leases
        self.folder.mkdir(parents=True, exist_ok=True)
        if leases is not None and not leases.take(NAME):
            self.path = self.folder / f"{_BEFORE}{leases.owner}{_AFTER}"
        self._file = _appended_to(self.path)
        if leases is not None and self.path.name == NAME:
            self._gather()

    def append(self, video, status, *, reason=None, frames=None, seconds=None, **more):
        """Record what became of one video.

        Args:
            video: name relative to the folder of videos.
            status: "ok", "failed" or "skipped"; "writing" while a pickle is on its way.
            reason: why, unless ok.
            frames: frames of the whole video.
            seconds: spent on it.
            more: whatever else belongs to it: the "file" that it became, its "sha256", and as it was "written" (bytes
                and time in nanoseconds).
        """
        entry = {"video": video, "status": status, "reason": reason, "frames": frames, "seconds": seconds,
                 "time": round(time.time(), 6), **more}
        self._know(entry)
        with naming(self.path):
            os.write(self._file, json.dumps(entry).encode() + b"\n")
            if status in _SYNCED and self._leases is not None:
                os.fsync(self._file)

    def look_again(self, *, for_new=False) -> bool:
        """Take in what others have written since; whether there was anything.

        Args:
            for_new: also from processes that came and went meanwhile, which takes a listing of the folder.
        """
        paths = set(self._read_to)
        if self._leases is not None:
            paths |= {self.folder / f"{_BEFORE}{owner}{_AFTER}" for owner in self._leases.owners()}
        if for_new:
            paths |= set(_paths(self.folder))
        if self._file is not None:
            paths.discard(self.path)
        return self._note(self._unread(paths))

    def close(self):
        if self._file is None:
            return
        os.close(self._file)
        self._file = None
        if self._leases is not None and (self.path.name == NAME or self._leases.take(NAME)):
            self.path = self.folder / NAME
            self._file = _appended_to(self.path)
            self._gather()
            os.close(self._file)
            self._file = None
            self._leases.release(NAME)

    def _gather(self):
        """Move the lines of processes that write no more to ``manifest.jsonl``, which is this one's."""
        paths = [path for path in _paths(self.folder) if path.name != NAME and not self._is_written(path)]
        self._note(self._unread(paths))
        entries = sorted((entry for path in paths for entry in _entries(path)[0]), key=_when)
        with naming(self.path):
            os.write(self._file, "".join(f"{json.dumps(entry)}\n" for entry in entries).encode())
            if paths:
                os.fsync(self._file)
        for path in paths:
            path.unlink(missing_ok=True)

    def _is_written(self, path):
        owner = path.name.removeprefix(_BEFORE).removesuffix(_AFTER)
        return owner != self._leases.owner and self._leases.lives(owner)

    def _unread(self, paths) -> list[dict]:
        """Entries of these files that were not read yet, the oldest first."""
        found = []
        for path in paths:
            entries, self._read_to[path] = _entries(path, self._read_to.get(path, 0))
            found += entries
        return sorted(found, key=_when) if len(self._read_to) > 1 else found

    def _note(self, entries):
        for entry in entries:
            if entry == self.entries.get(entry["video"]):  # moved to another file
                continue
            self._know(entry)
            (self.failed_elsewhere.add if entry.get("status") == "failed" else self.failed_elsewhere.discard)(
                entry["video"])
        return bool(entries)

    def _know(self, entry):
        self.entries[entry["video"]] = entry
        if isinstance(entry.get("file"), str):
            self.files[entry["file"]] = entry


def read_manifest(folder) -> dict[str, dict]:
    """The last entry of each video, by name; {} where there is no manifest. Torn lines are skipped."""
    return Manifest(folder).entries


def read_files(folder) -> dict[str, dict]:
    """The last entry about each feature file, by its path in the folder; {} where there is no manifest."""
    return Manifest(folder).files


def _paths(folder):
    """The manifests in a folder, the common one first."""
    names = os.listdir(folder) if os.path.isdir(folder) else ()
    own = sorted(name for name in names if name.startswith(_BEFORE) and name.endswith(_AFTER))
    return [Path(folder, name) for name in [NAME, *own] if name in names]


def _appended_to(path):
    """A manifest, open to append whole lines to."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
    with naming(path):
        size = os.fstat(file).st_size
        if size and os.pread(file, 1, size - 1) != b"\n":
            os.write(file, b"\n")
    return file


def _entries(path, start=0):
    """(entries of a manifest from a byte on, up to which byte they are whole lines)."""
    with naming(path):
        try:
            with open(path, "rb") as file:
                file.seek(start)
                content = file.read()
        except FileNotFoundError:  # its lines were moved to the common one
            return [], start
    entries = []
    for line in content.splitlines():
        try:
            entry = json.loads(line)
            if isinstance(entry["video"], str):
                entries.append(entry)
        except (ValueError, KeyError, TypeError):  # torn by a crash, or still being written
            continue
    return entries, start + content.rfind(b"\n") + 1


def _when(entry):
    """When an entry was made; entries of older versions do not say, and come first."""
    made = entry.get("time")
    return made if isinstance(made, int | float) else 0.0
