"""Which rows of a sharded tensor a rank holds: only dimension 0 is ever cut."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class LocalShard:
    """Rows ``[offset, offset + len(local))`` of a tensor: what one rank holds of it.

    May be given wherever a DTensor may, and cuts where a DTensor cannot (aligned to quantisation blocks, or one row
    of random state per rank).

    Attributes:
        local: [rows, ...] any dtype; 0-d for a 0-d tensor.
        shape: of the whole tensor.
        offset: of the first row held.
    """

    local: Tensor
    shape: tuple[int, ...]
    offset: int


Held = Tensor | LocalShard  # what `held_part` takes; a DTensor is a Tensor


def held_part(tensor: Held) -> tuple[LocalShard, bool]:
    """What this rank holds of `tensor`, sharing its storage, and whether this rank is the one that writes it.

    Args:
        tensor: Tensor (held by every rank, written by rank 0), DTensor (sharded on dimension 0, replicated, or both;
            of replicas the first writes) or LocalShard (its holder writes).
    """
    if isinstance(tensor, LocalShard):
        return tensor, True
    if not isinstance(tensor, DTensor):
        writes = not dist.is_initialized() or dist.get_rank() == 0
        return LocalShard(tensor.detach(), tuple(tensor.shape), 0), writes
    mesh, offset, writes, cuts = tensor.device_mesh, 0, True, 0
    place = mesh.get_coordinate()
    assert place is not None, "this rank is none of the mesh"
    for size, index, placement in zip(mesh.shape, place, tensor.placements):
        if isinstance(placement, Shard):
            cuts += 1
            assert placement.dim == 0 and cuts == 1, f"sharded other than once on dimension 0: {tensor.placements}"
            length = tensor.shape[0]
            offset = min(index * -(-length // size), length)  # the rows of torch.chunk, as Shard cuts them
        else:
            assert isinstance(placement, Replicate), f"neither sharded nor replicated: {tensor.placements}"
            writes = writes and index == 0
    return LocalShard(local_shard(tensor.detach()), tuple(tensor.shape), offset), writes


def local_shard(tensor: Tensor) -> Tensor:
    """The part of `tensor` that this rank holds: the same storage, as a plain tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole of a parameter, on the CPU; every rank calls it."""
    whole = parameter.detach()
    return (whole.full_tensor() if isinstance(whole, DTensor) else whole).cpu()


def ranks_of_a_shard(tensor: Tensor) -> int | None:
    """How many ranks hold the same shard; None: it is not sharded."""
    if not isinstance(tensor, DTensor):
        return None
    sizes = zip(tensor.device_mesh.shape, tensor.placements)
    return math.prod(size for size, placement in sizes if not isinstance(placement, Shard))


def sharded_like(tensor: Tensor, local: Tensor) -> Tensor:
    """A DTensor of `local`, rows that go with those that this rank holds of a DTensor; `local` where it is none."""
    if not isinstance(tensor, DTensor) or not local.ndim:
        return local
    shape = torch.Size((tensor.shape[0], *local.shape[1:]))
    return DTensor.from_local(
        local,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=shape,
        stride=torch.empty(shape, device="meta").stride(),
    )
