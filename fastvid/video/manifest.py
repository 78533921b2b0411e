"""The manifest of an extraction: one JSON line per video, with what became of it.

A line about a feature file ("file") says what it was made with, and its "sha256". It vouches for that very file only:
of two formats in one folder each has its own lines. A pickle, which has no header, gets a line ahead of the file
("writing"), so that one whose extraction is killed is known as well.

Lines are appended by single writes to a file opened with O_APPEND, so the processes of one machine share it, and a
line that a crash has torn is skipped when reading and closed off when writing. A later line about a video replaces an
earlier one.
"""

import json
import os
from pathlib import Path

from fastvid.files import naming

NAME = "manifest.jsonl"


class Manifest:
    """What ``manifest.jsonl`` in a folder says; once it is opened, more can be said.

    Attributes:
        path: the file.
        entries: the last entry of each video, by name.
        files: the last entry about each feature file, by its path in the folder.
    """

    def __init__(self, folder):
        self.path, self._file = Path(folder) / NAME, None
        self.entries, self.files = {}, {}
        for entry in _entries(folder):
            self.entries[entry["video"]] = entry
            if isinstance(entry.get("file"), str):
                self.files[entry["file"]] = entry

    def open(self):
        """Make the folder and the file where they are missing, and close off a torn line."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with naming(self.path):
            size = os.fstat(self._file).st_size
            if size and os.pread(self._file, 1, size - 1) != b"\n":
                os.write(self._file, b"\n")

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
        entry = {"video": video, "status": status, "reason": reason, "frames": frames, "seconds": seconds, **more}
        self.entries[video] = entry
        if "file" in entry:
            self.files[entry["file"]] = entry
        with naming(self.path):
            os.write(self._file, json.dumps(entry).encode() + b"\n")

    def close(self):
        if self._file is not None:
            os.close(self._file)
            self._file = None


def read_manifest(folder) -> dict[str, dict]:
    """The last entry of each video, by name; {} where there is no manifest. Torn lines are skipped."""
    return {entry["video"]: entry for entry in _entries(folder)}


def read_files(folder) -> dict[str, dict]:
    """The last entry about each feature file, by its path in the folder; {} where there is no manifest."""
    return {entry["file"]: entry for entry in _entries(folder) if isinstance(entry.get("file"), str)}


def _entries(folder):
    path = Path(folder) / NAME
    with naming(path):
        lines = path.read_bytes().splitlines() if path.exists() else ()
    for line in lines:
        try:
            entry = json.loads(line)
            if isinstance(entry["video"], str):
                yield entry
        except (ValueError, KeyError, TypeError):  # torn by a crash
            continue
