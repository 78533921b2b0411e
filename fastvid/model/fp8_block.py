"""Pieces of a frozen layer whose rows and gradients go from the kernel that makes them to an FP8 product in e4m3.

Dimensions: N rows, D channels, F channels of the feed-forward block.
"""

import torch
from fastvid_kernels.quantize_fp8 import Fp8Rows
from fastvid_kernels.swiglu import swiglu_backward_fp8, swiglu_fp8
from torch.autograd.function import once_differentiable

from fastvid.model.quantize import Fp8Linear


class _GateUpSwiGLU(torch.autograd.Function):
    """Saves the product."""

    @staticmethod
    def forward(ctx, stand_in_ND, bits_ND, scale_N, gate_up):
        ctx.gate_up = gate_up
        gate_up_NF = gate_up.product_of_fp8(bits_ND, scale_N, slice(None), stand_in_ND.dtype)
        ctx.save_for_backward(gate_up_NF)
        bits_NF, scale_N = swiglu_fp8(gate_up_NF)
        ctx.mark_non_differentiable(bits_NF, scale_N)
        return Fp8Rows.stand_in(gate_up_NF, bits_NF.shape), bits_NF, scale_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF, *_):
        (gate_up_NF,) = ctx.saved_tensors
        rows = swiglu_backward_fp8(gate_up_NF, grad_NF)
        return ctx.gate_up.gradient_of_fp8(*rows, slice(None), grad_NF.dtype), None, None, None


def gate_up_swiglu(x_ND: Fp8Rows, gate_up: Fp8Linear) -> Fp8Rows:
    """`swiglu(gate_up(x))`, to the bit, whose rows and gradient leave SwiGLU's kernels in e4m3.

    Args:
        x_ND: rows [N, D].
        gate_up: the matrix of gate and up, [2F, D].

    Returns:
        Rows [N, F]. Saved for backward: the product of `gate_up`.
    """
    return Fp8Rows(*_GateUpSwiGLU.apply(*x_ND, gate_up))
