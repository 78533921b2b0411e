"""Copies of tensors in host memory that is used again from one time to the next; a GPU's are made while it computes."""

import logging
from collections.abc import Hashable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

log = logging.getLogger("fastvid")

K = TypeVar("K", bound=Hashable)

# torch rounds page-locked memory up to a power of two, so it is taken in blocks of one.
BLOCK_BYTES = 2**30
_ALIGNMENT = 64


class HostCopies:
    """Copies of one set of tensors at a time.

    Those of a GPU's tensors are made on a side stream, into page-locked memory: they are there after `wait`, and what
    changes the tensors must come after `hold`. Those of a CPU's are there at once.
    """

    def __init__(self):
        self._copies: dict[Any, Tensor] = {}
        self._stream: torch.cuda.Stream | None = None
        self._copied: torch.Event | None = None

    def take(self, tensors: Mapping[K, Tensor]) -> dict[K, Tensor]:
        """{key: copy of the tensor}, contiguous, in the memory of the copies before if their shapes and dtypes
        agree."""
        device = _gpu_of(tensors)
        if _layout(tensors) != _layout(self._copies):
            self._copies = {}  # let go of before there is more
            self._copies = _room_for(tensors, page_locked=device is not None)
        if device is None:
            for key, tensor in tensors.items():
                self._copies[key].copy_(tensor)
            return dict(self._copies)
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for key, tensor in tensors.items():
                self._copies[key].copy_(tensor, non_blocking=True)
            self._copied = self._stream.record_event()
        return dict(self._copies)

    def hold(self) -> None:
        """What this thread gives the GPU from now on begins when the copies are made. The host waits for nothing."""
        if self._stream is not None and self._copied is not None:
            torch.cuda.current_stream(self._stream.device).wait_event(self._copied)

    def wait(self) -> None:
        """Wait until the copies are made."""
        if self._copied is not None:
            self._copied.synchronize()


def _gpu_of(tensors):
    """The GPU on which they lie, or None."""
    return next((tensor.device for tensor in tensors.values() if tensor.is_cuda), None)


def _layout(tensors):
    return {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}


def _room_for(tensors, page_locked):
    """{key: tensor of the same shape and dtype}, uninitialised, several in a block of memory."""
    sizes = {key: -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for key, tensor in tensors.items()}
    left, block, begin, room = sum(sizes.values()), torch.empty(0, dtype=torch.uint8), 0, {}
    for key, tensor in tensors.items():
        if begin + sizes[key] > len(block):
            block, begin = None, 0
            block, page_locked = _block(max(sizes[key], min(left, BLOCK_BYTES)), page_locked)
        room[key] = block[begin : begin + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        begin, left = begin + sizes[key], left - sizes[key]
    return room


def _block(size, page_locked) -> tuple[Tensor, bool]:
    """(memory, whether it is page-locked, if it should be)."""
    if page_locked:
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True), True
        except RuntimeError as error:
            log.warning(
                "memory for checkpoints cannot be page-locked (%s): training waits while it is copied to",
                str(error).splitlines()[0],
            )
    return torch.empty(size, dtype=torch.uint8), False
