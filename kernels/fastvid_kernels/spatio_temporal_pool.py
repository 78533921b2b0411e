"""Spatio-temporal pooling: a video's patch states to one row per frame and one row per patch position.

Dimensions: B videos, T frames, P patches per frame, C channels, N temporal rows; K blocks of patches, S runs of frames.

From Video-ChatGPT (Maaz et al., 2023, section 3.1), ``get_spatio_temporal_features`` of its feature script.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import launch, use_triton


def spatio_temporal_pool_reference(
    x: Tensor, *, num_temporal: int = 100, frame_counts: Sequence[int] | Tensor | None = None
) -> Tensor:
    """Plain torch, differentiable, on any device: see `spatio_temporal_pool`.

    Frame by frame, so that both means come from one read of the input while the frame is in cache.
    """
    if x.dim() == 4:
        counts = [x.shape[1]] * x.shape[0] if frame_counts is None else torch.as_tensor(frame_counts).tolist()
        out_BRC = x.new_empty(x.shape[0], num_temporal + x.shape[2], x.shape[3])
        if not counts:
            return out_BRC
        return torch.stack([_pool(x_TPC[:count], num_temporal) for x_TPC, count in zip(x, counts)])
    return _pool(x, num_temporal)


def _pool(x_TPC, num_temporal):
    T, P, C = x_TPC.shape
    accumulate = torch.float64 if x_TPC.dtype == torch.float64 else torch.float32
    temporal, spatial_PC = [], x_TPC.new_zeros(P, C, dtype=accumulate)
    for frame_PC in x_TPC.unbind(0):
        frame_PC = frame_PC.to(accumulate)
        temporal.append(frame_PC.sum(0) / max(P, 1))
        spatial_PC += frame_PC
    padding_NC = x_TPC.new_zeros(num_temporal - T, C, dtype=accumulate)
    temporal_TC = torch.stack(temporal) if temporal else padding_NC[:0]
    return torch.cat([temporal_TC, padding_NC, spatial_PC / max(T, 1)]).to(x_TPC.dtype)


# Programs of the forward kernel that keep the memory busy: three or four on each of a Hopper GPU's 132 multiprocessors.
ENOUGH = 450


def _tiles(B, T, P, C, itemsize):
    """Rows and channels of a tile, patches of a block, frames of a run, warps, and stages.

    A row of a tile is a cache line. Every block of patches writes a partial sum per frame, and every run of frames one
    per position, so both are few: a second run begins only where one leaves the GPU without enough programs.

    Warps share a tile's rows, so that a sum over rows crosses them. Few warps, of many rows each, make that cheap.
    """
    block_c = max(16, min(128 // itemsize, triton.next_power_of_2(max(C, 1))))
    blocks = max(1, triton.cdiv(P, 64))
    patches = triton.cdiv(P, blocks)
    programs = B * blocks * triton.cdiv(C, block_c)
    runs = max(1, min(T // 8, ENOUGH // max(programs, 1)))
    block_p = max(16, triton.next_power_of_2(max(patches, 1)))
    return block_p, block_c, patches, triton.cdiv(T, runs), 2, 3


@triton.jit(do_not_specialize=["T", "P", "run_frames", "patches"])
def _spatio_temporal_pool_fwd_kernel(
    x_ptr,
    counts_ptr,
    temporal_BKTC_ptr,
    spatial_ptr,
    x_stride_b,
    x_stride_t,
    x_stride_p,
    x_stride_c,
    T,
    P,
    spatial_stride_b,
    spatial_stride_s,
    run_frames,
    patches,
    C: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    FINAL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Sums of a block of patches in every frame of a run, and of each patch over the run's frames (FINAL: the mean)."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    block_k = tl.program_id(0).to(tl.int64) // C_BLOCKS
    run = tl.program_id(1).to(tl.int64)
    video = tl.program_id(2).to(tl.int64)
    c = (tl.program_id(0) % C_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.arange(0, BLOCK_P)
    end_p = tl.minimum(patches, P - block_k * patches)
    count = T
    if HAS_COUNTS:
        count = tl.load(counts_ptr + video)
    first = tl.minimum(run * run_frames, count)
    last = tl.minimum(first + run_frames, count)
    mask = (p < end_p)[:, None] & (c < C)[None, :]
    p = block_k * patches + p
    tile_ptr = x_ptr + video * x_stride_b + p[:, None] * x_stride_p + c[None, :].to(tl.int64) * x_stride_c
    row = (video * ((P + patches - 1) // patches) + block_k) * T
    spatial = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for t in tl.range(first, last, num_stages=STAGES):
        tile = tl.load(tile_ptr + t * x_stride_t, mask=mask, other=0.0).to(tl.float32)
        spatial += tile
        tl.store(temporal_BKTC_ptr + (row + t) * C + c, tl.sum(tile, 0), mask=c < C)
    if FINAL:
        spatial = spatial / tl.maximum(count, 1).to(tl.float32)
    spatial_ptr += video * spatial_stride_b + run * spatial_stride_s
    tl.store(spatial_ptr + p[:, None] * C + c[None, :], spatial.to(spatial_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "P", "N", "K", "S"])
def _spatio_temporal_pool_finish_kernel(
    temporal_BKTC_ptr,
    spatial_BSPC_ptr,
    counts_ptr,
    out_BRC_ptr,
    T,
    P,
    N,
    K,
    S,
    C: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Partial sums, added up in order, to rows of the result: frames' means, zeros, and positions' means if S > 0."""
    video = tl.program_id(2).to(tl.int64)
    start = tl.program_id(0).to(tl.int64) * BLOCK_R
    r = start + tl.arange(0, BLOCK_R)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = T
    if HAS_COUNTS:
        count = tl.load(counts_ptr + video)
    in_c = (c < C)[None, :]
    is_spatial = r >= N
    temporal = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    # Programs whose rows are all of one kind have sums of that kind alone. Unrolled, loads are under way together.
    for k in tl.range(0, tl.where(start < count, K, 0), loop_unroll_factor=4):
        temporal += tl.load(
            temporal_BKTC_ptr + ((video * K + k) * T + r)[:, None] * C + c[None, :],
            mask=(r < count)[:, None] & in_c,
            other=0.0,
        )
    spatial = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for s in tl.range(0, tl.where(start + BLOCK_R > N, S, 0), loop_unroll_factor=3):
        spatial += tl.load(
            spatial_BSPC_ptr + ((video * S + s) * P + r - N)[:, None] * C + c[None, :],
            mask=(is_spatial & (r < N + P))[:, None] & in_c,
            other=0.0,
        )
    temporal = temporal / tl.maximum(P, 1).to(tl.float32)
    spatial = spatial / tl.maximum(count, 1).to(tl.float32)
    mean = tl.where(is_spatial[:, None], spatial, temporal).to(out_BRC_ptr.dtype.element_ty)
    last = N
    if S > 0:
        last = N + P
    tl.store(out_BRC_ptr + (video * (N + P) + r)[:, None] * C + c[None, :], mean, mask=(r < last)[:, None] & in_c)


