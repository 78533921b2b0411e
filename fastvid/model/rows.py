"""Chosen rows of a tensor.

Dimensions: N rows, L chosen ones, D channels.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


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
