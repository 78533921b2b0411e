"""Files and folders that are whole or absent, JSON objects that may be absent, files that are not what they seem."""

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from fastvid.dist import processes

StrPath = str | os.PathLike[str]

# Endings of recorded video, of which FFmpeg's containers are known (`fastvid.video.decode.container`).
VIDEO_SUFFIXES = (
    ".mp4",
    ".mkv",
    ".webm",
    ".avi",
    ".mov",
    ".m4v",
    ".mpg",
    ".mpeg",
    ".flv",
    ".wmv",
    ".3gp",
    ".gif",
    ".ts",
    ".mts",
    ".m2ts",
    ".ogv",
    ".vob",
    ".asf",
    ".mxf",
    ".divx",
    ".f4v",
    ".y4m",
    ".ivf",
    ".3g2",
    ".wtv",
    ".nut",
    ".rm",
    ".rmvb",
    ".m1v",
    ".m2v",
    ".mpe",
    ".qt",
    ".dv",
    ".h264",
    ".264",
    ".h265",
    ".265",
    ".hevc",
)
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
MEDIA_SUFFIXES = VIDEO_SUFFIXES + IMAGE_SUFFIXES

# Errors of writing that every later file would meet as well.
NOTHING_MORE_FITS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a file system that has no hard ones
LONGEST_NAME = 255  # bytes, on the file systems of Linux
_LEFT_OVER = re.compile(r"\.(?:([0-9a-f]{8})-(\d+)-)?[0-9a-f]{8,16}\.tmp")
_DAY = 86400.0


@contextmanager
def atomic_file(path: StrPath) -> Iterator[BinaryIO]:
    """A binary file to write to, that takes the place of `path` only once it is whole and on the disk.

    It is written under a temporary name in the same folder, synced and renamed; after an error or a crash `path` is
    what it was before. A link at `path` stays, and the file that it leads to is replaced. What is no regular file
    (a pipe, /dev/stdout) has nothing to replace: it gets all of a temporary file, or after an error nothing.

    Raises:
        ValueError: the folder of `path` does not exist.
    """
    if Path(path).exists() and not Path(path).is_file():
        # Opened at once: who reads a pipe sees its end after an error as well.
        with open(path, "wb") as file, tempfile.TemporaryFile(prefix="fastvid-") as whole:
            yield whole
            whole.seek(0)
            shutil.copyfileobj(whole, file)
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


@contextmanager
def atomic_path(path: StrPath) -> Iterator[Path]:
    """A path to write a file at, that takes the place of `path` only once it is whole and on the disk.

    For libraries that open files by themselves: it lies in a folder of its own beside `path`, with whatever they leave
    there. The file gets its folder's permissions.
    """
    path = Path(path)
    folder = path.with_name(f".{path.name}.tmp")
    temporary = folder / path.name
    try:
        with naming(path):
            _remove(folder)
            folder.mkdir()
            yield temporary
            temporary.chmod(path.parent.stat().st_mode & 0o666)
            _sync(temporary)
            os.replace(temporary, path)
    finally:
        _remove(folder)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, whose parents are made, that takes the place of the folder `path` only once it is whole."""
    temporary, replaced = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.replaced")
    _remove(temporary)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.iterdir():
            with naming(file):
                _sync(file)
        if path.exists():
            _remove(replaced)
            path.rename(replaced)
        temporary.rename(path)
        _remove(replaced)
    finally:
        _remove(temporary)


def _sync(path):
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _remove(path):
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: object) -> None:
    """Write one of a model folder's JSON files, as people read them."""
    with naming(path):
        path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def name_of(stem: str, suffix: str) -> str:
    """`stem` + `suffix`, with a stem that leaves no room for the suffix cut, and told from others by its digest."""
    content = stem.encode(errors="surrogatepass")  # a record's name may be one that no file can have
    if len(content) + len(suffix) <= LONGEST_NAME:
        return stem + suffix
    mark = f"~{hashlib.sha256(content).hexdigest()[:12]}"
    return content[: LONGEST_NAME - len(mark) - len(suffix)].decode(errors="ignore") + mark + suffix


