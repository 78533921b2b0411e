"""Steps that all ranks take together: each succeeds on every rank, or none goes on."""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError
from torch.distributed import ProcessGroup

T = TypeVar("T")


def rank_and_size(process_group: ProcessGroup | None = None) -> tuple[int, int]:
    """This process among its peers; 0 and 1 without torch.distributed."""
    if not dist.is_initialized():
        return 0, 1
    return dist.get_rank(process_group), dist.get_world_size(process_group)


def gather(value: T, process_group: ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, by rank."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(values, value, group=process_group)
    return values


@contextlib.contextmanager
def together(process_group: ProcessGroup | None = None) -> Iterator[None]:
    """A block that every rank runs: it succeeds on all of them, or none of them goes on.

    Raises:
        OSError: on every rank, when the block failed on any; names rank and reason.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    reasons = gather(None if error is None else f"{type(error).__name__}: {error}", process_group)
    failed = [f"rank {rank}: {reason}" for rank, reason in enumerate(reasons) if reason]
    if error is not None and not isinstance(error, (OSError, SafetensorError)):
        raise error  # a defect, not a full disk: where it happened, it keeps its type and traceback
    if failed:
        raise OSError(f"checkpoint: {'; '.join(failed)}") from error
