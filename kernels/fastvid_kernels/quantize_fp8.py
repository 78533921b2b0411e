"""Rows to FP8 (e4m3) with a scale per row or one for all, and products of such rows.

Dimensions: N rows, D channels; of a product N and M rows, K channels of both.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton.language.target_info import cuda_capability_geq

from .dispatch import launch, on_gpu, use_triton

FP8_CAPABILITY = (8, 9)  # of the first GPUs with FP8 units
# Sides of FP8 matrices, and the outputs that a product takes of one, are multiples of this.
FP8_SIDE = 16
LARGEST = tl.constexpr(448.0)
# A row of zeros (or nearly) is divided by this part of 448, not by 0.
SMALLEST_SCALE = tl.constexpr(2.0**-100)


class Fp8Rows(NamedTuple):
    """Rows that left the kernel that made them in e4m3, on their way to a product.

    Attributes:
        stand_in_ND: what autograd differentiates in their place: of the shape and dtype of the rows before they were
            quantised. From a kernel it takes no memory, and its values mean nothing.
        bits_ND: float8_e4m3fn.
        scale_N: fp32; the rows are bits · scale.
    """

    stand_in_ND: Tensor
    bits_ND: Tensor
    scale_N: Tensor

    @staticmethod
    def stand_in(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """One of `shape`, on the device of `like`; its dtype too if none is given. No view, of which FSDP2 warns."""
        return like.new_empty_strided(shape, (0,) * len(shape), dtype=dtype)

    @staticmethod
    def empty(like: Tensor, rows: int, channels: int, dtype: torch.dtype) -> "Fp8Rows":
        """Rows yet to be written, on the device of `like`; `dtype` is the stand-in's."""
        return Fp8Rows(
            Fp8Rows.stand_in(like, (rows, channels), dtype),
            like.new_empty(rows, channels, dtype=torch.float8_e4m3fn),
            like.new_empty(rows, dtype=torch.float32),
        )


class BackInFp8(NamedTuple):
    """Rows whose gradient the kernel that makes it quantises, on its way back to the product that they come from.

    They have one reader, a norm: gradients in e4m3 cannot be added.

    Attributes:
        rows_ND: the rows, to autograd without a gradient.
        bits_ND: float8_e4m3fn, and
        scale_N: fp32: what autograd differentiates in their place. Their gradients are the bits and the scales of
            the rows' gradient. They take no memory, and their values mean nothing.
    """

    rows_ND: Tensor
    bits_ND: Tensor
    scale_N: Tensor

    @staticmethod
    def of(rows_ND: Tensor) -> "BackInFp8":
        """`rows_ND` with what an autograd function returns beside them."""
        kinds = (rows_ND.shape, torch.float8_e4m3fn), (rows_ND.shape[:1], torch.float32)
        return BackInFp8(rows_ND, *(Fp8Rows.stand_in(rows_ND, *kind) for kind in kinds))

    def plain(self) -> Tensor:
        """The rows for any reader: their gradient is quantised where it comes back."""
        return _Plain.apply(*self)