@contextmanager
def naming(path: StrPath) -> Iterator[None]:
    """A block in which `path` is written: its OSErrors, which say a file's name only where it was opened, name it."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror or os.strerror(error.errno), str(path)) from error


def remove_left_over(folder: StrPath) -> None:
    """Remove temporary files of `atomic_file` below a folder: of dead processes; of other machines those a day old."""
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


def read_json_object(path: Path) -> dict[str, Any]:
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


_PACKED = {
    b"\x1f\x8b": ("gzip", ".gz", "gunzip"),
    b"BZh": ("bzip2", ".bz2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", ".xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", ".zst", "unzstd"),
}


def wrong_content(path: StrPath) -> str | None:
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
        return (
            "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull` in its folder, or download it "
            "again with `hf download`"
        )
    for beginning, (packer, ending, command) in _PACKED.items():
        if head.startswith(beginning):
            name = Path(path).name
            naming = "" if name.endswith(ending) else f"name it {shown(name)}{ending} and "  # gunzip wants its ending
            return f"is packed with {packer}; {naming}unpack it with `{command}`"
    if head.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page (HTML), not the file itself; download it again"
    return None if head else "is empty; download or write it again"


def shown(value: object) -> str:
    """A name or text from the outside as messages show it: quotation marks only where it needs to be escaped."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def is_url(value: StrPath) -> bool:
    """Whether an address was given where a path is wanted."""
    return "://" in os.fspath(value)


def model_folder(path: StrPath) -> Path:
    """The folder that a model's path means: itself, or of a folder in the hub's cache its one snapshot; of several
    the one that the hub calls main.

    Raises:
        ValueError: a URL; a file; a LoRA adapter; a folder that training wrote, which holds no whole model, with what
            to give instead; a cache folder of several snapshots. Whatever else is wrong with a folder its readers say.
    """
    if is_url(path):
        raise ValueError(
            f"{shown(path)} is a URL; --model_name_or_path takes a folder on this machine "
            "(`hf download NAME --local-dir FOLDER` makes one)"
        )
    folder = Path(path)
    if folder.is_file():
        raise ValueError(
            f"{shown(folder)} is a file, where a model's folder is wanted (`hf download NAME --local-dir "
            "FOLDER` makes one)"
        )
    if (folder / "adapter_config.json").is_file() and not [
        *folder.glob("model*.safetensors"),
        *folder.glob("pytorch_model*.bin"),
    ]:
        raise ValueError(
            f"{shown(folder)} is a LoRA adapter: give the model that it was trained on, and {shown(folder)} as "
            "--adapter (chat, evaluate, serve) or --lora_weights (train)"
        )
    if (folder / "config.json").exists() or not folder.is_dir():
        return folder
    if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
        folder = folder / "snapshots"
    if folder.name == "snapshots" and folder.absolute().parent.name.startswith("models--"):
        return _snapshot(folder)
    if (folder / "model" / "config.json").is_file():
        raise ValueError(f"{folder} is an --output_dir; its model is {folder / 'model'}: give that")
    checkpoints = _checkpoints(folder)
    if (folder / "mm_projector.bin").is_file() or (folder / "mm_projector.safetensors").is_file():
        start = next(filter(None, map(_start, checkpoints)), "the model that training started from")
        raise ValueError(
            f"{folder} is an --output_dir of adapter training, which holds a projector and no model: give "
            f"{start}, and {folder} as --projector (chat) or --pretrain_mm_mlp_adapter (train)"
        )
    if checkpoints or _is_checkpoint(folder):
        what = "an --output_dir of checkpoints" if checkpoints else "a checkpoint"
        raise ValueError(
            f"{folder} is {what}, not a whole model; export it (fastvid export --checkpoint "
            f"{folder} --format llama --output FOLDER) and give that folder"
        )
    return folder


def _snapshot(folder):
    """The snapshot in a ``models--*/snapshots`` folder of the hub's cache."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    try:
        main = folder / (folder.parent / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = None
    if main in found:
        return main
    if not found:
        raise ValueError(f"{folder} is empty: download the model again (`hf download NAME`)")
    raise ValueError(f"{folder} holds {len(found)} snapshots of the model: give one of them, such as {found[0]}")


def _is_checkpoint(folder):
    return (folder / "state.json").is_file() and (folder / "checksums.json").is_file()


def _checkpoints(folder):
    """Checkpoint folders of an --output_dir, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and _is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def _start(checkpoint):
    """The model folder that a checkpoint's training started from, as its state says; None if it does not."""
    try:
        start = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["config"]["model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shown(start) if isinstance(start, str) else None