@triton.jit(do_not_specialize=["T", "P", "N", "run_frames"])
def _spatio_temporal_pool_bwd_kernel(
    grad_BRC_ptr,
    counts_ptr,
    grad_BTPC_ptr,
    T,
    P,
    N,
    run_frames,
    C: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Gradient of a block of patches over a run of frames: the position's share, kept, plus each frame's."""
    C_BLOCKS: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    video = tl.program_id(2).to(tl.int64)
    p = (tl.program_id(0).to(tl.int64) // C_BLOCKS) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = (tl.program_id(0) % C_BLOCKS) * BLOCK_C + tl.arange(0, BLOCK_C)
    count = T
    if HAS_COUNTS:
        count = tl.load(counts_ptr + video)
    first = tl.program_id(1).to(tl.int64) * run_frames
    mask = (p < P)[:, None] & (c < C)[None, :]
    grad_BRC_ptr += video * (N + P) * C
    offsets = p[:, None] * C + c[None, :]
    spatial = tl.load(grad_BRC_ptr + N * C + offsets, mask=mask, other=0.0).to(tl.float32)
    spatial = spatial / tl.maximum(count, 1).to(tl.float32)
    for t in range(first, tl.minimum(first + run_frames, T)):
        is_real = t < count
        temporal = tl.load(grad_BRC_ptr + t * C + c, mask=(c < C) & is_real, other=0.0).to(tl.float32) / P.to(
            tl.float32
        )
        grad = tl.where(is_real, spatial + temporal[None, :], 0.0)
        tl.store(grad_BTPC_ptr + (video * T + t) * P * C + offsets, grad.to(grad_BTPC_ptr.dtype.element_ty), mask=mask)


class _SpatioTemporalPool(torch.autograd.Function):
    """Saves the frame counts alone."""

    @staticmethod
    def forward(ctx, x_BTPC, counts_B, num_temporal):
        B, T, P, C = x_BTPC.shape
        ctx.shape, ctx.num_temporal = x_BTPC.shape, num_temporal
        ctx.save_for_backward(counts_B)
        out_BRC = x_BTPC.new_empty(B, num_temporal + P, C)
        if 0 in (B, C):
            return out_BRC
        block_p, block_c, patches, run_frames, warps, stages = _tiles(B, T, P, C, x_BTPC.itemsize)
        K, S = triton.cdiv(P, patches) if patches else 0, triton.cdiv(T, run_frames) if run_frames else 1
        temporal_BKTC = x_BTPC.new_empty(B, K, T, C, dtype=torch.float32)
        final = S == 1
        partial_BSPC = temporal_BKTC if final else x_BTPC.new_empty(B, S, P, C, dtype=torch.float32)
        spatial = out_BRC[:, num_temporal:] if final else partial_BSPC
        if P:
            launch(
                _spatio_temporal_pool_fwd_kernel,
                (K * triton.cdiv(C, block_c), S, B),
                x_BTPC,
                counts_B,
                temporal_BKTC,
                spatial,
                *x_BTPC.stride(),
                T,
                P,
                spatial.stride(0),
                0 if final else spatial.stride(1),
                run_frames,
                patches,
                C=C,
                HAS_COUNTS=counts_B is not None,
                FINAL=final,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                STAGES=stages,
                num_warps=warps,
            )
        rows = num_temporal + (0 if final else P)
        block_r, block_c = 4, min(256, triton.next_power_of_2(C))
        if rows:
            launch(
                _spatio_temporal_pool_finish_kernel,
                (triton.cdiv(rows, block_r), triton.cdiv(C, block_c), B),
                temporal_BKTC,
                partial_BSPC,
                counts_B,
                out_BRC,
                T,
                P,
                num_temporal,
                K,
                0 if final else S,
                C=C,
                HAS_COUNTS=counts_B is not None,
                BLOCK_R=block_r,
                BLOCK_C=block_c,
                num_warps=4,
            )
        return out_BRC

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BRC):
        (counts_B,) = ctx.saved_tensors
        B, T, P, C = ctx.shape
        grad_BRC = grad_BRC.contiguous()
        grad_BTPC = grad_BRC.new_empty(ctx.shape)
        if grad_BTPC.numel():
            block_p, block_c = min(32, triton.next_power_of_2(P)), min(256, triton.next_power_of_2(C))
            run_frames = triton.cdiv(T, triton.cdiv(T, 16))  # none much shorter than the others
            grid = triton.cdiv(P, block_p) * triton.cdiv(C, block_c), triton.cdiv(T, run_frames), B
            launch(
                _spatio_temporal_pool_bwd_kernel,
                grid,
                grad_BRC,
                counts_B,
                grad_BTPC,
                T,
                P,
                ctx.num_temporal,
                run_frames,
                C=C,
                HAS_COUNTS=counts_B is not None,
                BLOCK_P=block_p,
                BLOCK_C=block_c,
                num_warps=8,
            )
        return grad_BTPC, None, None


def spatio_temporal_pool(
    x: Tensor, *, num_temporal: int = 100, frame_counts: Sequence[int] | Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """Mean over the patches of each frame, and over the frames at each patch position.

    The input is read once for both. Accumulates in fp32 (fp64 for fp64 input) and rounds once. Differentiable; nothing
    but the counts is saved for backward. Repeatable: partial sums are added up in a fixed order, without atomics.

    Args:
        x: [T, P, C] or [B, T, P, C], floating point, any strides (a view without the class token is not copied).
        num_temporal: N; T may not exceed it.
        frame_counts: real frames of each video, [B] integers (4-D `x` only); later frames are never read. None: T.
        impl: "auto", "reference" (plain torch) or "triton" (fp32, bf16 and fp16).

    Returns:
        [N + P, C] or [B, N + P, C] in x's dtype: frame means, zero rows up to N, position means over the real frames.
        A video without frames, or frames without patches, pool to zeros.

    Raises:
        ValueError: a shape, count or `impl` that does not fit.
    """
    if x.dim() not in (3, 4) or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point [T, P, C] or [B, T, P, C], found {x.dtype} {list(x.shape)}")
    T = x.shape[-3]
    if frame_counts is not None:
        if x.dim() == 3:
            raise ValueError("frame_counts goes with [B, T, P, C]; slice a single video instead")
        frame_counts = torch.as_tensor(frame_counts).tolist()
        if len(frame_counts) != x.shape[0] or not all(isinstance(n, int) and 0 <= n <= T for n in frame_counts):
            raise ValueError(f"frame_counts must be {x.shape[0]} integers in [0, {T}], found {frame_counts}")
    if T > num_temporal:
        raise ValueError(f"{T} frames do not fit into num_temporal={num_temporal} rows")
    if x.dtype == torch.float64 and impl == "triton":
        raise ValueError("spatio_temporal_pool: the Triton kernel accumulates in fp32; use impl='auto' for float64")
    if not use_triton(impl, x, name="spatio_temporal_pool") or x.dtype == torch.float64:
        return spatio_temporal_pool_reference(x, num_temporal=num_temporal, frame_counts=frame_counts)
    counts_B = None if frame_counts is None else torch.tensor(frame_counts, dtype=torch.int32, device=x.device)
    out_BRC = _SpatioTemporalPool.apply(x if x.dim() == 4 else x[None], counts_B, num_temporal)
    return out_BRC if x.dim() == 4 else out_BRC[0]


__all__ = ["spatio_temporal_pool", "spatio_temporal_pool_reference"]
