"""Checkpoints: every rank writes its own shards; a folder is complete and checksummed, or it is not there.

A checkpoint is the folder ``<output_dir>/checkpoint-<step>``:

- ``<group>-00001-of-00004.safetensors``: what rank 1 of 4 holds of a group of named tensors (`fastvid.shards`).
- ``state.json``: the caller's JSON state, as rank 0 gave it.
- ``checksums.json``: ``{"format": 1, "files": {name: {"bytes": size, "sha256": digest}}}`` of all of the above.

It is written as ``.checkpoint-<step>.tmp``, synced to the disk, and renamed. One of the same step that is in the way is
set aside as ``.checkpoint-<step>.replaced`` and put back if the process dies before the new one has its name.
"""

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fastvid import shards
from fastvid.host_copies import HostCopies
from fastvid.shards import LocalShard
from fastvid.together import gather, rank_and_size, together

__all__ = ["LocalShard", "Snapshot", "save", "snapshot", "write", "newest_valid", "load_into", "read_full",
           "read_state"]


@dataclass(frozen=True)
class Snapshot:
    """What a rank will write of a checkpoint, in host memory: a copy that training does not change.

    Attributes:
        groups: ``{group: {name: LocalShard}}``.
        state: JSON text.
    """

    groups: dict[str, dict[str, LocalShard]]
    state: str


def save(output_dir, step: int, *, groups: dict[str, dict], state: dict, total_limit: int | None = None,
         process_group=None) -> Path:
    """Write ``checkpoint-<step>``; every rank calls it.

    Args:
        output_dir: on a file system that all ranks share.
        step: number of the checkpoint; an existing one of this number is replaced.
        groups: ``{group: {name: tensor}}``, the same names on every rank. Of a plain tensor rank 0's is written; of a
            DTensor (sharded on dimension 0, replicated, or both) or a `LocalShard` each rank's rows. Any dtype.
        state: JSON values; rank 0's is written.
        total_limit: checkpoints to keep, this one included (None, 0: all). The lowest numbers go first; numbers above
            `step` belong to a run that was started over and go before them.
        process_group: of all ranks, for messages between them; best one that works on the CPU (gloo).

    Returns:
        The folder.

    Raises:
        OSError: on every rank, when any rank could not do its part; names rank and reason. What was there before is
            still there and valid.
    """
    taken = snapshot(groups, state, process_group=process_group)
    return write(output_dir, step, taken, total_limit=total_limit, process_group=process_group)


def snapshot(groups: dict[str, dict], state: dict, *, copies: HostCopies | None = None, process_group=None) -> Snapshot:
    """The first half of `save`: copies of what this rank will write. Arguments as `save`'s.

    Args:
        copies: takes the copies, over those of an earlier snapshot, which is written already: new pages cost as much
            time as the copy. `write` takes it too, and waits for them. None: new memory, and they are there at once.
    """
    with together(process_group):
        parts = {group: shards.written_parts(tensors) for group, tensors in groups.items()}
        taker = copies or HostCopies()
        taken = taker.take({(group, name): part.local for group in parts for name, part in parts[group].items()})
        if copies is None:
            taker.wait()
        return Snapshot({group: {name: replace(part, local=taken[group, name]) for name, part in parts[group].items()}
                         for group in parts}, json.dumps(state, indent=1))


def newest_valid(output_dir, *, on_invalid: Callable[[Path, str], None] | None = None,
                 process_group=None) -> Path | None:
    """The checkpoint of the highest number whose files are all as they were written; None without one.

    Under torch.distributed every rank calls it: each verifies a part of the files, and all get the same answer.

    Args:
        output_dir: may be missing.
        on_invalid: called on rank 0 with each damaged checkpoint that is passed over, and why. Default: a warning.
        process_group: as for `save`.

    Raises:
        OSError: on every rank, when rank 0 cannot read the folder.
    """
    output_dir = Path(output_dir)
    rank, world_size = rank_and_size(process_group)
    steps = None
    with together(process_group):
        if rank == 0:
            _put_back(output_dir)
            steps = sorted(_steps(output_dir), reverse=True)
    for step in gather(steps, process_group)[0]:
        path = output_dir / f"checkpoint-{step}"
        faults = gather(_fault(path, rank, world_size), process_group)
        fault = next((fault for fault in faults if fault), None)
        if fault is None:
            return path
        if rank == 0:
            (on_invalid or _warn_invalid)(path, fault)
    return None


def load_into(folder, group: str, targets: dict) -> None:
    """Copy a group's saved values into `targets`, whatever the number of ranks that saved and that load.

    Each rank reads only the rows that it needs. Saved tensors that no target names are left alone. Nothing is
    copied unless everything fits; bf16 fits into fp32.

    Args:
        folder: a checkpoint that `newest_valid` returned.
        group: one of the groups saved.
        targets: ``{name: Tensor | DTensor | LocalShard}``, written in place.

    Raises:
        ValueError: names tensors that are missing, incomplete, or of another shape or dtype, and damaged files.
    """
    shards.load(_group_files(folder, group), targets)


def read_full(folder, group: str) -> dict[str, Tensor]:
    """All tensors of a group, whole, on the CPU, in the dtypes that they were saved in.

    Raises:
        ValueError: no such checkpoint or group, or a damaged file.
    """
    return shards.read(_group_files(folder, group))


def read_state(folder) -> dict:
    """The `state` that was saved (as JSON has it: tuples are lists, keys are strings)."""
    return json.loads((Path(folder) / "state.json").read_text(encoding="utf-8"))


