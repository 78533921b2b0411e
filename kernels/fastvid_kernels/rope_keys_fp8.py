"""The gradient of `rope_keys` in e4m3, as the FP8 product behind it reads it.

Dimensions: N packed rows, M key rows, E = (H + 2K)·d columns of a row, H query heads, K key/value heads, A heads of a
tile, d channels per head, h = d / 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, use_triton
from .quantize_fp8 import divided, magnitude, quantize_fp8, quantize_fp8_reference, scale_of
from .rope_keys_backward import (
    SecondPart,
    rope_keys_backward,
    rope_keys_backward_reference,
    rows_of_heads,
    sum_of_parts,
)
from .rope_qk import cos_sin_of, turned_back
from .way_back import Twice

# Pairs of channels of the largest tile (of queries, keys or values) of which three lie in registers.
LARGEST_TILE = 8192


def rope_keys_backward_fp8_reference(
    grad_q_NHd: Tensor,
    grad_k_MKd: Tensor,
    grad_v_MKd: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    *,
    scale: float = 1.0,
    way_back: tuple[Tensor, Tensor] | None = None,
    more: SecondPart | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope_keys_backward_fp8` in plain torch."""
    options = {"scale": scale, "way_back": way_back, "more": more}
    grads = grad_q_NHd, grad_k_MKd, grad_v_MKd
    return quantize_fp8_reference(rope_keys_backward_reference(*grads, positions_N, inv_freq_h, **options))


def _tiles(heads, kv_heads, half):
    """(heads of the queries' tile, of the others', pairs of a head, warps): 16 pairs a thread of each tile; or None."""
    block_q, block_k, block_h = (triton.next_power_of_2(max(n, 1)) for n in (heads, kv_heads, half))
    largest = max(block_q, block_k) * block_h
    return (block_q, block_k, block_h, max(largest // 512, 1)) if largest <= LARGEST_TILE else None


@triton.jit
def _rounded(first, second, dtype: tl.constexpr):
    return first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)


@triton.jit
def _largest(first, second):
    return tl.max(tl.max(tl.maximum(magnitude(first), magnitude(second)), 1), 0)


@triton.jit
def _store(bits_ptr, first, second, scale, offsets, inside, half):
    tl.store(bits_ptr + offsets, divided(first, scale), mask=inside)
    tl.store(bits_ptr + offsets + half, divided(second, scale), mask=inside)


@triton.jit(
    do_not_specialize=["keys", "first_query", "first_key", "last_key"],
    do_not_specialize_on_alignment=["positions_ptr", "starts_ptr", "places_ptr"],
)
def _collect_fp8_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    more_q_ptr,
    more_k_ptr,
    more_v_ptr,
    bits_ptr,
    scale_ptr,
    starts_ptr,
    places_ptr,
    positions_ptr,
    inv_freq_ptr,
    factor,
    q_stride,
    k_stride,
    v_stride,
    more_q_stride,
    more_k_stride,
    more_v_stride,
    keys,
    first_query,
    first_key,
    last_key,
    num_heads,
    kv_heads,
    half,
    QUERIES: tl.constexpr,
    GATHERED: tl.constexpr,
    TWICE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_h: tl.constexpr,
):
    """A packed row's whole gradient, rounded to the dtype that it would have in memory, then quantised with one
    scale.
    """
    dtype: tl.constexpr = grad_k_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    channels = tl.arange(0, BLOCK_h)
    cos, sin = cos_sin_of(positions_ptr + row, inv_freq_ptr, channels, half, factor)
    if QUERIES:  # under way while keys and values are summed
        q_heads = tl.arange(0, BLOCK_Q)
        q_inside = (q_heads < num_heads)[:, None] & (channels < half)[None, :]
        q_offsets = q_heads[:, None] * 2 * half + channels[None, :]
        q1, q2 = sum_of_parts(
            grad_q_ptr,
            q_stride,
            more_q_ptr,
            more_q_stride,
            row,
            row + 1,
            first_query,
            row + 1,
            q_offsets,
            q_inside,
            half,
            TWICE,
        )
    heads = tl.arange(0, BLOCK_K)
    inside = (heads < kv_heads)[:, None] & (channels < half)[None, :]
    offsets = heads[:, None] * 2 * half + channels[None, :]
    k1 = tl.zeros((BLOCK_K, BLOCK_h), tl.float32)
    k2 = tl.zeros((BLOCK_K, BLOCK_h), tl.float32)
    v1 = tl.zeros((BLOCK_K, BLOCK_h), tl.float32)
    v2 = tl.zeros((BLOCK_K, BLOCK_h), tl.float32)
    begin = row
    end = row + 1
    if GATHERED:
        begin = tl.load(starts_ptr + row).to(tl.int64)
        end = tl.load(starts_ptr + row + 1).to(tl.int64)
    for i in range(begin, end):
        place = i
        if GATHERED:
            place = tl.load(places_ptr + i).to(tl.int64)
        first, second = sum_of_parts(
            grad_k_ptr,
            k_stride,
            more_k_ptr,
            more_k_stride,
            place,
            keys,
            first_key,
            last_key,
            offsets,
            inside,
            half,
            TWICE,
        )
        k1 += first
        k2 += second
        first, second = sum_of_parts(
            grad_v_ptr,
            v_stride,
            more_v_ptr,
            more_v_stride,
            place,
            keys,
            first_key,
            last_key,
            offsets,
            inside,
            half,
            TWICE,
        )
        v1 += first
        v2 += second
    k1, k2 = turned_back(k1, k2, cos, sin)
    k1, k2 = _rounded(k1, k2, dtype)
    v1, v2 = _rounded(v1, v2, dtype)
    top = tl.maximum(_largest(k1, k2), _largest(v1, v2))
    if QUERIES:
        q1, q2 = turned_back(q1, q2, cos, sin)
        q1, q2 = _rounded(q1, q2, dtype)
        top = tl.maximum(top, _largest(q1, q2))
    scale = scale_of(top)
    tl.store(scale_ptr + row, scale)
    bits_ptr += row * (num_heads + 2 * kv_heads) * 2 * half
    if QUERIES:
        _store(bits_ptr, q1, q2, scale, q_offsets, q_inside, half)
    bits_ptr += num_heads * 2 * half
    _store(bits_ptr, k1, k2, scale, offsets, inside, half)
    _store(bits_ptr + kv_heads * 2 * half, v1, v2, scale, offsets, inside, half)


