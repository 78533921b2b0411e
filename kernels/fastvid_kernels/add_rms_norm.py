"""Residual addition and RMSNorm in one operation.

Dimensions: N rows, D channels.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_rms_norm_reference(residual_ND, branch_ND, weight_D, eps, dtype):
    """`add_rms_norm` in plain differentiable torch."""
    if branch_ND is not None:
        residual_ND = residual_ND + branch_ND
    x_ND = _wide(residual_ND)
    y_ND = x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps) * _wide(weight_D)
    return residual_ND, y_ND.to(dtype)


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum and one fp32 number per row; the weight's gradient is computed only where it is due."""

    @staticmethod
    def forward(ctx, residual_ND, branch_ND, weight_D, eps, dtype):
        total_ND = residual_ND if branch_ND is None else residual_ND + branch_ND
        x_ND = _wide(total_ND)
        rstd_N1 = torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps)
        y_ND = (x_ND * rstd_N1 * _wide(weight_D)).to(dtype)
        ctx.save_for_backward(total_ND, rstd_N1, weight_D)
        ctx.branch_dtype = None if branch_ND is None else branch_ND.dtype
        ctx.set_materialize_grads(False)
        return total_ND, y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total_ND, grad_y_ND):
        total_ND, rstd_N1, weight_D = ctx.saved_tensors
        grad_weight_D = None
        if grad_y_ND is None:
            grad_ND = grad_total_ND
        else:
            grad_y_ND = _wide(grad_y_ND)
            unit_ND = _wide(total_ND) * rstd_N1
            if ctx.needs_input_grad[2]:
                grad_weight_D = (grad_y_ND * unit_ND).sum(0).to(weight_D.dtype)
            grad_ND = grad_y_ND * _wide(weight_D)
            grad_ND = rstd_N1 * (grad_ND - unit_ND * (grad_ND * unit_ND).mean(-1, keepdim=True))
            if grad_total_ND is not None:
                grad_ND += grad_total_ND
        if grad_ND is None:
            return None, None, None, None, None
        grad_branch_ND = None if ctx.branch_dtype is None else grad_ND.to(ctx.branch_dtype)
        return grad_ND.to(total_ND.dtype), grad_branch_ND, grad_weight_D, None, None


def add_rms_norm(residual_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype,
                 *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum (RMSNorm, arXiv:1910.07467).

    Args:
        residual_ND: residual stream, fp32, bf16 or fp16.
        branch_ND: what a block adds to it, in any of these dtypes; None adds nothing.
        weight_D: gain, in any dtype. Its gradient is computed only if it requires one.
        eps: added to the mean square.
        dtype: of the normalised rows.
        impl: "auto" or "reference": plain torch.

    Returns:
        (sum in the residual's dtype, normalised sum in `dtype`). Sums of squares and products are fp32, rounded once.
        Saved for backward: the sum, and [N] fp32. Repeatable.

    Raises:
        ValueError: `impl` is not available here.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"add_rms_norm has no implementation {impl!r} here; use 'auto' or 'reference'")
    return _AddRMSNorm.apply(residual_ND, branch_ND, weight_D, eps, dtype)


__all__ = ["add_rms_norm", "add_rms_norm_reference"]