def write(output_dir, step: int, snapshot: Snapshot, *, copies: HostCopies | None = None,
          total_limit: int | None = None, process_group=None) -> Path:
    """The second half of `save`. Touches nothing that training changes: fit for another thread.

    Args:
        copies: what took the snapshot's copies, if they are still being made: they are waited for.
    """
    output_dir, (rank, world_size) = Path(output_dir), rank_and_size(process_group)
    temporary, final = output_dir / f".checkpoint-{step}.tmp", output_dir / f"checkpoint-{step}"
    written = {}
    try:
        with together(process_group):
            if copies is not None:
                copies.wait()
            if rank == 0:
                _put_back(output_dir)
                for leftover in [*output_dir.glob(".checkpoint-*.tmp"), *output_dir.glob(".checkpoint-*.replaced")]:
                    _remove(leftover)
                temporary.mkdir(parents=True)
        with together(process_group):
            if not temporary.is_dir():
                raise FileNotFoundError(f"{temporary} was made by rank 0 and is not seen here: "
                                        "--output_dir must be on a file system that all ranks share")
            for group, held in snapshot.groups.items():
                if held or rank == 0:  # rank 0's file says that the group exists, be it empty
                    path = temporary / f"{group}-{rank:05d}-of-{world_size:05d}.safetensors"
                    shards.write(path, held)
                    _sync(path)
                    written[path.name] = _measure(path)
        files = {name: entry for part in gather(written, process_group) for name, entry in part.items()}
        with together(process_group):
            if rank == 0:
                _commit(temporary, final, files, snapshot.state)
                if total_limit is not None and total_limit > 0:
                    _prune(output_dir, step, total_limit)
    finally:
        if rank == 0:
            _put_back(output_dir)
            if temporary.exists():
                _remove(temporary)
    return final


def _commit(temporary, final, files, state_text):
    """Complete the temporary folder and give it its name."""
    for name, entry in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise FileNotFoundError(f"{path} was written by another rank and is not seen by rank 0: "
                                    "--output_dir must be on a file system that all ranks share")
    state_path, checksums_path = temporary / "state.json", temporary / "checksums.json"
    state_path.write_text(state_text, encoding="utf-8")
    files = {**files, state_path.name: _measure(state_path)}
    checksums_path.write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
    for path in (state_path, checksums_path, temporary):
        _sync(path)
    replaced = final.with_name(f".{final.name}.replaced")
    if final.exists():
        os.rename(final, replaced)
    os.rename(temporary, final)
    _sync(final.parent)
    if replaced.exists():
        _remove(replaced)


def _put_back(output_dir):
    """Undo a replacement that died between setting the old folder aside and naming the new one."""
    for path in output_dir.glob(".checkpoint-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if not final.exists():
            os.rename(path, final)


def _prune(output_dir, step, total_limit):
    others = sorted((other for other in _steps(output_dir) if other != step), key=lambda other: (other < step, other))
    for other in others[:max(0, len(others) - (total_limit - 1))]:
        path = output_dir / f"checkpoint-{other}"
        doomed = path.with_name(f".{path.name}.tmp")  # a removal that dies half-way leaves no damaged checkpoint
        os.rename(path, doomed)
        _remove(doomed)


def _remove(folder):
    """Delete a folder; one that a reader still holds open (NFS) stays until the next save, with a warning."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        warnings.warn(f"{folder} could not be removed: {error}", stacklevel=2)


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _measure(path):
    with open(path, "rb") as file:
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _steps(output_dir):
    """Numbers of the checkpoint folders, valid or not."""
    paths = output_dir.iterdir() if output_dir.is_dir() else []
    found = [(re.fullmatch(r"checkpoint-(0|[1-9]\d*)", path.name), path) for path in paths]
    return [int(match[1]) for match, path in found if match and path.is_dir()]


def _read_checksums(folder):
    """{file name: {"bytes", "sha256"}} of a checkpoint folder. The names come from a file: look them up, never join."""
    path = Path(folder) / "checksums.json"
    try:
        files = json.loads(path.read_bytes())["files"]
        return {name: {"bytes": entry["bytes"], "sha256": entry["sha256"]} for name, entry in files.items()}
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not a checkpoint, or not a complete one") from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from None


def _fault(folder, rank=0, world_size=1):
    """Why a checkpoint is not valid, or None. Of `world_size` ranks that share the hashing this one is `rank`."""
    try:
        expected = _read_checksums(folder)
        here = set(os.listdir(folder))
        for name, entry in expected.items():
            if name not in here:
                return f"{name} is missing"
            if (size := os.path.getsize(folder / name)) != entry["bytes"]:
                return f"{name} has {size} bytes, {entry['bytes']} were written"
        share = sorted(expected)[rank::world_size]
        with ThreadPoolExecutor(4) as pool:
            for name, measured in zip(share, pool.map(lambda name: _measure(folder / name), share)):
                if measured != expected[name]:
                    return f"{name} is damaged: its sha256 is not the one that was written"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _group_files(folder, group):
    pattern = re.compile(re.escape(group) + r"-\d{5}-of-\d{5}\.safetensors")
    paths = [Path(folder) / name for name in sorted(_read_checksums(folder)) if pattern.fullmatch(name)]
    if not paths:
        raise ValueError(f"{folder} holds no {group!r} tensors")
    return paths


def _warn_invalid(path, fault):
    warnings.warn(f"{path} is passed over: {fault}", stacklevel=3)
