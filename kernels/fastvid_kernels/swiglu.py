"""SwiGLU on the fused gate-up projection.

Dimensions: N rows, F channels of the feed-forward block.
"""

from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from . import cpu
from .dispatch import launch, use_triton
from .plain import last_rows, wide
from .quantize_fp8 import divided, magnitude, quantize_fp8, quantize_fp8_reference, scale_of

# Channels of the longest tile that `swiglu_fp8` and its gradient hold in registers.
LONGEST_FP8_ROW = 16384


def swiglu_reference(gate_up_NF: Tensor) -> Tensor:
    """`swiglu` in plain differentiable torch."""
    gate_NF, up_NF = wide(gate_up_NF).chunk(2, dim=-1)
    return (functional.silu(gate_NF) * up_NF).to(gate_up_NF.dtype)


def swiglu_fp8_reference(gate_up_NF: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_fp8` in plain torch."""
    return quantize_fp8_reference(swiglu_reference(gate_up_NF))


def swiglu_backward_fp8_reference(gate_up_NF: Tensor, grad_NF: Tensor) -> tuple[Tensor, Tensor]:
    """`swiglu_backward_fp8` in plain torch."""
    with torch.enable_grad():
        leaf_NF = gate_up_NF.detach().requires_grad_()
        (grad_gate_up_NF,) = torch.autograd.grad(swiglu_reference(leaf_NF), leaf_NF, grad_NF)
    return quantize_fp8_reference(grad_gate_up_NF)


def _tiles(N, F):
    """Columns of a program, programs per row, grid: 8 columns a thread, one 16-byte load of each 16-bit operand."""
    BLOCK_F = min(triton.next_power_of_2(max(F, 1)), 1024)
    blocks = triton.cdiv(F, BLOCK_F)
    return BLOCK_F, blocks, (N * blocks,)


def _fp8_tiles(F, backward):
    """(channels of a tile, warps) with which a whole row lies in registers, where a thread has enough; else None.

    Forward takes 32 channels a thread. Backward, which has three numbers of each and makes two, takes 16.
    """
    BLOCK_F = triton.next_power_of_2(max(F, 512))
    return (BLOCK_F, BLOCK_F // (512 if backward else 1024) or 1) if BLOCK_F <= LONGEST_FP8_ROW else None


@triton.jit
def _product(gate, up):
    return gate * tl.sigmoid(gate) * up


@triton.jit
def _gradients(gate, up, grad):
    """Of gate and up."""
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    return grad * up * (sigmoid + silu * (1 - sigmoid)), grad * silu


@triton.jit
def _swiglu_fwd_kernel(gate_up_ptr, out_ptr, F, BLOCKS: tl.constexpr, BLOCK_F: tl.constexpr):
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    columns = program % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate_ptr = gate_up_ptr + row * 2 * F
    gate = tl.load(gate_ptr + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_ptr + F + columns, mask=inside).to(tl.float32)
    out = _product(gate, up)
    tl.store(out_ptr + row * F + columns, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_bwd_kernel(gate_up_ptr, grad_ptr, grad_gate_up_ptr, F, BLOCKS: tl.constexpr, BLOCK_F: tl.constexpr):
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    columns = program % BLOCKS * BLOCK_F + tl.arange(0, BLOCK_F)
    inside = columns < F
    gate_ptr = gate_up_ptr + row * 2 * F
    gate = tl.load(gate_ptr + columns, mask=inside).to(tl.float32)
    up = tl.load(gate_ptr + F + columns, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + columns, mask=inside).to(tl.float32)
    grad_gate, grad_up = _gradients(gate, up, grad)
    grad_gate_ptr = grad_gate_up_ptr + row * 2 * F
    tl.store(grad_gate_ptr + columns, grad_gate.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_gate_ptr + F + columns, grad_up.to(grad_gate_up_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_fp8_fwd_kernel(gate_up_ptr, bits_ptr, scale_ptr, F, BLOCK_F: tl.constexpr):
    """One row a program, rounded to the dtype that it would have in memory, then quantised."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_F)
    inside = columns < F
    gate_ptr = gate_up_ptr + row * 2 * F
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F + columns, mask=inside, other=0.0).to(tl.float32)
    out = _product(gate, up).to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    scale = scale_of(tl.max(magnitude(out), 0))
    tl.store(scale_ptr + row, scale)
    tl.store(bits_ptr + row * F + columns, divided(out, scale), mask=inside)


@triton.jit
def _swiglu_fp8_bwd_kernel(gate_up_ptr, grad_ptr, bits_ptr, scale_ptr, F, BLOCK_F: tl.constexpr):
    """The gradient's row likewise: both halves have one scale."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_F)
    inside = columns < F
    gate_ptr = gate_up_ptr + row * 2 * F
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + F + columns, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * F + columns, mask=inside, other=0.0).to(tl.float32)
    grad_gate, grad_up = _gradients(gate, up, grad)
    grad_gate = grad_gate.to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    grad_up = grad_up.to(gate_up_ptr.dtype.element_ty).to(tl.float32)
    scale = scale_of(tl.max(tl.maximum(magnitude(grad_gate), magnitude(grad_up)), 0))
    tl.store(scale_ptr + row, scale)
    bits_ptr += row * 2 * F
    tl.store(bits_ptr + columns, divided(grad_gate, scale), mask=inside)
    tl.store(bits_ptr + F + columns, divided(grad_up, scale), mask=inside)


def _forward_by_kernel(gate_up_NF):
    N, F = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    out_NF = gate_up_NF.new_empty(N, F)
    BLOCK_F, blocks, grid = _tiles(N, F)
    launch(_swiglu_fwd_kernel, grid, gate_up_NF.contiguous(), out_NF, F, blocks, BLOCK_F, num_warps=4)
    return out_NF


def _backward_by_kernel(gate_up_NF, grad_NF):
    gate_up_NF = gate_up_NF.contiguous()
    grad_gate_up_NF = torch.empty_like(gate_up_NF)
    N, F = grad_NF.shape
    BLOCK_F, blocks, grid = _tiles(N, F)
    launch(_swiglu_bwd_kernel, grid, gate_up_NF, grad_NF.contiguous(), grad_gate_up_NF, F, blocks, BLOCK_F, num_warps=4)
    return grad_gate_up_NF


_KERNELS = _forward_by_kernel, _backward_by_kernel


class _SwiGLU(torch.autograd.Function):
    """Saves its input and nothing else."""

    @staticmethod
    def forward(ctx, gate_up_NF, passes, every_NF):
        ctx.save_for_backward(gate_up_NF)
        forward, ctx.backward_pass = passes
        if every_NF is None:
            return forward(gate_up_NF)
        ctx.set_materialize_grads(False)
        out_NF = forward(every_NF)
        ctx.mark_non_differentiable(out_NF)
        return last_rows(out_NF, len(gate_up_NF)), out_NF

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF, *_):
        return None if grad_NF is None else ctx.backward_pass(*ctx.saved_tensors, grad_NF), None, None


@overload
def swiglu(gate_up_NF: Tensor, *, every_NF: None = None, impl: str = "auto") -> Tensor: ...


@overload
def swiglu(gate_up_NF: Tensor, *, every_NF: Tensor | None, impl: str = "auto") -> Tensor | tuple[Tensor, Tensor]: ...


def swiglu(gate_up_NF: Tensor, *, every_NF: Tensor | None = None, impl: str = "auto") -> Tensor | tuple[Tensor, Tensor]:
    """silu(gate) · up (arXiv:2002.05202).

    Args:
        gate_up_NF: [N, 2F], gate in the first half of the columns, up in the second; fp32, bf16 or fp16.
            Copied if not contiguous.
        every_NF: the same with rows before them, which get no gradient. One pass takes all.
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`swiglu_reference`).

    Returns:
        [N, F] in the input's dtype; with `every_NF`, (that, the same of all its rows without gradient). Computed in
        fp32, rounded once. Saved for backward: the input. Repeatable.

    Raises:
        ValueError: the shape does not fit, `impl` is unknown or cannot run here.
    """
    if gate_up_NF.dim() != 2 or gate_up_NF.shape[1] % 2:
        raise ValueError(f"swiglu: gate_up must be [N, 2F], found {list(gate_up_NF.shape)}")
    in_triton = use_triton(impl, gate_up_NF, name="swiglu")
    if impl == "reference":
        found = swiglu_reference(gate_up_NF)
        return found if every_NF is None else (found, swiglu_reference(every_NF.detach()))
    return _SwiGLU.apply(gate_up_NF, _KERNELS if in_triton else cpu.SWIGLU, every_NF)


def _empty_fp8(like, channels):
    """(bits, scales) of as many rows, yet to be written."""
    bits_NC = like.new_empty(len(like), channels, dtype=torch.float8_e4m3fn)
    return bits_NC, like.new_empty(len(like), dtype=torch.float32)


@torch.no_grad()
def swiglu_fp8(gate_up_NF: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """`swiglu` whose rows are quantised as `quantize_fp8` does before they leave.

    Args:
        gate_up_NF: as for `swiglu`.
        impl: "auto" (Triton on CUDA tensors, else torch), "triton" or "reference" (plain torch).

    Returns:
        (float8_e4m3fn [N, F], scale [N] fp32), the bits of the two operations one after the other; no gradient follows.

    Raises:
        ValueError: `impl` is unknown or cannot run here.
    """
    if not use_triton(impl, gate_up_NF, name="swiglu_fp8"):
        return swiglu_fp8_reference(gate_up_NF)
    N, F = gate_up_NF.shape[0], gate_up_NF.shape[1] // 2
    tiles = _fp8_tiles(F, backward=False)
    if tiles is None:
        return quantize_fp8(swiglu(gate_up_NF, impl=impl), impl=impl)
    bits_NF, scale_N = _empty_fp8(gate_up_NF, F)
    if N:
        launch(
            _swiglu_fp8_fwd_kernel,
            (N,),
            gate_up_NF.contiguous(),
            bits_NF.view(torch.uint8),
            scale_N,
            F,
            tiles[0],
            num_warps=tiles[1],
        )
    return bits_NF, scale_N


@torch.no_grad()
def swiglu_backward_fp8(gate_up_NF: Tensor, grad_NF: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """The gradient of `swiglu`, quantised likewise before it leaves.

    Args:
        gate_up_NF: what `swiglu` got, [N, 2F].
        grad_NF: the gradient of what it returned, [N, F].
        impl: as for `swiglu_fp8`.

    Returns:
        (float8_e4m3fn [N, 2F], scale [N] fp32): the gradient of `gate_up_NF`, rounded to its dtype, then quantised.

    Raises:
        ValueError: `impl` is unknown or cannot run here.
    """
    if not use_triton(impl, gate_up_NF, grad_NF, name="swiglu_backward_fp8"):
        return swiglu_backward_fp8_reference(gate_up_NF, grad_NF)
    N, F = grad_NF.shape
    tiles = _fp8_tiles(F, backward=True)
    gate_up_NF, grad_NF = gate_up_NF.contiguous(), grad_NF.contiguous()
    if tiles is None:
        return quantize_fp8(_backward_by_kernel(gate_up_NF, grad_NF), impl=impl)
    bits_NF, scale_N = _empty_fp8(gate_up_NF, 2 * F)
    if N:
        launch(
            _swiglu_fp8_bwd_kernel,
            (N,),
            gate_up_NF,
            grad_NF,
            bits_NF.view(torch.uint8),
            scale_N,
            F,
            tiles[0],
            num_warps=tiles[1],
        )
    return bits_NF, scale_N


__all__ = [
    "swiglu",
    "swiglu_backward_fp8",
    "swiglu_backward_fp8_reference",
    "swiglu_fp8",
    "swiglu_fp8_reference",
    "swiglu_reference",
]
