"""SwiGLU on the fused gate-up projection.

Dimensions: N rows, F channels of the feed-forward block.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import avx512_rows
from .dispatch import choose, launch
from .row_blocks import over_rows


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def swiglu_reference(gate_up_NF):
    """`swiglu` in plain differentiable torch."""
    gate_NF, up_NF = _wide(gate_up_NF).chunk(2, dim=-1)
    return (functional.silu(gate_NF) * up_NF).to(gate_up_NF.dtype)


def _tiles(N, F):
    """Columns of a program, programs per row, grid: 8 columns a thread, one 16-byte load of each 16-bit operand."""
    BLOCK_F = min(triton.next_power_of_2(max(F, 1)), 1024)
    blocks = triton.cdiv(F, BLOCK_F)
    return BLOCK_F, blocks, (N * blocks,)


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, out_ptr, F, blocks, BLOCK_F: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = program % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate_ptr = gate_up_ptr + row * 2 * F
    gate = tl.load(gate_ptr + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_ptr + F + columns, mask=inside).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_bwd_kernel(gate_up_ptr, grad_ptr, grad_gate_up_ptr, F, blocks, BLOCK_F: tl.constexpr):
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    columns = program % blocks * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate_ptr = gate_up_ptr + row * 2 * F
    gate = tl.load(gate_ptr + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_ptr + F + columns, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + columns, mask=inside).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1 - sigmoid))
    grad_gate_ptr = grad_gate_up_ptr + row * 2 * F
    tl.store(grad_gate_ptr + columns, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + F + columns, (grad * silu).to(grad_gate_up_ptr.dtype.element_ty), mask=inside)


@over_rows
def _forward(out_nF, gate_up_nF):
    """`swiglu` in plain torch, into `out_nF`."""
    gate_nF, up_nF = _wide(gate_up_nF).chunk(2, 1)
    out_nF.copy_(functional.silu(gate_nF).mul_(up_nF))


@over_rows
def _backward(grad_nF, gate_up_nF, grad_gate_up_nF):
    """The gradient in plain torch, into `grad_gate_up_nF`."""
    F, grad_nF = grad_nF.shape[1], _wide(grad_nF)
    gate_nF, up_nF = _wide(gate_up_nF).chunk(2, 1)  # the whole row at once: rows of a part are slower to convert
    grad_gate_up_nF[:, F:] = functional.silu(gate_nF).mul_(grad_nF)
    grad_gate_up_nF[:, :F] = torch.ops.aten.silu_backward(grad_nF * up_nF, gate_nF)


class _SwiGLU(torch.autograd.Function):
    """Saves its input and nothing else."""

    @staticmethod
    def forward(ctx, gate_up_NF, implementation):
        ctx.save_for_backward(gate_up_NF)
        ctx.implementation = implementation
        N, F = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
        out_NF = gate_up_NF.new_empty(N, F)
        if implementation == "triton":
            BLOCK_F, blocks, grid = _tiles(N, F)
            launch(_swiglu_fwd_kernel, grid, gate_up_NF.contiguous(), out_NF, F, blocks, BLOCK_F, num_warps=4)
        elif implementation == "avx512":
            avx512_rows.swiglu_forward(out_NF, gate_up_NF.contiguous())
        else:
            _forward(out_NF, gate_up_NF)
        return out_NF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF):
        (gate_up_NF,) = ctx.saved_tensors
        grad_gate_up_NF = torch.empty_like(gate_up_NF, memory_format=torch.contiguous_format)
        if ctx.implementation == "triton":
            N, F = grad_NF.shape
            BLOCK_F, blocks, grid = _tiles(N, F)
            launch(_swiglu_bwd_kernel, grid, gate_up_NF.contiguous(), grad_NF.contiguous(), grad_gate_up_NF, F, blocks,
                   BLOCK_F, num_warps=4)
        elif ctx.implementation == "avx512":
            avx512_rows.swiglu_backward(grad_NF.contiguous(), gate_up_NF.contiguous(), grad_gate_up_NF)
        else:
            _backward(grad_NF, gate_up_NF, grad_gate_up_NF)
        return grad_gate_up_NF, None


def swiglu(gate_up_NF: Tensor, *, impl: str = "auto") -> Tensor:
    """silu(gate) · up (arXiv:2002.05202).

    Args:
        gate_up_NF: [N, 2F], gate in the first half of the columns, up in the second; fp32, bf16 or fp16.
            Copied if not contiguous.
        impl: "auto" (Triton on CUDA tensors, C++ for bf16 on CPUs with AVX512-BF16, else torch), "triton", "avx512" or
            "reference" (plain torch).

    Returns:
        [N, F] in the input's dtype; computed in fp32, rounded once. Saved for backward: the input. Repeatable.

    Raises:
        ValueError: the shape does not fit, `impl` is unknown or cannot run here.
    """
    if gate_up_NF.dim() != 2 or gate_up_NF.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up must be [N, 2F], found {list(gate_up_NF.shape)}")
    return _SwiGLU.apply(gate_up_NF, choose(impl, gate_up_NF, name="swiglu", dtypes=[gate_up_NF.dtype]))


__all__ = ["swiglu", "swiglu_reference"]
