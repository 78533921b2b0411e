"""Files that grow by whole lines of JSON, so that a killed run goes on: what is written stays written.

Ranks write to a file each, and read those of all. A line that a crash has torn is the last of its file: nobody reads
it, and whoever writes on removes it.
"""

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from fastvid.files import StrPath, naming, shown


def read_lines(folder: StrPath, name: str, check: Callable[[dict], object] = lambda record: None) -> list[dict]:
    """The records of every ``name*.jsonl`` in a folder, file by file.

    Args:
        check: raises ValueError, KeyError or TypeError for a record of which no use can be made.

    Raises:
        ValueError: a line that is no object, or such a record, and is not the last of its file.
    """
    records = []
    for path in sorted(Path(folder).glob(f"{name}*.jsonl")):
        *lines, _torn = path.read_bytes().split(b"\n")
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                if not isinstance(record, dict):
                    raise ValueError("it is no object")
                check(record)
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                why = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"{shown(path)}: line {number} is damaged ({why}); remove it, and what it held is made again"
                ) from error
            records.append(record)
    return records


class Lines:
    """A file that one process at a time appends to.

    Args:
        path: the file; made if it is not there.

    Raises:
        ValueError: another process appends to it.
    """

    def __init__(self, path: StrPath):
        self.path = Path(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise ValueError(
                f"{shown(path)} is written by another process ({error.strerror}); wait until that has ended, or write "
                "to another folder"
            ) from error
        content = self.path.read_bytes()
        os.ftruncate(self._file, content.rfind(b"\n") + 1)  # a line that a crash has torn

    def append(self, record: dict) -> None:
        """Write a record as one line.

        Raises:
            OSError: naming the file: no room is left.
        """
        line = json.dumps(record, ensure_ascii=True).encode("ascii") + b"\n"
        end = os.fstat(self._file).st_size
        with naming(self.path):
            try:
                while line:
                    line = line[os.write(self._file, line) :]
            except OSError:
                os.ftruncate(self._file, end)  # what is written behind a part of a line would be lost with it
                raise

    def close(self) -> None:
        """Bring what was written to the disk, and let others write."""
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> "Lines":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
