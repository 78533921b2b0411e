"""Attention to two parts of the keys, made that to both: outputs weighed by their log-sum-exps, in one pass.

Dimensions: N query rows, H heads, A heads of a program, d channels per head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, refuse_gradients, use_triton
from .plain import wide


def merge_parts_reference(
    out_NHd: Tensor, lse_HN: Tensor, other_NHd: Tensor, other_lse_HN: Tensor
) -> tuple[Tensor, Tensor]:
    """`merge_parts` in plain torch."""
    both_HN = torch.logaddexp(lse_HN, other_lse_HN)
    share_NH1 = (other_lse_HN - both_HN).exp_().T[:, :, None]
    return torch.lerp(wide(out_NHd), wide(other_NHd), share_NH1.to(wide(out_NHd).dtype)).to(out_NHd.dtype), both_HN


def _tiles(heads, channels):
    """(heads of a program, channels of a tile, warps): 16 values of each part a thread."""
    block_d = triton.next_power_of_2(channels)
    block_a = min(triton.next_power_of_2(heads), max(4096 // block_d, 1))
    return block_a, block_d, min(max(block_a * block_d // 512, 1), 8)


@triton.jit(
    do_not_specialize=["lse_stride", "other_lse_stride", "to_lse_stride"],
    do_not_specialize_on_alignment=["lse_ptr", "other_lse_ptr", "to_lse_ptr"],
)
def _merge_parts_kernel(
    out_ptr,
    lse_ptr,
    other_ptr,
    other_lse_ptr,
    to_ptr,
    to_lse_ptr,
    out_stride,
    other_stride,
    to_stride,
    lse_stride,
    other_lse_stride,
    to_lse_stride,
    lse_row_stride,
    other_lse_row_stride,
    to_lse_row_stride,
    num_heads,
    channels,
    BLOCKS: tl.constexpr,
    BOTH: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_d: tl.constexpr,
):
    """Some heads of a row. `BOTH`: the second part's log-sum-exp is overwritten too."""
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    heads = program % BLOCKS * BLOCK_A + tl.arange(0, BLOCK_A)
    columns = tl.arange(0, BLOCK_d)
    real = heads < num_heads
    inside = real[:, None] & (columns < channels)[None, :]
    offsets = heads[:, None] * channels + columns[None, :]
    out = tl.load(out_ptr + row * out_stride + offsets, mask=inside).to(tl.float32)
    other = tl.load(other_ptr + row * other_stride + offsets, mask=inside).to(tl.float32)
    lse = tl.load(lse_ptr + heads.to(tl.int64) * lse_stride + row * lse_row_stride, mask=real, other=0.0)
    other_lse_ptr += row * other_lse_row_stride
    other_lse = tl.load(other_lse_ptr + heads.to(tl.int64) * other_lse_stride, mask=real, other=0.0)
    top = tl.maximum(lse, other_lse)
    both = top + tl.log(tl.exp(lse - top) + tl.exp(other_lse - top))
    share = tl.exp(other_lse - both)[:, None]
    merged = tl.where(share < 0.5, out + share * (other - out), other - (other - out) * (1 - share))
    tl.store(to_ptr + row * to_stride + offsets, merged.to(to_ptr.dtype.element_ty), mask=inside)
    tl.store(to_lse_ptr + heads.to(tl.int64) * to_lse_stride + row * to_lse_row_stride, both, mask=real)
    if BOTH:
        tl.store(other_lse_ptr + heads.to(tl.int64) * other_lse_stride, both, mask=real)


def merge_parts(
    out_NHd: Tensor,
    lse_HN: Tensor,
    other_NHd: Tensor,
    other_lse_HN: Tensor,
    *,
    inplace: bool = False,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention to all keys, from attention to two parts of them: as ring attention joins blocks (arXiv:2310.01889).

    Args:
        out_NHd: output [N, H, d] of the first part; fp32, bf16 or fp16, heads side by side.
        lse_HN: its log-sum-exp [H, N], fp32, at any strides.
        other_NHd, other_lse_HN: of the second part. Each row has a key in one part at least.
        inplace: overwrite the first part, and the second one's log-sum-exp with the same numbers: backward of either
            part reads its own.
        impl: "auto" (Triton on CUDA tensors, else torch), "triton" or "reference" (`merge_parts_reference`).

    Returns:
        (output, log-sum-exp) of both, in the first part's dtypes; computed in fp32, rounded once. It has no gradient:
        backward of either part is that of the whole where it is given these.

    Raises:
        ValueError: shapes do not fit, a gradient would be due, `impl` is unknown or cannot run here.
    """
    N, H, d = out_NHd.shape
    given = out_NHd, lse_HN, other_NHd, other_lse_HN
    if other_NHd.shape != (N, H, d) or any(x.shape != (H, N) for x in (lse_HN, other_lse_HN)):
        raise ValueError(f"merge_parts: parts {[list(x.shape) for x in given]} do not fit each other")
    refuse_gradients(*given, name="merge_parts")
    if not use_triton(impl, *given, name="merge_parts"):
        found = merge_parts_reference(*given)
        if not inplace:
            return found
        other_lse_HN.copy_(found[1])
        return out_NHd.copy_(found[0]), lse_HN.copy_(found[1])
    if any(x.stride()[1:] != (d, 1) for x in (out_NHd, other_NHd) if x.numel()):
        raise ValueError(f"merge_parts: heads of a row must lie side by side, found strides {out_NHd.stride()}")
    to_NHd, to_lse_HN = (out_NHd, lse_HN) if inplace else (out_NHd.new_empty(N, H, d), lse_HN.new_empty(H, N))
    BLOCK_A, BLOCK_d, num_warps = _tiles(H, d)
    blocks = triton.cdiv(H, BLOCK_A)
    if out_NHd.numel():
        launch(
            _merge_parts_kernel,
            (N * blocks,),
            *given,
            to_NHd,
            to_lse_HN,
            *(x.stride(0) for x in (out_NHd, other_NHd, to_NHd)),
            *(x.stride(0) for x in (lse_HN, other_lse_HN, to_lse_HN)),
            *(x.stride(1) for x in (lse_HN, other_lse_HN, to_lse_HN)),
            H,
            d,
            blocks,
            inplace,
            BLOCK_A,
            BLOCK_d,
            num_warps=num_warps,
        )
    return to_NHd, to_lse_HN


__all__ = ["merge_parts", "merge_parts_reference"]