@torch.no_grad()
def rope_keys_backward_fp8(
    grad_q_NHd: Tensor,
    grad_k_MKd: Tensor,
    grad_v_MKd: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    *,
    scale: float = 1.0,
    way_back: tuple[Tensor, Tensor] | None = None,
    more: SecondPart | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The gradient of `rope_keys`, quantised as `quantize_fp8` does before it leaves.

    Args:
        grad_q_NHd: gradient of the queries [N, H, d]; H may be 0. fp32, bf16 or fp16.
        grad_k_MKd, grad_v_MKd: of the keys and values [M, K, d], in the same dtype.
        positions_N, inv_freq_h, scale: as for `rope_keys`.
        way_back: `starts_N1` and `places` of its way back; None: the packed rows in order.
        more: gradients of the second part of attention, where `rope_keys` was given `twice`; that comes with them.
        impl: "auto", "triton" or "reference" (plain torch).

    Returns:
        (float8_e4m3fn [N, E], scale [N] fp32): the product's gradient, rounded to the dtype of the others, then
        quantised.

    Raises:
        ValueError: `impl` is unknown or cannot run here.
    """
    grads = grad_q_NHd, grad_k_MKd, grad_v_MKd
    others, twice = more or (grads, Twice(0, 0, 0, 0))
    options = {"scale": scale, "way_back": way_back, "more": more}
    if not use_triton(impl, *grads, *others, positions_N, inv_freq_h, *(way_back or ()), name="rope_keys_backward_fp8"):
        return rope_keys_backward_fp8_reference(*grads, positions_N, inv_freq_h, **options)
    N, half, (heads, kv_heads) = positions_N.shape[0], inv_freq_h.shape[0], (x.shape[1] for x in grads[:2])
    tiles = _tiles(heads, kv_heads, half)
    if tiles is None:
        return quantize_fp8(rope_keys_backward(*grads, positions_N, inv_freq_h, **options, impl=impl), impl=impl)
    *blocks, warps = tiles
    grads, others = ([rows_of_heads(x) for x in each] for each in (grads, others))
    bits_NE = grad_k_MKd.new_empty(N, (heads + 2 * kv_heads) * 2 * half, dtype=torch.float8_e4m3fn)
    scale_N = grad_k_MKd.new_empty(N, dtype=torch.float32)
    if N:
        launch(
            _collect_fp8_kernel,
            (N,),
            *grads,
            *others,
            bits_NE.view(torch.uint8),
            scale_N,
            *(way_back or (positions_N,) * 2),
            positions_N,
            inv_freq_h,
            scale,
            *(x.stride(0) for x in (*grads, *others)),
            twice.keys,
            twice.first_query,
            twice.first_key,
            twice.first_key + twice.shared,
            heads,
            kv_heads,
            half,
            heads > 0,
            bool(way_back),
            more is not None,
            *blocks,
            num_warps=warps,
        )
    return bits_NE, scale_N


__all__ = ["rope_keys_backward_fp8", "rope_keys_backward_fp8_reference"]