class _Plain(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx, rows_ND, bits_ND, scale_N):
        return rows_ND.view_as(rows_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        return None, *quantize_fp8(grad_ND)


def quantize_fp8_reference(x_ND: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_fp8` in plain torch."""
    x_ND = x_ND.float()
    if scale is None:
        scale_N = (x_ND.abs().amax(-1) * (1 / LARGEST.value)).clamp(min=SMALLEST_SCALE.value)
    else:
        scale_N = scale.float().expand(x_ND.shape[0])
    unit_ND = (x_ND * (1 / scale_N)[:, None]).clamp(-LARGEST.value, LARGEST.value)
    return unit_ND.to(torch.float8_e4m3fn), scale_N if scale is None else scale


def _tiles(channels):
    """(channels of a tile, warps): a row of up to 16384 stays in registers, 16 or 32 values per thread; longer rows
    pass in tiles of 8192, of which the last wastes less."""
    block = triton.next_power_of_2(channels)
    block = block if block <= 16384 else 8192
    return block, max(1, min(16, block // 512))


@triton.jit
def _to_e4m3(x):
    """Bits of the nearest e4m3 number, ties to even; ±448 for what is beyond it. NaN stays NaN."""
    if cuda_capability_geq(8, 9):
        bits = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)  # an instruction that saturates by itself
    else:
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        word = x.to(tl.uint32, bitcast=True)
        magnitude = word & 0x7FFFFFFF
        # Normal numbers keep three of 23 mantissa bits, and their exponent's bias falls from 127 to 7.
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6 numbers are multiples of 2^-9: the unit in the last place of 2^14.
        subnormal = (tl.abs(x) + 16384.0).to(tl.uint32, bitcast=True) & 0xF
        small = tl.where(magnitude < 0x3C800000, subnormal, normal)
        bits = (tl.where(magnitude > 0x7F800000, 0x7F, small) | ((word >> 24) & 0x80)).to(tl.uint8)
    return bits


@triton.jit
def magnitude(x):
    """|x| of fp32 as integers of the same order, so that the maximum of a row with a NaN is a NaN."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def scale_of(top):
    """A row's scale, from its largest `magnitude`."""
    top = top.to(tl.float32, bitcast=True)
    return tl.maximum(top * (1 / LARGEST), SMALLEST_SCALE, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def divided(x, scale):
    """Bits of x ÷ scale in e4m3."""
    return _to_e4m3(x * tl.div_rn(1.0, scale))


@triton.jit
def _quantize_fp8_kernel(
    x_ptr, out_ptr, scale_ptr, channels, row_stride, BY_ROW: tl.constexpr, ONE_TILE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row a program; rows longer than a tile are read twice, the second time from the caches."""
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * row_stride
    out_ptr += row * channels
    columns = tl.arange(0, BLOCK)
    if ONE_TILE:
        x = tl.load(x_ptr + columns, mask=columns < channels, other=0.0).to(tl.float32)
        if BY_ROW:
            top = tl.max(magnitude(x), 0)
    elif BY_ROW:
        largest = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, channels, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < channels, other=0.0).to(tl.float32)
            largest = tl.maximum(largest, magnitude(x))
        top = tl.max(largest, 0)
    if BY_ROW:
        scale = scale_of(top)
        tl.store(scale_ptr + row, scale)
    else:
        scale = tl.load(scale_ptr)
    if ONE_TILE:
        tl.store(out_ptr + columns, divided(x, scale), mask=columns < channels)
    else:
        for start in range(0, channels, BLOCK):
            x = tl.load(x_ptr + start + columns, mask=start + columns < channels, other=0.0).to(tl.float32)
            tl.store(out_ptr + start + columns, divided(x, scale), mask=start + columns < channels)


@torch.no_grad()
def quantize_fp8(x_ND: Tensor, scale: Tensor | None = None, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Rows divided by a scale and rounded to e4m3 (arXiv:2209.05433), for FP8 matrix products.

    Args:
        x_ND: fp32, bf16 or fp16; rows with contiguous channels, at any stride.
        scale: [1] fp32 on the device: one for all rows, such as a running maximum ÷ 448; what exceeds it saturates at
            ±448. None: each row's largest magnitude ÷ 448 (at least 2^-100), which nothing exceeds.
        impl: "auto", "triton" or "reference"; see `dispatch.use_triton`. GPUs older than sm_89 round in integer
            arithmetic, to the same bits.

    Returns:
        (float8_e4m3fn [N, D], contiguous; scale [N] fp32, or the one given): x ≈ out · scale. Rounded once from fp32,
        to nearest even; NaN stays NaN; in a row with infinity or NaN the scale says so. Repeatable. Nothing is
        saved: it has no gradient.

    Raises:
        ValueError: `impl` is not available here.
    """
    if not use_triton(impl, x_ND, *(() if scale is None else (scale,)), name="quantize_fp8"):
        return quantize_fp8_reference(x_ND, scale)
    rows, channels = x_ND.shape
    x_ND = x_ND if x_ND.stride(1) == 1 else x_ND.contiguous()
    out_ND = torch.empty(rows, channels, dtype=torch.float8_e4m3fn, device=x_ND.device)
    scale_N = torch.empty(rows, dtype=torch.float32, device=x_ND.device) if scale is None else scale
    block, warps = _tiles(channels)
    if rows:
        launch(
            _quantize_fp8_kernel,
            (rows,),
            x_ND,
            out_ND.view(torch.uint8),
            scale_N,
            channels,
            x_ND.stride(0),
            BY_ROW=scale is None,
            ONE_TILE=block >= channels,
            BLOCK=block,
            num_warps=warps,
        )
    return out_ND, scale_N


def scaled_product(
    a_NK: Tensor, scale_N: Tensor, b_MK: Tensor, scale_M: Tensor, dtype: torch.dtype, *, bias_M: Tensor | None = None
) -> Tensor:
    """(a·scale_N)·(b·scale_M)ᵀ + bias, [N, M] in `dtype`; a and b in e4m3, scales fp32.

    On a GPU it comes out of the FP8 units in bf16, sums with their fast accumulation (the error of the factors is far
    larger); elsewhere products are exact, summed and scaled in fp32.

    Args:
        bias_M: bf16 on a GPU, whose units add it; elsewhere of any dtype.
    """
    if on_gpu(a_NK):
        return torch._scaled_mm(
            a_NK,
            b_MK.T,
            scale_a=scale_N.unsqueeze(1),
            scale_b=scale_M.unsqueeze(0),
            bias=bias_M,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        ).to(dtype)
    out_NM = (a_NK.float() @ b_MK.float().T) * scale_N[:, None] * scale_M
    return (out_NM if bias_M is None else out_NM + bias_M).to(dtype)


__all__ = [
    "FP8_CAPABILITY",
    "FP8_SIDE",
    "BackInFp8",
    "Fp8Rows",
    "divided",
    "magnitude",
    "quantize_fp8",
    "quantize_fp8_reference",
    "scale_of",
    "scaled_product",
]
