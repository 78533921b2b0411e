"""SwiGLU on the fused gate-up projection.

Dimensions: N rows, F channels of the feed-forward block.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu_reference(gate_up_NF):
    """`swiglu` in plain differentiable torch."""
    gate_NF, up_NF = _wide(gate_up_NF).chunk(2, dim=-1)
    return (functional.silu(gate_NF) * up_NF).to(gate_up_NF.dtype)


class _SwiGLU(torch.autograd.Function):
    """Saves its input and nothing else."""

    @staticmethod
    def forward(ctx, gate_up_NF):
        ctx.save_for_backward(gate_up_NF)
        return swiglu_reference(gate_up_NF)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF):
        (gate_up_NF,) = ctx.saved_tensors
        gate_NF, up_NF = _wide(gate_up_NF).chunk(2, dim=-1)
        grad_NF = _wide(grad_NF)
        sigmoid_NF = torch.sigmoid(gate_NF)
        silu_NF = gate_NF * sigmoid_NF
        grad_gate_NF = grad_NF * up_NF * (sigmoid_NF + silu_NF * (1 - sigmoid_NF))
        grad_gate_up_NF = torch.empty_like(gate_up_NF)
        half = gate_NF.shape[-1]
        grad_gate_up_NF[..., :half] = grad_gate_NF
        grad_gate_up_NF[..., half:] = grad_NF * silu_NF
        return grad_gate_up_NF


def swiglu(gate_up_NF: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) · up (arXiv:2002.05202).

    Args:
        gate_up_NF: [N, 2F], gate in the first half of the columns, up in the second; fp32, bf16 or fp16.
        impl: "auto" or "reference": plain torch.

    Returns:
        [N, F] in the input's dtype; computed in fp32, rounded once. Saved for backward: the input. Repeatable.

    Raises:
        ValueError: `impl` is not available here.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"swiglu has no implementation {impl!r} here; use 'auto' or 'reference'")
    return _SwiGLU.apply(gate_up_NF)


__all__ = ["swiglu", "swiglu_reference"]
