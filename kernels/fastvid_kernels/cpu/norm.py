"""Residual addition and RMSNorm or LayerNorm on CPUs.

Dimensions: N rows, n of a block, D channels.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..plain import wide
from . import rows
from .row_blocks import over_rows, row_blocks


def _forward(residual_ND, branch_ND, weight_D, eps, dtype):
    """Sum, normalised sum and reciprocal of the root mean square, [N, 1]."""
    N, D = residual_ND.shape
    given = [residual_ND] if branch_ND is None else [residual_ND, branch_ND]
    in_cpp = rows.serve(*given, weight_D, dtypes=[dtype, *(x.dtype for x in given)])
    if in_cpp:
        residual_ND, branch_ND = residual_ND.contiguous(), None if branch_ND is None else branch_ND.contiguous()
    total_ND = residual_ND if branch_ND is None else residual_ND.new_empty(N, D)
    y_ND = residual_ND.new_empty(N, D, dtype=dtype)
    rstd_N1 = residual_ND.new_empty(N, 1, dtype=torch.promote_types(residual_ND.dtype, torch.float32))
    if in_cpp:
        rows.norm_forward(residual_ND, branch_ND, wide(weight_D).contiguous(), total_ND, y_ND, rstd_N1, eps)
    else:
        _forward_chain(y_ND, residual_ND, branch_ND, total_ND, rstd_N1, weight_D=wide(weight_D), eps=eps)
    return total_ND, y_ND, rstd_N1


@over_rows
def _forward_chain(y_nD, residual_nD, branch_nD, total_nD, rstd_n1, *, weight_D, eps):
    if branch_nD is not None:
        residual_nD = total_nD.copy_(residual_nD + branch_nD)
    x_nD = wide(residual_nD)
    inverse_n1 = torch.linalg.vector_norm(x_nD, dim=1, keepdim=True).square_().div_(x_nD.shape[1]).add_(eps).rsqrt_()
    rstd_n1.copy_(inverse_n1)
    y_nD.copy_((x_nD * inverse_n1).mul_(weight_D))


def _backward(total_ND, rstd_N1, weight_D, grad_total_ND, grad_y_ND, branch_dtype, trained):
    """Gradients of residual, branch and weight; None where none is due."""
    grad_ND = torch.empty_like(total_ND, memory_format=torch.contiguous_format)
    apart = branch_dtype is not None and branch_dtype != total_ND.dtype
    grad_branch_ND = torch.empty_like(grad_ND, dtype=branch_dtype) if apart else None
    wide_D = wide(weight_D)
    grad_weight_D = torch.zeros_like(wide_D) if trained else None
    if not apart and rows.serve(total_ND, weight_D, dtypes=[total_ND.dtype, grad_y_ND.dtype]):
        total_ND, grad_y_ND = total_ND.contiguous(), grad_y_ND.contiguous()
        grad_total_ND = None if grad_total_ND is None else grad_total_ND.contiguous()
        rows.norm_backward(total_ND, rstd_N1, wide_D.contiguous(), grad_total_ND, grad_y_ND, grad_ND)
    else:
        _backward_chain(grad_ND, total_ND, rstd_N1, grad_total_ND, grad_y_ND, grad_branch_ND, weight_D=wide_D)
    if grad_weight_D is not None:
        for block in row_blocks(total_ND):
            grad_weight_D += torch.mv((wide(grad_y_ND[block]) * total_ND[block]).T, rstd_N1[block, 0])
    return (
        grad_ND,
        None if branch_dtype is None else grad_branch_ND if apart else grad_ND,
        None if grad_weight_D is None else grad_weight_D.to(weight_D.dtype),
    )


@over_rows
def _backward_chain(grad_out_nD, total_nD, rstd_n1, grad_total_nD, grad_y_nD, grad_branch_nD, *, weight_D):
    x_nD = wide(total_nD)
    grad_nD = wide(grad_y_nD) * weight_D
    along_n1 = torch.sum(grad_nD * x_nD, 1, keepdim=True).mul_(rstd_n1.pow(3)).div_(x_nD.shape[1])
    grad_nD = grad_nD.mul_(rstd_n1).addcmul_(x_nD, along_n1, value=-1)
    if grad_total_nD is not None:
        grad_nD += grad_total_nD
    grad_out_nD.copy_(grad_nD)
    if grad_branch_nD is not None:
        grad_branch_nD.copy_(grad_nD)


ADD_RMS_NORM = _forward, _backward


def add_layer_norm(
    residual_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, bias_D: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Sum and normalised sum, as `fastvid_kernels.add_layer_norm.add_layer_norm`."""
    if not rows.serve(*(x for x in (residual_ND, branch_ND, weight_D, bias_D) if x is not None)):
        total_ND = residual_ND if branch_ND is None else residual_ND + branch_ND
        return total_ND, functional.layer_norm(total_ND, weight_D.shape, weight_D, bias_D, eps)
    residual_ND, branch_ND = residual_ND.contiguous(), None if branch_ND is None else branch_ND.contiguous()
    total_ND = residual_ND if branch_ND is None else torch.empty_like(residual_ND)
    y_ND = torch.empty_like(residual_ND)
    rows.layer_norm(residual_ND, branch_ND, weight_D.contiguous(), bias_D.contiguous(), total_ND, y_ND, eps)
    return total_ND, y_ND


__all__ = ["ADD_RMS_NORM", "add_layer_norm"]
