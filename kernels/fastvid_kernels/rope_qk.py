"""Rotary position embedding of queries and keys where they lie: in the packed rows of the fused QKV projection.

Dimensions: N rows, E = (H + 2K)·d columns of a row, H query heads, K key/value heads, A = H + 2K heads of a
row, d channels per head, h = d / 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .dispatch import launch, use_triton
from .plain import rotary_angles, wide


def rope_qk_reference(
    qkv_NE: Tensor, positions_N: Tensor, inv_freq_h: Tensor, num_heads: int, num_kv_heads: int, scale: float = 1.0
) -> Tensor:
    """`rope_qk` in plain differentiable torch."""
    cos_N1h, sin_N1h = rotary_angles(positions_N, inv_freq_h, scale)
    rows_NAd = qkv_NE.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    first_NAh, second_NAh = wide(rows_NAd[:, : num_heads + num_kv_heads]).chunk(2, dim=-1)
    rotated_NAd = torch.cat(
        [first_NAh * cos_N1h - second_NAh * sin_N1h, second_NAh * cos_N1h + first_NAh * sin_N1h], dim=-1
    )
    return torch.cat([rotated_NAd.to(qkv_NE.dtype), rows_NAd[:, num_heads + num_kv_heads :]], dim=1).flatten(1)


def _tiles(heads, half):
    """Heads and columns of a program's tile, programs per row, warps: 16 pairs of channels a thread."""
    BLOCK_h = triton.next_power_of_2(half)
    BLOCK_A = min(triton.next_power_of_2(heads), max(1024 // BLOCK_h, 1))
    return BLOCK_A, BLOCK_h, triton.cdiv(heads, BLOCK_A), min(max(BLOCK_A * BLOCK_h // 512, 1), 8)


@triton.jit
def _cos_sin(angle):
    """Cosine and sine within 2 units in the last place of 1, for angles up to 200,000.

    The hardware's approximations lose the angle from a few hundred on. Here whole quarter turns are taken off first:
    pi/2 in four parts, of which three have 7 bits, so that their multiples by up to 2**17 quarter turns are exact. What
    remains, within pi/4 of 0, goes into the polynomials of the Cephes library.
    """
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = angle - turns * 1.5625
    r -= turns * 0.0081787109375
    r -= turns * 0.00011730194091796875
    r -= turns * 3.1391647326017846e-07
    r2 = r * r
    sin = r + r * r2 * (-1.6666654611e-1 + r2 * (8.3321608736e-3 + r2 * -1.9515295891e-4))
    cos = 1 - 0.5 * r2 + r2 * r2 * (4.166664568298827e-2 + r2 * (-1.388731625493765e-3 + r2 * 2.443315711809948e-5))
    quarter = turns.to(tl.int32) & 3
    swapped = (quarter & 1) != 0
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -cos, cos), tl.where(quarter >= 2, -sin, sin)


@triton.jit
def cos_sin_of(position_ptr, inv_freq_ptr, channels, half, scale):
    """Cosine and sine of a row's angles, times `scale`: [1, channels] each."""
    inv_freq = tl.load(inv_freq_ptr + channels, mask=channels < half, other=0.0)
    cos, sin = _cos_sin(tl.load(position_ptr).to(tl.float32) * inv_freq)
    return (cos * scale)[None, :], (sin * scale)[None, :]


@triton.jit
def halves(ptr, offsets, inside, half):
    """Both halves of heads, fp32."""
    first = tl.load(ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    return first, tl.load(ptr + offsets + half, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def turned_back(first, second, cos, sin):
    """Heads' halves as they were before they were rotated."""
    return first * cos + second * sin, second * cos - first * sin


@triton.jit(do_not_specialize_on_alignment=["positions_ptr"])
def _rope_qk_kernel(
    x_ptr,
    out_ptr,
    positions_ptr,
    inv_freq_ptr,
    scale,
    row_heads,
    out_heads,
    rotated_heads,
    written_heads,
    half,
    BLOCKS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_h: tl.constexpr,
):
    """Heads up to `rotated_heads` of a row are turned, those up to `written_heads` copied, the rest left alone."""
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    heads = program % BLOCKS * BLOCK_A + tl.arange(0, BLOCK_A)
    channels = tl.arange(0, BLOCK_h)
    inside = (heads < written_heads)[:, None] & (channels < half)[None, :]
    offsets = heads[:, None] * 2 * half + channels[None, :]
    x_ptr += row * row_heads * 2 * half
    out_ptr += row * out_heads * 2 * half
    first = tl.load(x_ptr + offsets, mask=inside).to(tl.float32)
    second = tl.load(x_ptr + offsets + half, mask=inside).to(tl.float32)

    cos, sin = cos_sin_of(positions_ptr + row, inv_freq_ptr, channels, half, scale)
    if INVERSE:
        sin = -sin
    turned = (heads < rotated_heads)[:, None]
    rotated_first = tl.where(turned, first * cos - second * sin, first)
    rotated_second = tl.where(turned, second * cos + first * sin, second)
    tl.store(out_ptr + offsets, rotated_first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + offsets + half, rotated_second.to(out_ptr.dtype.element_ty), mask=inside)


def rotate_heads(
    x_NE: Tensor,
    out_NX: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    scale: float,
    rotated: int,
    written: int,
    *,
    inverse: bool = False,
) -> None:
    """The first `written` heads of each row of `x_NE` to those of `out_NX`, the first `rotated` of them rotated."""
    half = inv_freq_h.shape[0]
    if x_NE.shape[0] and written:
        BLOCK_A, BLOCK_h, blocks, num_warps = _tiles(written, half)
        launch(
            _rope_qk_kernel,
            (x_NE.shape[0] * blocks,),
            x_NE,
            out_NX,
            positions_N.contiguous(),
            inv_freq_h.contiguous(),
            scale,
            x_NE.shape[1] // (2 * half),
            out_NX.shape[1] // (2 * half),
            rotated,
            written,
            half,
            blocks,
            inverse,
            BLOCK_A,
            BLOCK_h,
            num_warps=num_warps,
        )


def _rotate_by_kernel(qkv_NE, out_NE, positions_N, inv_freq_h, num_heads, num_kv_heads, scale, inverse):
    """Rotate `qkv_NE` into `out_NE`, contiguous both, or a new tensor; where they are one, the values are not
    touched."""
    if out_NE is None:
        qkv_NE = qkv_NE.contiguous()
        out_NE = torch.empty_like(qkv_NE)
    rotated = num_heads + num_kv_heads
    written = rotated if out_NE is qkv_NE else rotated + num_kv_heads
    rotate_heads(qkv_NE, out_NE, positions_N, inv_freq_h, scale, rotated, written, inverse=inverse)
    return out_NE


class _RopeQK(torch.autograd.Function):
    """Saves positions and frequencies; backward rotates the other way."""

    @staticmethod
    def forward(ctx, qkv_NE, positions_N, inv_freq_h, num_heads, num_kv_heads, scale, inplace, rotate):
        ctx.save_for_backward(positions_N, inv_freq_h)
        ctx.settings = num_heads, num_kv_heads, scale
        ctx.rotate = rotate
        if inplace:
            ctx.mark_dirty(qkv_NE)
        return rotate(qkv_NE, qkv_NE if inplace else None, positions_N, inv_freq_h, *ctx.settings, False)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NE):
        # Not in place: autograd may hand the same gradient to others.
        return ctx.rotate(grad_NE, None, *ctx.saved_tensors, *ctx.settings, True), *[None] * 7


def rope_qk(
    qkv_NE: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    scale: float = 1.0,
    inplace: bool = False,
    impl: str = "auto",
) -> Tensor:
    """Rotate queries and keys by their rows' positions (arXiv:2104.09864; halves paired as in Hugging Face's LLaMA).

    Args:
        qkv_NE: [N, (H+2K)·d] queries, keys, values of each row; fp32, bf16 or fp16. Contiguous if `inplace`.
        positions_N: [N] int32 or int64.
        inv_freq_h: [d/2] fp32, radians per position. Angles, their product rounded to fp32, are at most 200,000.
        num_heads, num_kv_heads: H, K.
        scale: factor on cosine and sine (YaRN's attention factor).
        inplace: write into `qkv_NE`, which must be nobody's saved tensor (a frozen linear's output is not).
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`rope_qk_reference`).

    Returns:
        [N, (H+2K)·d] with queries and keys rotated, values as they were; computed in fp32, rounded once.
        Saved for backward: positions and frequencies. Repeatable.

    Raises:
        ValueError: shapes do not fit, strides do not allow `inplace`, `impl` is unknown or cannot
            run here.
    """
    N, h = qkv_NE.shape[0], inv_freq_h.shape[0]
    if qkv_NE.shape != (N, (num_heads + 2 * num_kv_heads) * 2 * h) or positions_N.shape != (N,):
        raise ValueError(
            f"rope_qk: rows {list(qkv_NE.shape)} and positions {list(positions_N.shape)} do not fit "
            f"{num_heads} + 2·{num_kv_heads} heads of {2 * h} channels"
        )
    if inplace and not qkv_NE.is_contiguous():
        raise ValueError(f"rope_qk: in place needs contiguous rows, found strides {qkv_NE.stride()}")
    in_triton = use_triton(impl, qkv_NE, positions_N, inv_freq_h, name="rope_qk")
    settings = positions_N, inv_freq_h, num_heads, num_kv_heads, scale
    if impl == "reference":
        rotated_NE = rope_qk_reference(qkv_NE, *settings)
        return qkv_NE.copy_(rotated_NE) if inplace else rotated_NE
    return _RopeQK.apply(qkv_NE, *settings, inplace, _rotate_by_kernel if in_triton else cpu.rotate)


__all__ = ["cos_sin_of", "halves", "rope_qk", "rope_qk_reference", "rotate_heads", "turned_back"]
