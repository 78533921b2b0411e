"""Rows on their way through the layers.

Dimensions: N packed rows, L supervised ones or those that get gradients, D channels.
"""

from typing import NamedTuple

import torch
from fastvid_kernels.plain import last_rows
from fastvid_kernels.quantize_fp8 import BackInFp8
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvid.batch import AttentionLayout, BatchPart
from fastvid.model.rows import Rows


class Stream(NamedTuple):
    """What goes from layer to layer. (A tuple, in which FSDP finds the tensors that need gradients.)

    Attributes:
        residual: residual stream, in its own dtype.
        branch: what the last block adds to it; its gradient may go back in e4m3. None: nothing, or added already.
        positions_N: rotary positions.
        layout: who attends to whom.
        supervised: (rows [L], ascending; who they attend to): the only rows that the last layer must put out; None:
            all.
        parts: rows that need no gradients, and those behind them that do; None: all do, or none.
    """

    residual: Rows
    branch: Rows | None
    positions_N: Tensor
    layout: AttentionLayout
    supervised: tuple[Tensor, AttentionLayout] | None = None
    parts: tuple[BatchPart, BatchPart] | None = None

    def summed(self) -> "Stream":
        """The same with the branch added."""
        if self.branch is None:
            return self
        branch_LD = self.branch.live.plain() if isinstance(self.branch.live, BackInFp8) else self.branch.live
        if self.residual.every is None:
            return self._replace(residual=Rows(self.residual.live + branch_LD), branch=None)
        assert self.branch.every is not None
        residual = Rows(*_Sum.apply(*self.residual, branch_LD, self.branch.every))
        return self._replace(residual=residual, branch=None)


class _Sum(torch.autograd.Function):
    """The sum of all rows, of which the last ones get gradients."""

    @staticmethod
    def forward(ctx, residual_LD, residual_ND, branch_LD, branch_ND):
        ctx.set_materialize_grads(False)
        ctx.dtypes = residual_LD.dtype, branch_LD.dtype
        total_ND = residual_ND + branch_ND
        ctx.mark_non_differentiable(total_ND)
        return last_rows(total_ND, len(residual_LD)), total_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LD, _):
        residual, branch = (None if grad_LD is None else grad_LD.to(dtype) for dtype in ctx.dtypes)
        return residual, None, branch, None
