"""Checkpoints: every rank writes its own shards; a folder is complete and checksummed, or it is not there.

A checkpoint is the folder ``<output_dir>/checkpoint-<step>``:

- ``<group>-00001-of-00004.safetensors``: what rank 1 of 4 holds of a group of named tensors
  (`fastvid.checkpoints.shards`).
- ``state.json``: the caller's JSON state, as rank 0 gave it.
- ``checksums.json``: ``{"format": 1, "files": {name: {"bytes": size, "sha256": digest}}}`` of all of the above.

Files of groups are marked, in their metadata, with the run and the step that wrote them, where the state names a "run".

It is written as ``.checkpoint-<step>.tmp``, synced to the disk, and renamed. One of the same step that is in the way is
set aside as ``.checkpoint-<step>.replaced`` and put back if the process dies before the new one has its name. What is
in the way and is no valid checkpoint of ours stays, as ``checkpoint-<step>.aside-1``.
"""

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch.distributed import ProcessGroup

from fastvid.checkpoints import folders as checkpoint_folders
from fastvid.checkpoints import shards
from fastvid.checkpoints.folders import named, newest_valid
from fastvid.checkpoints.host_copies import HostCopies
from fastvid.dist.collective import gather, rank_and_size, together
from fastvid.dist.sharding import Held, LocalShard
from fastvid.files import StrPath, naming

__all__ = [
    "Snapshot",
    "load_into",
    "named",
    "newest_valid",
    "read_full",
    "read_state",
    "save",
    "snapshot",
    "tidy",
    "write",
]

log = logging.getLogger("fastvid")


@dataclass(frozen=True)
class Snapshot:
    """What a rank will write of a checkpoint, in host memory: a copy that training does not change.

    Attributes:
        groups: ``{group: {name: LocalShard}}``.
        state: JSON text.
        run: what the state calls the run, or None.
    """

    groups: dict[str, dict[str, LocalShard]]
    state: str
    run: str | None = None

    @property
    def nbytes(self) -> int:
        """Of this rank's tensors."""
        return sum(shard.local.nbytes for held in self.groups.values() for shard in held.values())


def save(
    output_dir: StrPath,
    step: int,
    *,
    groups: Mapping[str, Mapping[str, Held]],
    state: dict[str, Any],
    total_limit: int | None = None,
    process_group: ProcessGroup | None = None,
) -> Path:
    """Write ``checkpoint-<step>``; every rank calls it.

    Args:
        output_dir: on a file system that all ranks share.
        step: number of the checkpoint; an existing one of this number is replaced.
        groups: ``{group: {name: tensor}}``, the same names on every rank. Of a plain tensor rank 0's is written; of a
            DTensor (sharded on dimension 0, replicated, or both) or a `LocalShard` each rank's rows. Any dtype.
        state: JSON values; rank 0's is written.
        total_limit: checkpoints to keep, this one included (None, 0: all). The lowest numbers go first; numbers above
            `step` belong to a run that was started over and go before them. What is damaged, or was not written by
            fastvid, is neither counted nor removed.
        process_group: of all ranks, for messages between them; best one that works on the CPU (gloo).

    Returns:
        The folder.

    Raises:
        OSError: on every rank, when any rank could not do its part; names rank and reason. What was there before is
            still there and valid.
    """
    taken = snapshot(groups, state, process_group=process_group)
    return write(output_dir, step, taken, total_limit=total_limit, process_group=process_group)


def snapshot(
    groups: Mapping[str, Mapping[str, Held]],
    state: dict[str, Any],
    *,
    copies: HostCopies | None = None,
    process_group: ProcessGroup | None = None,
) -> Snapshot:
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
        return Snapshot(
            {
                group: {name: replace(part, local=taken[group, name]) for name, part in parts[group].items()}
                for group in parts
            },
            json.dumps(state, indent=1),
            state.get("run"),
        )


def load_into(folder: StrPath, group: str, targets: Mapping[str, Held]) -> None:
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


def read_full(folder: StrPath, group: str) -> shards.WholeTensors:
    """All tensors of a group, whole, each read when it is looked up.

    Raises:
        ValueError: no such checkpoint or group, or a damaged file.
    """
    return shards.WholeTensors(_group_files(folder, group))


def read_state(folder: StrPath) -> dict[str, Any]:
    """The `state` that was saved (as JSON has it: tuples are lists, keys are strings)."""
    path = Path(folder) / "state.json"
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8"))


