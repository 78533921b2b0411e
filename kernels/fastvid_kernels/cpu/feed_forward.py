"""Activations of feed-forward blocks on CPUs: SwiGLU and quick-GELU.

Dimensions: N rows, n of a block, F channels of the feed-forward block.
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..plain import wide
from . import rows
from .row_blocks import over_rows


def _swiglu_forward(gate_up_NF):
    out_NF = gate_up_NF.new_empty(gate_up_NF.shape[0], gate_up_NF.shape[1] // 2)
    if rows.serve(gate_up_NF):
        rows.swiglu_forward(out_NF, gate_up_NF.contiguous())
    else:
        _swiglu_chain(out_NF, gate_up_NF)
    return out_NF


@over_rows
def _swiglu_chain(out_nF, gate_up_nF):
    gate_nF, up_nF = wide(gate_up_nF).chunk(2, 1)
    out_nF.copy_(functional.silu(gate_nF).mul_(up_nF))


def _swiglu_backward(gate_up_NF, grad_NF):
    grad_gate_up_NF = torch.empty_like(gate_up_NF, memory_format=torch.contiguous_format)
    if rows.serve(gate_up_NF):
        rows.swiglu_backward(grad_NF.contiguous(), gate_up_NF.contiguous(), grad_gate_up_NF)
    else:
        _swiglu_backward_chain(grad_NF, gate_up_NF, grad_gate_up_NF)
    return grad_gate_up_NF


@over_rows
def _swiglu_backward_chain(grad_nF, gate_up_nF, grad_gate_up_nF):
    F, grad_nF = grad_nF.shape[1], wide(grad_nF)
    gate_nF, up_nF = wide(gate_up_nF).chunk(2, 1)  # the whole row at once: rows of a part are slower to convert
    grad_gate_up_nF[:, F:] = functional.silu(gate_nF).mul_(grad_nF)
    grad_gate_up_nF[:, :F] = torch.ops.aten.silu_backward(grad_nF * up_nF, gate_nF)


SWIGLU = _swiglu_forward, _swiglu_backward


def quick_gelu(x: Tensor) -> Tensor:
    """x · sigmoid(1.702 x), as `fastvid_kernels.quick_gelu.quick_gelu`."""
    if not rows.serve(x):
        x_wide = wide(x)
        return (x_wide * torch.sigmoid(1.702 * x_wide)).to(x.dtype)
    x = x.contiguous()
    out = torch.empty_like(x)
    rows.quick_gelu(out, x)
    return out


__all__ = ["SWIGLU", "quick_gelu"]
