"""Residual addition and LayerNorm in one operation, without gradients: for the frozen vision towers.

Dimensions: N rows, D channels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from . import cpu
from .dispatch import launch, refuse_gradients, use_triton


def add_layer_norm_reference(
    residual_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """`add_layer_norm` in plain torch."""
    total_ND = residual_ND if branch_ND is None else residual_ND + branch_ND
    return total_ND, functional.layer_norm(total_ND, weight_D.shape, weight_D, bias_D, eps)


def _tiles(D):
    """Columns of a tile, which holds a whole row, and warps: 16 columns a thread."""
    BLOCK_D = triton.next_power_of_2(max(D, 32))
    return BLOCK_D, min(max(BLOCK_D // 512, 1), 16)


@triton.jit
def _add_layer_norm_kernel(
    residual_ptr, branch_ptr, weight_ptr, bias_ptr, total_ptr, y_ptr, D, eps, ADD: tl.constexpr, BLOCK_D: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    inside = columns < D
    x = tl.load(residual_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(branch_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        total = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + columns, total, mask=inside)
        x = total.to(tl.float32)  # the norm is that of the rounded sum, which the next layer reads
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x) / D, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred) / D + eps)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row * D + columns, y.to(y_ptr.dtype.element_ty), mask=inside)


def _forward_by_kernel(residual_ND, branch_ND, weight_D, bias_D, eps):
    N, D = residual_ND.shape
    residual_ND, add = residual_ND.contiguous(), branch_ND is not None
    branch_ND = branch_ND.contiguous() if add else residual_ND
    total_ND = torch.empty_like(residual_ND) if add else residual_ND
    y_ND = torch.empty_like(residual_ND)
    BLOCK_D, num_warps = _tiles(D)
    launch(
        _add_layer_norm_kernel,
        (N,),
        residual_ND,
        branch_ND,
        weight_D.contiguous(),
        bias_D.contiguous(),
        total_ND,
        y_ND,
        D,
        eps,
        add,
        BLOCK_D,
        num_warps=num_warps,
    )
    return total_ND, y_ND


def add_layer_norm(
    residual_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum (LayerNorm, arXiv:1607.06450).

    Args:
        residual_ND: [N, D] residual stream, fp32, bf16 or fp16.
        branch_ND: what a block adds to it, in the same dtype; None adds nothing.
        weight_D, bias_D: gain and offset, in the same dtype.
        eps: added to the variance.
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`add_layer_norm_reference`).

    Returns:
        (sum, normalised sum), both in the residual's dtype; without a branch the sum is the residual itself. The
        kernel's sums and products are fp32, rounded once; the norm is that of the rounded sum.

    Raises:
        ValueError: shapes or dtypes do not fit, a gradient would be due, `impl` is unknown or cannot run here.
    """
    tensors = [x for x in (residual_ND, branch_ND, weight_D, bias_D) if x is not None]
    shape = residual_ND.shape
    expected = [shape] * (len(tensors) - 2) + [shape[1:]] * 2
    if len(shape) != 2 or [x.shape for x in tensors] != expected:
        raise ValueError(
            "add_layer_norm: residual and branch must be [N, D], weight and bias [D], found "
            f"{[list(x.shape) for x in tensors]}"
        )
    if any(x.dtype != residual_ND.dtype for x in tensors):
        raise ValueError(f"add_layer_norm: all must have one dtype, found {[str(x.dtype) for x in tensors]}")
    refuse_gradients(*tensors, name="add_layer_norm")
    if not use_triton(impl, *tensors, name="add_layer_norm"):
        compute = add_layer_norm_reference if impl == "reference" else cpu.add_layer_norm
        return compute(residual_ND, branch_ND, weight_D, bias_D, eps)
    return _forward_by_kernel(residual_ND, branch_ND, weight_D, bias_D, eps)


__all__ = ["add_layer_norm", "add_layer_norm_reference"]
