"""Adaptive average pooling of a video's patch states: to a grid of rows over time, height and width; no gradients.

Dimensions: T frames, P = H · W patches of a frame (H = W), C channels; a grid of t × h × w rows, R of them; K places of
a row's window.

The windows are those of ``torch.nn.functional.adaptive_avg_pool3d``: output o of O, of I inputs, is the mean over
[⌊o · I / O⌋, ⌈(o + 1) · I / O⌉). They overlap where O does not divide I, and repeat inputs where O is larger.

PLLaVA (arXiv:2404.16994, ``models/pllava/modeling_pllava.py`` of magic-research/PLLaVA) pools videos like this.
SlowFast-LLaVA (arXiv:2407.15841, ``prepare_slowfast`` of apple/ml-slowfast-llava) pools each frame's patches like this,
of frames that it chooses evenly.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from .dispatch import launch, refuse_gradients, use_triton
from .plain import wide


def grid_pool_reference(x: Tensor, grid: Sequence[int], *, over_time: bool = True) -> Tensor:
    """`grid_pool` in plain torch, on any device: one step of time after another, so that fp32 copies stay small."""
    frames, height, width = grid
    (T, P, _), side, rows = x.shape, math.isqrt(x.shape[1]), []
    for step in range(frames):
        first = step * T // frames
        last = -(-(step + 1) * T // frames) if over_time else first + 1
        frame_CHW = wide(x[first:last]).mean(0).unflatten(0, (side, P // side)).movedim(-1, 0)
        rows.append(adaptive_avg_pool2d(frame_CHW[None], (height, width))[0].flatten(1).T)
    return torch.cat(rows).to(x.dtype)


def _tiles(window, C):
    """Places and channels of a tile, and warps.

    A warp loads 256 channels of a place, 16 bytes a thread of 16-bit numbers. Small windows take all channels at once,
    so that no sum crosses threads; larger ones share their places out to the warps. `window` is that of one frame:
    sizes that followed the number of frames would compile the kernel anew for short videos.
    """
    block_k = min(16, triton.next_power_of_2(max(window, 1)))
    return block_k, max(16, min(4096 // block_k, 1024, triton.next_power_of_2(C))), 4


@triton.jit(do_not_specialize=["T", "side", "frames", "height", "width"])
def _grid_pool_kernel(
    x_ptr,
    out_RC_ptr,
    x_stride_t,
    x_stride_p,
    x_stride_c,
    T,
    side,
    frames,
    height,
    width,
    C: tl.constexpr,
    OVER_TIME: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The mean of one row's window, for a block of channels."""
    row = tl.program_id(0).to(tl.int64)
    step, cell = row // (height * width), row % (height * width)
    line, column = cell // width, cell % width
    first_t = step * T // frames
    last_t = first_t + 1
    if OVER_TIME:
        last_t = ((step + 1) * T + frames - 1) // frames
    first_h, last_h = line * side // height, ((line + 1) * side + height - 1) // height
    first_w, last_w = column * side // width, ((column + 1) * side + width - 1) // width
    window_w = last_w - first_w
    of_frame = (last_h - first_h) * window_w
    places = (last_t - first_t) * of_frame
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    for start in tl.range(0, places, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        t, within = first_t + k // of_frame, k % of_frame
        p = (first_h + within // window_w) * side + first_w + within % window_w
        total += tl.load(
            x_ptr + (t * x_stride_t + p * x_stride_p)[:, None] + (c * x_stride_c)[None, :],
            mask=(k < places)[:, None] & (c < C)[None, :],
            other=0.0,
        ).to(tl.float32)
    mean = tl.sum(total, 0) / places.to(tl.float32)
    tl.store(out_RC_ptr + row * C + c, mean.to(out_RC_ptr.dtype.element_ty), mask=c < C)


def grid_pool(x: Tensor, grid: Sequence[int], *, over_time: bool = True, impl: str = "auto") -> Tensor:
    """Adaptive means of patch states, one for each cell of a grid: see this file's head.

    Accumulates in fp32 (fp64 for fp64 input) and rounds once. Repeatable: a row is summed in a fixed order.

    Args:
        x: [T, P, C], floating point, any strides; T ≥ 1, P the square of H = W.
        grid: (t, h, w), each at least 1; each may be larger than what it pools.
        over_time: False: a row is of the first frame of its window alone, so that t frames are chosen evenly,
            ⌊o · T / t⌋, and only their patches are pooled. SlowFast-LLaVA chooses these; it computes them in float32,
            which for some counts rounds one of them down to the frame before.
        impl: "auto", "reference" (plain torch) or "triton" (fp32, bf16 and fp16).

    Returns:
        [t · h · w, C] in x's dtype, in the order t, h, w.

    Raises:
        ValueError: a shape, grid or `impl` that does not fit, or a gradient would be due.
    """
    if x.dim() != 3 or not x.is_floating_point():
        raise ValueError(f"grid_pool: x must be a floating-point [T, P, C], found {x.dtype} {list(x.shape)}")
    T, P, C = x.shape
    side = math.isqrt(P)
    if not T or not P or side * side != P:
        raise ValueError(f"grid_pool: x must have frames, of a square number of patches; found {T} of {P}")
    if len(grid) != 3 or not all(isinstance(size, int) and size >= 1 for size in grid):
        raise ValueError(f"grid_pool: grid must be three whole numbers of at least 1, found {tuple(grid)}")
    refuse_gradients(x, name="grid_pool")
    if x.dtype == torch.float64 and impl == "triton":
        raise ValueError("grid_pool: the Triton kernel accumulates in fp32; use impl='auto' for float64")
    if not use_triton(impl, x, name="grid_pool") or x.dtype == torch.float64:
        return grid_pool_reference(x, grid, over_time=over_time)
    frames, height, width = grid
    out_RC = x.new_empty(frames * height * width, C)
    if not C:
        return out_RC
    BLOCK_K, BLOCK_C, warps = _tiles(triton.cdiv(side, height) * triton.cdiv(side, width), C)
    launch(
        _grid_pool_kernel,
        (len(out_RC), triton.cdiv(C, BLOCK_C)),
        x,
        out_RC,
        *x.stride(),
        T,
        side,
        frames,
        height,
        width,
        C=C,
        OVER_TIME=over_time,
        BLOCK_K=BLOCK_K,
        BLOCK_C=BLOCK_C,
        num_warps=warps,
    )
    return out_RC


__all__ = ["grid_pool", "grid_pool_reference"]
