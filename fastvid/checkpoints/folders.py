"""The checkpoints that lie in a folder: which are fastvid's, and whether they are as they were written.

Nothing here changes a folder: a training run may be writing to it.
"""

import contextlib
import hashlib
import json
import logging
import os
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypedDict

from safetensors import SafetensorError, safe_open
from torch.distributed import ProcessGroup

from fastvid.dist.collective import gather, rank_and_size, together
from fastvid.files import StrPath, naming, shown, wrong_content

log = logging.getLogger("fastvid")

# By which a folder is known as ours, be it damaged. Files of others begin with rank 1.
_OURS = re.compile(r"checksums\.json|state\.json|(model|optimizer)-00000-of-\d{5}\.safetensors")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}\.safetensors")


class FileEntry(TypedDict):
    """What checksums.json says of a file."""

    bytes: int
    sha256: str


def newest_valid(output_dir: StrPath, *, process_group: ProcessGroup | None = None, alone: bool = False) -> Path | None:
    """The checkpoint of the highest number whose files are all as they were written; None where there are none.

    Under torch.distributed every rank calls it: each verifies a part of the files, and all get the same answer. Rank 0
    tells of damaged checkpoints that are passed over, and of folders of that name that fastvid did not write.

    Args:
        output_dir: may be missing.
        process_group: of all ranks, for messages between them.
        alone: this process alone looks, whatever its ranks.

    Raises:
        ValueError: on every rank; there are checkpoints, and none of them is valid. Names each, and why.
        OSError: on every rank, when rank 0 cannot read the folder.
    """
    output_dir = Path(output_dir)
    candidates: list[int] = []
    foreign: list[int] = []
    rank, size = (0, 1) if alone else rank_and_size(process_group)
    with contextlib.nullcontext() if alone else together(process_group):
        if rank == 0:
            candidates = sorted(steps(output_dir), reverse=True)
            foreign = [step for step in candidates if is_foreign(output_dir / f"checkpoint-{step}")]
    if not alone:
        candidates, foreign = gather((candidates, foreign), process_group)[0]
    if foreign:
        log.warning(
            "%s in %s: not written by fastvid, left alone",
            ", ".join(f"checkpoint-{step}" for step in foreign),
            output_dir,
        )
    faults: dict[Path, str] = {}
    for step in (step for step in candidates if step not in foreign):
        path = output_dir / f"checkpoint-{step}"
        found = [fault(path, rank, size)] if alone else gather(fault(path, rank, size), process_group)
        if not any(found):
            for damaged, why in faults.items():
                log.warning("%s is passed over: %s", damaged, why)
            return path
        faults[path] = next(filter(None, found))
    if faults:
        raise ValueError(
            "; ".join(f"{path} is damaged: {why}" for path, why in faults.items())
            + f". No other checkpoint in {output_dir} is valid"
        )
    return None


def named(path: StrPath) -> Path | None:
    """The checkpoint folder that a user names, verified, or the newest valid one in it; None if it is neither.

    Each process verifies for itself.

    Raises:
        ValueError: it is damaged; names the file, and the remedy.
    """
    path = Path(path)
    if not path.is_dir():
        return None
    if is_foreign(path) or not os.listdir(path):
        try:
            return newest_valid(path, alone=True)
        except ValueError as error:
            raise ValueError(f"{error}: restore one of them") from error
    if why := fault(path):
        raise ValueError(f"{path} is damaged: {why}; restore this checkpoint from a copy, or name another one")
    return path


def steps(output_dir: StrPath) -> list[int]:
    """Numbers of all that is called checkpoint-N, whatever it is."""
    names = os.listdir(output_dir) if Path(output_dir).is_dir() else []
    return [int(match[1]) for match in map(re.compile(r"checkpoint-(0|[1-9]\d*)").fullmatch, names) if match]


def is_foreign(path: StrPath) -> bool:
    """Whether fastvid did not write this: it is a file, or a folder as Hugging Face's Trainer leaves them."""
    try:
        names = os.listdir(path)
    except NotADirectoryError:
        return True
    except OSError:  # not readable, or a link that leads nowhere
        return False
    return bool(names) and not any(map(_OURS.fullmatch, names))


def is_whole(path: StrPath) -> bool:
    """Whether this is a checkpoint of ours and no file of it is missing or cut short. Contents are not looked at."""
    try:
        _check_files(Path(path), read_checksums(path))
    except (OSError, ValueError):
        return False
    return True


def fault(folder: StrPath, rank: int = 0, world_size: int = 1) -> str | None:
    """Why a checkpoint is not valid, or None. Of `world_size` ranks that share the hashing this one is `rank`."""
    folder = Path(folder)
    try:
        if not folder.is_dir():
            return "is a link that leads nowhere" if folder.is_symlink() else "is no folder"
        expected = read_checksums(folder)
        _check_files(folder, expected)
        share = sorted(expected)[rank::world_size]
        with ThreadPoolExecutor(4) as pool:
            for name, measured in zip(share, pool.map(lambda name: measure(folder / name), share)):
                if measured != expected[name]:
                    return (
                        f"the sha256 of {shown(name)} is not the one that was written (checksums.json lies beside it)"
                    )
        _check_marks(folder, expected)
    except (OSError, ValueError) as error:
        return str(error)
    return None


def measure(path: StrPath) -> FileEntry:
    """{"bytes", "sha256"} of a file."""
    with naming(path), open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_checksums(folder: StrPath) -> dict[str, FileEntry]:
    """{file name: {"bytes", "sha256"}} of a checkpoint folder. The names come from a file: look them up, never join.

    Raises:
        ValueError: names the file, which is missing or damaged.
    """
    path = Path(folder) / "checksums.json"
    if not path.exists():
        raise ValueError(f"{path} is missing: not a checkpoint, or not a complete one")
    if wrong := wrong_content(path):
        raise ValueError(f"{path} {wrong}")
    try:
        with naming(path):
            files = json.loads(path.read_bytes())["files"]
        return {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def _check_files(folder, expected):
    """Names, kinds and sizes, before anything is opened."""
    here = set(os.listdir(folder))
    if "state.json" not in expected:
        raise ValueError(f"{folder / 'checksums.json'} does not list state.json")
    for name, entry in expected.items():
        if name not in here:
            raise ValueError(f"{shown(name)} is missing")
        found = os.stat(folder / name)
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{shown(name)} is no regular file")
        if found.st_size != entry["bytes"]:
            raise ValueError(f"{shown(name)} has {found.st_size} bytes, {entry['bytes']} were written")


def _check_marks(folder, expected):
    """Whether all files are of one run and step. Those of versions that did not mark them are taken as they are."""
    with naming(folder / "state.json"):
        state = json.loads((folder / "state.json").read_bytes())
    run = state.get("run") if isinstance(state, dict) else None
    for name in expected:
        if _SHARD.fullmatch(name):
            try:
                with safe_open(folder / name, framework="pt") as file:
                    found = file.metadata() or {}
            except SafetensorError as error:
                raise ValueError(f"{shown(name)} is no safetensors file ({error})") from error
            except OSError as error:
                raise ValueError(f"{shown(name)} cannot be read ({error})") from error
            if run is not None and (found.get("run"), found.get("step")) != (run, str(state.get("step"))):
                raise ValueError(f"{shown(name)} and state.json are of two runs or steps")