def write(
    output_dir: StrPath,
    step: int,
    snapshot: Snapshot,
    *,
    copies: HostCopies | None = None,
    total_limit: int | None = None,
    process_group: ProcessGroup | None = None,
    written_before: Collection[int] = (),
) -> Path:
    """The second half of `save`. Touches nothing that training changes: fit for another thread.

    Args:
        copies: what took the snapshot's copies, if they are still being made: they are waited for.
        written_before: steps whose checkpoints this process wrote: they are removed without being verified again.
    """
    output_dir, (rank, world_size) = Path(output_dir), rank_and_size(process_group)
    temporary, final = output_dir / f".checkpoint-{step}.tmp", output_dir / f"checkpoint-{step}"
    written = {}
    try:
        with together(process_group):
            if copies is not None:
                copies.wait()
            if rank == 0:
                tidy(output_dir)
                temporary.mkdir(parents=True)
        with together(process_group):
            if not temporary.is_dir():
                raise FileNotFoundError(
                    f"{temporary} was made by rank 0 and is not seen here: "
                    "--output_dir must be on a file system that all ranks share"
                )
            for group, held in snapshot.groups.items():
                if held or rank == 0:  # rank 0's file says that the group exists, be it empty
                    path = temporary / f"{group}-{rank:05d}-of-{world_size:05d}.safetensors"
                    mark = {} if snapshot.run is None else {"run": snapshot.run, "step": str(step)}
                    with shards.naming_tensors(path):
                        shards.write(path, held, mark)
                        _sync(path)
                        written[path.name] = checkpoint_folders.measure(path)
        files = {name: entry for part in gather(written, process_group) for name, entry in part.items()}
        with together(process_group):
            if rank == 0:
                _commit(temporary, final, files, snapshot.state)
                if total_limit is not None and total_limit > 0:
                    _prune(output_dir, step, total_limit, written_before)
    finally:
        if rank == 0:
            with contextlib.suppress(OSError):  # the other ranks know nothing of it; the next save tries again
                tidy(output_dir)
    return final


def tidy(output_dir: Path) -> None:
    """Undo or finish what a save left that died. For the one run that writes to the folder."""
    for path in output_dir.glob(".checkpoint-*.replaced"):
        final = path.with_name(path.name.removeprefix(".").removesuffix(".replaced"))
        if os.path.lexists(final):
            _remove(path)
        else:
            os.rename(path, final)
    for path in output_dir.glob(".checkpoint-*.tmp"):
        _remove(path)


def _commit(temporary, final, files, state_text):
    """Complete the temporary folder and give it its name."""
    for name, entry in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry["bytes"]:
            raise FileNotFoundError(
                f"{path} was written by another rank and is not seen by rank 0: "
                "--output_dir must be on a file system that all ranks share"
            )
    state_path, checksums_path = temporary / "state.json", temporary / "checksums.json"
    with naming(state_path):
        state_path.write_text(state_text, encoding="utf-8")
        files = {**files, state_path.name: checkpoint_folders.measure(state_path)}
    with naming(checksums_path):
        checksums_path.write_text(json.dumps({"format": 1, "files": files}, indent=1), encoding="utf-8")
    for path in (state_path, checksums_path, temporary):
        _sync(path)
    replaced = final.with_name(f".{final.name}.replaced")
    if os.path.lexists(final):
        if (fault := checkpoint_folders.fault(final)) is None:
            os.rename(final, replaced)
        else:
            _set_aside(final, fault)
    os.rename(temporary, final)
    _sync(final.parent)
    if replaced.exists():
        _remove(replaced)


def _set_aside(path, fault):
    """Free the name of what is no valid checkpoint: it may be all that is left of one, or somebody else's."""
    names = (path.with_name(f"{path.name}.aside-{number}") for number in itertools.count(1))
    aside = next(name for name in names if not os.path.lexists(name))
    os.rename(path, aside)
    log.warning("%s was in the way of a checkpoint and is now %s: %s", path, aside.name, fault)


def _prune(output_dir, step, total_limit, written_before):
    others = [
        other
        for other in checkpoint_folders.steps(output_dir)
        if other != step and checkpoint_folders.is_whole(output_dir / f"checkpoint-{other}")
    ]
    others.sort(key=lambda other: (other < step, other))
    for other in others[: max(0, len(others) - (total_limit - 1))]:
        path = output_dir / f"checkpoint-{other}"
        if path.is_symlink() or (other not in written_before and checkpoint_folders.fault(path) is not None):
            continue  # damaged
        doomed = path.with_name(f".{path.name}.tmp")  # a removal that dies half-way leaves no damaged checkpoint
        os.rename(path, doomed)
        _remove(doomed)


def _remove(path):
    """Delete a folder or a file; what cannot be deleted (NFS: a reader holds it open) stays until the next save."""
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        log.warning("%s could not be removed: %s", path, error)


def _sync(path):
    with naming(path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _group_files(folder, group):
    pattern = re.compile(re.escape(group) + r"-\d{5}-of-\d{5}\.safetensors")
    names = sorted(filter(pattern.fullmatch, checkpoint_folders.read_checksums(folder)))
    paths = [Path(folder) / name for name in names]
    if not paths:
        raise ValueError(f"{folder} holds no {group!r} tensors")
    return paths
