"""AdamW with blockwise 8-bit moments over a rank's shards, stochastic rounding of bf16 weights, and paged moments.

Nothing here depends on how a tensor is sharded: given the same gradient and clip factor, weights and moments have the
same bits on any number of ranks.
"""

import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from fastvid_kernels.adamw8bit_step import BLOCK_SIZE, adamw8bit_step
from fastvid_kernels.adamw_step import round_to_bf16
from fastvid_kernels.dispatch import on_gpu
from torch import Tensor

from fastvid.config import TrainConfig
from fastvid.dist.sharding import held_part

log = logging.getLogger("fastvid")

LEAST_ELEMENTS = 4096  # bitsandbytes' limit: smaller tensors are not worth it
# Elements that plain torch works on at a time: temporaries stay in a CPU's cache.
CPU_CHUNK = 2**16


@dataclass(frozen=True)
class Piece:
    """What this rank holds of a parameter.

    Attributes:
        local: [rows, ...], sharing the parameter's storage; all of it if the parameter is not sharded.
        shape: of the whole parameter.
        first: index of the first element held, in the whole.
        seed: of the random bits that round it.
    """

    local: Tensor
    shape: tuple[int, ...]
    first: int
    seed: int

    @classmethod
    def of(cls, name: str, parameter: Tensor, seed: int) -> Self:
        held, _ = held_part(parameter)
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        return cls(
            held.local, held.shape, held.offset * math.prod(held.shape[1:]), int.from_bytes(digest[:8], "little") >> 1
        )


def takes_8_bits(shape: Sequence[int]) -> bool:
    """Whether a parameter of this global shape gets 8-bit moments.

    Shards are rows, as FSDP2 cuts them: where a row is whole blocks, no sharding cuts a block.
    """
    return len(shape) > 1 and math.prod(shape) >= LEAST_ELEMENTS and math.prod(shape[1:]) % BLOCK_SIZE == 0


class AdamW8bit:
    """AdamW whose moments are codes and the scales of their blocks, in bitsandbytes' format and under its names.

    `state`: {name: {"state1", "state2": uint8 of the shard's shape, "absmax1", "absmax2": fp32 [rows, blocks in a
    row]}}. What bitsandbytes calls `absmax1` is ours, flattened.

    Args:
        pieces: {name: `Piece`} of shapes that `takes_8_bits`; fp32, or bf16 that is rounded stochastically.
        config: adam_beta1/2, adam_epsilon, weight_decay.
        paged: moments lie in memory that moves between GPU and host as needed; on a CPU they always lie on the host.

    Raises:
        ValueError: `paged` without bitsandbytes.
    """

    def __init__(self, pieces: Mapping[str, Piece], config: TrainConfig, paged: bool = False):
        self.pieces = pieces
        self.options = {
            "beta1": config.adam_beta1,
            "beta2": config.adam_beta2,
            "eps": config.adam_epsilon,
            "weight_decay": config.weight_decay,
        }
        self.paging = _Paging() if paged and _on_gpu(pieces) else None
        if paged and self.paging is None:
            log.info("--optim paged_adamw_8bit: moments are paged on a GPU; here they are those of adamw_8bit")
        zeros = self.paging.zeros if self.paging else torch.zeros
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, piece in pieces.items():
            scales = len(piece.local), math.prod(piece.shape[1:]) // BLOCK_SIZE
            self.state[name] = {
                key: zeros(shape, dtype=dtype, device=piece.local.device)
                for key, shape, dtype in (
                    ("state1", piece.local.shape, torch.uint8),
                    ("absmax1", scales, torch.float32),
                    ("state2", piece.local.shape, torch.uint8),
                    ("absmax2", scales, torch.float32),
                )
            }

    def step(self, gradients: Mapping[str, Tensor], *, step: int, lr: float, clip: Tensor | None, skip: Tensor) -> None:
        """Update in place; see `adamw8bit_step`.

        Args:
            gradients: {name: of the shard's shape}, some or all of the pieces.
            step: number of this update, from 0.
            lr: learning rate.
            clip: factor on the gradients, a scalar on the device, or None.
            skip: a scalar on the device; where it is not 0 nothing changes.
        """
        for name, gradient in gradients.items():
            piece, state = self.pieces[name], self.state[name]
            if self.paging:
                self.paging.fetch(state.values())
            tensors = [x.view(-1) for x in (piece.local, gradient, state["state1"], state["state2"])]
            scales = [state[key].view(-1) for key in ("absmax1", "absmax2")]
            count = piece.local.numel()
            chunk = count if on_gpu(gradient) else CPU_CHUNK
            for begin in range(0, count, max(1, chunk)):
                blocks = slice(begin // BLOCK_SIZE, (begin + chunk) // BLOCK_SIZE)
                adamw8bit_step(
                    *[x[begin : begin + chunk] for x in tensors],
                    *[x[blocks] for x in scales],
                    lr=lr,
                    step=step + 1,
                    clip=clip,
                    skip=skip,
                    seed=piece.seed,
                    first=piece.first + begin,
                    **self.options,
                )


def round_into(destination: Tensor, values: Tensor, *, first: int, seed: int, step: int) -> None:
    """Write fp32 `values` into flat `destination`: as they are into fp32, stochastically rounded into bf16.

    Rounds up with the probability of the part cut off; what bf16 holds exactly stays. The random bits are those of
    `adamw8bit_step`.

    Args:
        destination: [E] fp32 or bf16.
        values: [E] fp32.
        first: index of the first element in the whole tensor.
        seed, step: of the random bits.
    """
    if destination.dtype == torch.bfloat16:
        values = round_to_bf16(values, first=first, seed=seed, step=step)
    destination.copy_(values)


class _Paging:
    """Unified memory that bitsandbytes allocates, as tensors on the GPU."""

    def __init__(self):
        try:
            from bitsandbytes import functional
        except ImportError as error:
            raise ValueError(
                f"--optim paged_adamw_8bit keeps moments in bitsandbytes' paged memory ({error}): "
                "pip install bitsandbytes, or choose --optim adamw_8bit"
            ) from error
        self.functional = functional
        self.memory = {}  # by address

    def zeros(self, shape, dtype, device):
        if math.prod(shape) == 0:
            return torch.zeros(shape, dtype=dtype, device=device)
        memory = self.functional.get_paged(*shape, dtype=dtype, device=device)
        self.memory[memory.data_ptr()] = memory
        return torch.as_tensor(_Managed(memory), device=device).zero_()

    def fetch(self, tensors):
        """Start to bring them to the GPU; faster than page faults in the kernel."""
        for tensor in tensors:
            if tensor.numel():
                self.functional.prefetch_tensor(self.memory[tensor.data_ptr()])


class _Managed:
    """Memory that torch takes as a GPU tensor, without a copy, through the CUDA array interface (version 2)."""

    def __init__(self, memory):
        self.memory = memory  # lives as long as this
        self.__cuda_array_interface__ = {
            "shape": tuple(memory.shape),
            "typestr": {torch.uint8: "|u1", torch.float32: "<f4"}[memory.dtype],
            "data": (memory.data_ptr(), False),
            "strides": None,
            "version": 2,
        }


def _on_gpu(pieces):
    return any(piece.local.is_cuda for piece in pieces.values())
