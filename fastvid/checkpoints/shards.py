"""Sharded tensors in safetensors files: written by any number of ranks, read by any other number.

A file holds what one rank has of a group of named tensors. A piece that is not the whole tensor has its place in the
file's metadata: ``shards`` = ``{name: {"shape": global shape, "offset": first row}}``; of rows alone: only dimension 0
is ever cut. Nothing is ever unpickled.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastvid.dist.sharding import Held, LocalShard, held_part
from fastvid.files import StrPath, naming


def written_parts(tensors: Mapping[str, Held]) -> dict[str, LocalShard]:
    """What this rank writes of ``{name: Tensor | DTensor | LocalShard}``, sharing its storage.

    An empty piece is kept only where its tensor begins, so that a tensor without rows keeps its name.
    """
    held = {name: shard for name, (shard, writes) in zip(tensors, map(held_part, tensors.values())) if writes}
    return {
        name: replace(shard, local=shard.local.detach().as_subclass(Tensor))
        for name, shard in held.items()
        if shard.local.numel() or shard.offset == 0
    }


@contextlib.contextmanager
def naming_tensors(path: StrPath) -> Iterator[None]:
    """`files.naming`, for the errors of safetensors too, which are OSErrors then."""
    try:
        with naming(path):
            yield
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def write(path: Path, shards: dict[str, LocalShard], mark: dict[str, str] | None = None) -> None:
    """Write a snapshot to one safetensors file, as readable for others as its folder is; `mark` joins its metadata."""
    places = {
        name: {"shape": shard.shape, "offset": shard.offset}
        for name, shard in shards.items()
        if shard.shape != tuple(shard.local.shape)
    }
    save_file(
        {name: shard.local for name, shard in shards.items()},
        path,
        {"format": "pt", "shards": json.dumps(places), **(mark or {})},
    )
    path.chmod(path.parent.stat().st_mode & 0o666)  # safetensors makes files that their owner alone can read


def load(paths: list[Path], targets: Mapping[str, Held]) -> None:
    """Copy into `targets` the values that the files `paths` hold together, reading only the rows needed.

    Tensors that no target names are left alone. Nothing is copied unless everything fits; bf16 fits into fp32.

    Args:
        paths: the files of all ranks that wrote.
        targets: ``{name: Tensor | DTensor | LocalShard}``, written in place.

    Raises:
        ValueError: names tensors that are missing, incomplete, or of another shape or dtype, and damaged files.
    """
    with contextlib.ExitStack() as files, torch.no_grad():
        index = _index(paths, files)
        copies, problems = [], []
        for name, target in targets.items():
            shard, _ = held_part(target)
            pieces = index.get(name)
            if pieces is None:
                problems.append(f"{name} is missing")
                continue
            saved, wanted = (pieces[0].shape, pieces[0].dtype), (shard.shape, shard.local.dtype)
            # Norms and biases of bf16 runs were once bf16, and are fp32 now.
            widened = (pieces[0].dtype, shard.local.dtype) == (torch.bfloat16, torch.float32)
            if saved != wanted and not (widened and saved[0] == wanted[0]):
                problems.append(f"{name} was saved as {_describe(*saved)}, wanted {_describe(*wanted)}")
                continue
            plan, complete = _plan(shard, pieces)
            copies += plan
            if not complete:
                problems.append(f"{name} is incomplete")
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(
                f"{paths[0]}: {'; '.join(problems[:8])}{more}. Resume with the flags of the run that "
                "saved it, or choose another --output_dir."
            )
        for destination, view, rows in copies:
            destination.copy_(view[rows])


class WholeTensors(Mapping[str, Tensor]):
    """{name: whole tensor} that files hold together, on the CPU, in the dtypes that they were saved in.

    A tensor is put together when it is looked up; of one file it is a view of that, mapped into memory.

    Args:
        paths: the files of all ranks that wrote.

    Attributes:
        shapes: {name: shape}.

    Raises:
        ValueError: a damaged file; a tensor that is incomplete.
    """

    def __init__(self, paths: list[Path]):
        self._paths, self._files = paths, contextlib.ExitStack()  # open for as long as this lives
        self._index = _index(paths, self._files)
        self.shapes = {name: pieces[0].shape for name, pieces in self._index.items()}

    def __getitem__(self, name: str) -> Tensor:
        pieces, shape = self._index[name], self.shapes[name]
        if len(pieces) == 1 and pieces[0].view.get_shape() == list(shape):
            return pieces[0].view[...]
        whole = LocalShard(torch.empty(shape, dtype=pieces[0].dtype), shape, 0)
        plan, complete = _plan(whole, pieces)  # replicas may each have written the same rows
        if not complete:
            raise ValueError(f"{self._paths[0].parent}: {name} is incomplete: files of some ranks are missing")
        for destination, view, rows in plan:
            destination.copy_(view[rows])
        return whole.local

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)


@dataclass(frozen=True)
class _Piece:
    """One file's rows of a tensor: `rows` from `offset` of a tensor of `shape`; `view` reads them."""

    view: Any  # safetensors has no type for it
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    rows: int


def _index(paths, files):
    """{name: [_Piece, by offset]}. `files` is the ExitStack that keeps the files open."""
    index = {}
    for path in paths:
        try:
            file = files.enter_context(safe_open(path, framework="pt"))
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path}: {error}. Remove this checkpoint to go on from an older one.") from error
        places = json.loads(file.metadata()["shards"])
        for name in file.keys():
            view = file.get_slice(name)
            local_shape = tuple(view.get_shape())
            place = places.get(name, {"shape": local_shape, "offset": 0})
            dtype = view[:0].dtype if local_shape else view[...].dtype
            rows = local_shape[0] if local_shape else 1
            index.setdefault(name, []).append(_Piece(view, tuple(place["shape"]), dtype, place["offset"], rows))
    return {name: sorted(pieces, key=lambda piece: piece.offset) for name, pieces in index.items()}


def _plan(shard, pieces):
    """([(destination, view, rows of the view to copy)], whether they fill the shard)."""
    if not shard.shape:
        return [(shard.local, pieces[0].view, ...)], True
    position, end, plan = shard.offset, shard.offset + len(shard.local), []
    for piece in pieces:
        stop = min(end, piece.offset + piece.rows)
        if piece.offset <= position < stop:
            destination = shard.local[position - shard.offset : stop - shard.offset]
            plan.append((destination, piece.view, slice(position - piece.offset, stop - piece.offset)))
            position = stop
    return plan, position == end


def _describe(shape, dtype):
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"
