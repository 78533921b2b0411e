"""The file that a GPU check writes: JSON lines, each on the disk before the next thing begins."""

import json
import os
from pathlib import Path

NAME = "results.jsonl"


def append(folder, row):
    """Add a row: one write, synced, so that processes may share the file and none of them can take a row along."""
    line = (json.dumps(row) + "\n").encode()
    file = os.open(Path(folder) / NAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(file, line)
        os.fsync(file)
    finally:
        os.close(file)


def read(path):
    """The rows of a file, or of the file in a folder; a line that a crash cut short is left out."""
    path = Path(path)
    path = path / NAME if path.is_dir() else path
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
