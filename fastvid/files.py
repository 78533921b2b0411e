"""Files that are whole or absent, JSON objects that are or are not there, and files that are not what they seem."""

import errno
import hashlib
import json
import os
import re
import secrets
import stat
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from fastvid import processes

# Endings of recorded video, of which FFmpeg's containers are known (`fastvid.video.decode.container`).
VIDEO_SUFFIXES = (
    ".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".gif", ".ts", ".mts",
    ".m2ts", ".ogv", ".vob", ".asf", ".mxf", ".divx", ".f4v", ".y4m", ".ivf", ".3g2", ".wtv", ".nut", ".rm", ".rmvb",
    ".m1v", ".m2v", ".mpe", ".qt", ".dv", ".h264", ".264", ".h265", ".265", ".hevc")

# Errors of writing that every later file would meet as well.
NOTHING_MORE_FITS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LONGEST_NAME = 255  # bytes, on the file systems of Linux
_LEFT_OVER = re.compile(r"\.(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{8,16}\.tmp")
_DAY = 86400.0


@contextmanager
def atomic_file(path):
    """A binary file to write to, that takes the place of `path` only once it is whole and on the disk.

    It is written under a temporary name in the same folder, synced and renamed; after an error or a crash `path` is
    what it was before. A link at `path` stays, and the file that it leads to is replaced. What is no regular file
    (a pipe, /dev/stdout) has nothing to replace and is written to directly.

    Raises:
        ValueError: the folder of `path` does not exist.
    """
    if Path(path).exists() and not Path(path).is_file():
        with open(path, "wb") as file:
            yield file
        return
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise ValueError(f"{path}: the folder {target.parent} does not exist; create it first")
    # Short, for the target's name may be as long as allowed; says whose it is (`remove_left_over`).
    temporary = target.with_name(f".{processes.machine()}-{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        with naming(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def name_of(stem, suffix) -> str:
    """`stem` + `suffix`, with a stem that leaves no room for the suffix cut, and told from others by its digest."""
    content = stem.encode(errors="surrogatepass")  # a record's name may be one that no file can have
    if len(content) + len(suffix) <= LONGEST_NAME:
        return stem + suffix
    mark = f"~{hashlib.sha256(content).hexdigest()[:12]}"
    return content[:LONGEST_NAME - len(mark) - len(suffix)].decode(errors="ignore") + mark + suffix


@contextmanager
def naming(path):
    """A block in which `path` is written: its OSErrors, which say a file's name only where it was opened, name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def remove_left_over(folder):
    """Remove temporary files of `atomic_file` below a folder whose process is dead; of other machines those a day old.
    """
    here = processes.machine()
    for parent, _, names in os.walk(folder):
        for name in names:
            match = _LEFT_OVER.fullmatch(name)
            if match is None:
                continue
            path = Path(parent, name)
            with suppress(OSError):  # another process was faster, or may and this one may not
                dead = match[1] == here and processes.started(int(match[2])) is None
                if dead or time.time() - path.lstat().st_mtime > _DAY:
                    path.unlink()


def read_json_object(path):
    """The dict in a JSON file of a model's folder; empty where there is no such file.

    Raises:
        ValueError: naming the file, if it holds anything else.
    """
    if not path.is_file():
        return {}
    if fault := wrong_content(path):
        raise ValueError(f"{path} {fault}")
    try:
        return dict(json.loads(path.read_text(encoding="utf-8-sig")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is no JSON object ({error}); copy the model's folder again") from error


def wrong_content(path) -> str | None:
    """Why a file cannot hold what its name says, as far as its first bytes tell, with the remedy; None if it may.

    A part of a sentence that begins after the file's name. Opens regular files only: a pipe would wait for ever.
    """
    try:
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            return "is a folder, not a file" if stat.S_ISDIR(mode) else "is no regular file (a pipe or a device)"
        with open(path, "rb") as file:
            head = file.read(256)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        return ("is a git-lfs pointer, not the file itself; fetch it with `git lfs pull` in its folder, or download it "
                "again with `hf download`")
    if head.startswith(b"\x1f\x8b"):
        name = Path(path).name
        naming = "" if name.endswith(".gz") else f"name it {shown(name)}.gz and "  # gunzip takes no other ending
        return f"is packed with gzip; {naming}unpack it with `gunzip`"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), not the file itself; download it again"
    return None if head else "is empty; download or write it again"


def shown(value) -> str:
    """A name or text from the outside as messages show it: quotation marks only where it needs to be escaped."""
    text = str(value)
    return text if text.isprintable() else ascii(text)
