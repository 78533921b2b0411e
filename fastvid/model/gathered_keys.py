"""Keys and values that are copied for attention, and copied again for its backward instead of being saved.

Dimensions: N packed rows, M key/value rows, C constant ones, K key/value heads, d channels per head.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Gathered:
    """The rows of `constant` and then `source` that segments attend to; gathered again when backward asks for them."""

    def __init__(self, constant_CKd: Tensor | None, source_NKd: Tensor, rows_M: Tensor):
        self.constant_CKd = constant_CKd
        self.source_NKd = source_NKd.detach()
        self.rows_M = rows_M
        self.storage = None  # of the copy that forward made; only forward compares it, while the copy lives
        self.again_MKd = None

    def copy(self) -> Tensor:
        source_NKd = self.source_NKd
        if self.constant_CKd is not None:
            source_NKd = torch.cat([self.constant_CKd, source_NKd])
        return source_NKd.index_select(0, self.rows_M)

    def forward_copy(self) -> Tensor:
        rows_MKd = self.copy()
        self.storage = rows_MKd.untyped_storage()._cdata
        return rows_MKd

    def backward_copy(self) -> Tensor:
        if self.again_MKd is None:
            self.again_MKd = self.copy()
        return self.again_MKd


class Placed:
    """Keys and values in one allocation, made again when backward asks for them."""

    def __init__(self, k_MKd: Tensor, again: Callable[[], Tensor]):
        self.storage, self.again, self.made = k_MKd.untyped_storage()._cdata, again, None

    def backward_copy(self) -> Tensor:
        if self.made is None:  # once for both; it goes with the graph that asks for it
            self.made = self.again()
        return self.made


class GatherRows(torch.autograd.Function):
    """[N, K, d] → [M, K, d]; saves indices; backward gathers, or sums a shared row's gradients in fp32, in M's
    order."""

    @staticmethod
    def forward(ctx: Any, source_NKd: Tensor, gathered: Gathered, own_keys_N: Tensor | None, regather: bool) -> Tensor:
        ctx.save_for_backward(gathered.rows_M, own_keys_N)
        ctx.first = 0 if gathered.constant_CKd is None else len(gathered.constant_CKd)
        ctx.shape = source_NKd.shape
        ctx.gathered = gathered if regather else None  # which holds keys or values: not under recomputation
        return gathered.forward_copy()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_MKd: Tensor) -> tuple[Tensor, None, None, None]:
        rows_M, own_keys_N = ctx.saved_tensors
        ctx.gathered = None  # attention's backward, its only reader, is done; this node lives until the loss is gone
        if own_keys_N is not None:
            return grad_MKd.index_select(0, own_keys_N), None, None, None
        # Sorts by row on CUDA, where index_add would add with atomics; needs no segment bounds on the host.
        total_RE = torch.ops.aten.embedding_dense_backward(
            grad_MKd.flatten(1).float(), rows_M, ctx.first + ctx.shape[0], -1, False
        )
        return total_RE[ctx.first :].view(ctx.shape).to(grad_MKd.dtype), None, None, None


def saving_no_copy(*gathered: Gathered | Placed) -> AbstractContextManager[None]:
    """Within this context, autograd saves a tensor that lies in a gathered one as its place there."""

    def pack(tensor):
        storage = tensor.untyped_storage()._cdata  # which meta tensors have too
        for each in gathered:
            if each.storage == storage:
                return each, tensor.shape, tensor.stride(), tensor.storage_offset()
        return tensor

    def unpack(saved):
        if isinstance(saved, Tensor):
            return saved
        each, shape, stride, offset = saved
        return each.backward_copy().as_strided(shape, stride, offset)

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
