"""Chosen rows of a tensor; and rows that get gradients behind rows that get none.

Dimensions: N rows, L chosen ones, D channels.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Rows(NamedTuple):
    """Rows that get gradients, which an operation takes in one call with rows before them that get none.

    Attributes:
        live: [L, D], with gradients; or what stands for them (`Fp8Rows`).
        every: [N, D] without gradients, whose last L rows are those; None: no row stands before.
    """

    live: Any
    every: Tensor | None = None

    @property
    def all(self) -> Tensor:
        """Without gradients."""
        return self.live.detach() if self.every is None else self.every

    @staticmethod
    def behind(frozen_FD: Tensor, live_LD: Tensor) -> "Rows":
        """Live rows behind frozen ones."""
        return Rows(live_LD, torch.cat([frozen_FD, live_LD.detach()]))

    def without(self, first: int) -> Tensor:
        """The first rows, which get no gradients."""
        assert self.every is not None
        return self.every[:first]


def rows_of(found: Tensor | tuple[Tensor, Tensor]) -> Rows:
    """What an operation returned that was given `Rows.every`, or was given none."""
    return Rows(found) if isinstance(found, Tensor) else Rows(*found)


class _TakeRows(torch.autograd.Function):
    """Distinct rows of x; backward copies, where that of an index would add: repeatable on every device."""

    @staticmethod
    def forward(ctx, x_ND, rows_L):
        ctx.save_for_backward(rows_L)
        ctx.num_rows = x_ND.shape[0]
        return x_ND.index_select(0, rows_L)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD):
        (rows_L,) = ctx.saved_tensors
        return grad_LD.new_zeros(ctx.num_rows, grad_LD.shape[1]).index_copy_(0, rows_L, grad_LD), None


def take_rows(x_ND: Tensor, rows_L: Tensor) -> Tensor:
    """Rows `rows_L`, all different, of x: [L, D]. Saves the indices."""
    return _TakeRows.apply(x_ND, rows_L)
