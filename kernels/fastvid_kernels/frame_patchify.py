"""Decoded frames to normalised patch rows: what lies between a decoder and a CLIP tower's first matrix product.

Dimensions: T frames, H×W decoded pixels, N tower pixels per side, p pixels per patch side, G = N // p patches per
side, P = G² patches, K values per patch row (`patch_rows.row_length`).

F frames of one work item of the kernel.

The pixels are those of PG-Video-LLaVA's feature script (nearest resize, then CLIPImageProcessor), bit for bit.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, use_triton
from .patch_rows import affine, device_table, nearest_indices, normalise, patches, row_length


def frame_patchify_reference(
    frames: Tensor | Sequence[Tensor],
    *,
    size: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Plain torch on any device: see `frame_patchify`. Frame by frame, so that a frame stays in cache."""
    if not isinstance(frames, torch.Tensor):
        return torch.cat(
            [frame_patchify_reference(clip, size=size, patch=patch, mean=mean, std=std, dtype=dtype) for clip in frames]
        )
    T, H, W, _ = frames.shape
    grid = size // patch
    rows, columns = (nearest_indices(length, size, frames.device)[: grid * patch] for length in (H, W))
    out_TPK = torch.empty(T, grid * grid, row_length(patch), dtype=dtype, device=frames.device)
    for frame_HW3, out_PK in zip(frames, out_TPK):
        if (H, W) == (size, size):  # every pixel is its own source
            pixels_NN3 = frame_HW3[: grid * patch, : grid * patch]
        else:
            pixels_NN3 = frame_HW3.index_select(0, rows).index_select(1, columns)
        normalise(patches(pixels_NN3, grid), mean, std, out_PK)
    return out_TPK


def _tiles(values, frames):
    """Output values of a block, frames that share their arithmetic on addresses, adjacent values of a line, warps."""
    block = min(512, triton.next_power_of_2(values))
    return block, max(1, min(40, frames)), min(block, 128), 2


def _work(clips, frames):
    """[items, 9] int64: address, frame, row, column and channel strides, H, W, first frame of the result, F."""
    items, done = [], 0
    for clip in clips:
        for first in range(0, len(clip), frames):
            part = clip[first : first + frames]
            items.append((part.data_ptr(), *part.stride(), *part.shape[1:3], done, len(part)))
            done += len(part)
    work = torch.tensor(items, dtype=torch.int64)
    device = clips[0].device
    # From pinned memory the copy does not wait for the GPU.
    return work.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else work


@triton.jit
def nearest_source(position, length, N: tl.constexpr):
    """Nearest source pixel, as ``interpolate`` computes it in float32."""
    scale = tl.div_rn(length.to(tl.float32), N * 1.0)
    return tl.minimum(tl.floor(position.to(tl.float32) * scale).to(tl.int32), length - 1)


@triton.jit
def normalised(
    byte, channel, inside, table_ptr, scale_0, scale_1, scale_2, offset_0, offset_1, offset_2, AFFINE: tl.constexpr
):
    """Values of int32 bytes; zero for those that are not `inside` a patch."""
    if AFFINE:
        # A scale and an offset of zero make zeros of whatever was read, and neither changes from frame to frame.
        scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
        offset = tl.where(channel == 0, offset_0, tl.where(channel == 1, offset_1, offset_2))
        out = byte.to(tl.float32) * tl.where(inside, scale, 0.0) + tl.where(inside, offset, 0.0)
    else:
        out = tl.load(table_ptr + channel * 256 + byte, mask=inside, other=0.0)
    return out


@triton.jit
def _sampled_values(
    start,
    H,
    W,
    stride_h,
    stride_w,
    stride_c,
    N: tl.constexpr,
    p: tl.constexpr,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """Of a block of output values: where each one's byte lies, which channel it is, and whether it is a pixel's.

    They lie in lines, so that the lanes of a warp read adjacent pixels; stores lie flat, eight values a lane. What is
    no pixel's reads the frame's first byte, so that no read needs a condition.
    """
    G: tl.constexpr = N // p
    value = start + tl.arange(0, BLOCK // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    cell, k = value // K, value % K
    inside = (value < G * G * K) & (k < 3 * p * p)
    pixel, channel = k // 3, k % 3
    row = nearest_source((cell // G) * p + pixel // p, H, N)
    column = nearest_source((cell % G) * p + pixel % p, W, N)
    return tl.where(inside, row * stride_h + column * stride_w + channel * stride_c, 0), channel, inside


@triton.jit
def _frame_patchify_fwd_kernel(
    work_ptr,
    table_ptr,
    out_ptr,
    scale_0,
    scale_1,
    scale_2,
    offset_0,
    offset_1,
    offset_2,
    N: tl.constexpr,
    p: tl.constexpr,
    K: tl.constexpr,
    AFFINE: tl.constexpr,
    OFFSETS: tl.constexpr,
    BLOCK: tl.constexpr,
    LINE: tl.constexpr,
):
    """A block of output values of each frame of one work item; addresses within a frame are computed once."""
    VALUES: tl.constexpr = (N // p) * (N // p) * K
    work_ptr += tl.program_id(1).to(tl.int64) * 9
    frame_ptr = tl.load(work_ptr).to(tl.pointer_type(tl.uint8))
    stride_t, stride_h = tl.load(work_ptr + 1), tl.load(work_ptr + 2).to(OFFSETS)
    stride_w, stride_c = tl.load(work_ptr + 3).to(OFFSETS), tl.load(work_ptr + 4).to(OFFSETS)
    H, W = tl.load(work_ptr + 5).to(tl.int32), tl.load(work_ptr + 6).to(tl.int32)
    first, count = tl.load(work_ptr + 7), tl.load(work_ptr + 8)
    start = tl.program_id(0) * BLOCK
    source, channel, inside = _sampled_values(start, H, W, stride_h, stride_w, stride_c, N, p, K, BLOCK, LINE)
    flat = start + tl.arange(0, BLOCK)
    for f in range(0, count, 4):
        # Four frames are read before the first is written: a read takes longer than the arithmetic of a frame.
        a = tl.load(frame_ptr + f * stride_t + source)
        b = tl.load(frame_ptr + tl.minimum(f + 1, count - 1) * stride_t + source)
        c = tl.load(frame_ptr + tl.minimum(f + 2, count - 1) * stride_t + source)
        d = tl.load(frame_ptr + tl.minimum(f + 3, count - 1) * stride_t + source)
        for i in tl.static_range(4):
            byte = a if i == 0 else b if i == 1 else c if i == 2 else d
            out = normalised(
                byte.to(tl.int32),
                channel,
                inside,
                table_ptr,
                scale_0,
                scale_1,
                scale_2,
                offset_0,
                offset_1,
                offset_2,
                AFFINE,
            ).to(out_ptr.dtype.element_ty)
            tl.store(
                out_ptr + (first + f + i) * VALUES + flat,
                tl.reshape(out, (BLOCK,)),
                mask=(flat < VALUES) & (f + i < count),
            )


def _patchify(clips, size, patch, mean, std, dtype):
    """Launch the kernel on a list of clips."""
    device, total, grid = clips[0].device, sum(map(len, clips)), size // patch
    out_TPK = torch.empty(total, grid * grid, row_length(patch), dtype=dtype, device=device)
    if total:
        values = out_TPK[0].numel()
        block, frames, line, warps = _tiles(values, max(map(len, clips)))
        work = _work(clips, frames)
        numbers = affine(mean, std, dtype)
        table = out_TPK if numbers else device_table(mean, std, dtype, device)  # the affine kernel reads none
        reach = max(
            sum((n - 1) * abs(stride) for n, stride in zip(clip.shape[1:], clip.stride()[1:])) for clip in clips
        )
        launch(
            _frame_patchify_fwd_kernel,
            (triton.cdiv(values, block), len(work)),
            work,
            table,
            out_TPK,
            *(numbers or (0.0,) * 6),
            N=size,
            p=patch,
            K=row_length(patch),
            AFFINE=numbers is not None,
            OFFSETS=tl.int32 if reach < 2**31 else tl.int64,
            BLOCK=block,
            LINE=line,
            num_warps=warps,
        )
    return out_TPK


def frame_patchify(
    frames: Tensor | Sequence[Tensor],
    *,
    size: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float16,
    impl: str = "auto",
) -> Tensor:
    """Frames resized to the tower's size, normalised, cut into patches.

    A row holds its patch as `patch_rows` lays it out, so the tower's patch embedding is
    ``out @ embedding_matrix(conv.weight).T``. Patches go row by row; pixels that do not fill a patch are left out, as
    the convolution leaves them. No gradient: frames are bytes.

    Args:
        frames: [T, H, W, 3] uint8 RGB, any H, W and strides; or a list of such clips, sizes differing, on one device,
            which take one launch together: the result holds their frames one after another.
        size: N, pixels per side that the tower takes; nearest neighbour, aspect ratio not kept.
        patch: p, pixels per side of a patch.
        mean, std: per channel, of pixel values in [0, 1].
        dtype: of the result; float32 holds the exact values, the others are those rounded once.
        impl: "auto", "reference" (plain torch) or "triton".

    Returns:
        [T, P, K] in `dtype`, contiguous.

    Raises:
        ValueError: a shape, size or `impl` that does not fit.
    """
    clips = [frames] if isinstance(frames, torch.Tensor) else list(frames)
    if not clips:
        raise ValueError("frames must hold at least one clip")
    for clip in clips:
        if clip.dtype != torch.uint8 or clip.dim() != 4 or clip.shape[3] != 3 or 0 in clip.shape[1:3]:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], found {clip.dtype} {list(clip.shape)}")
    if not 1 <= patch <= size:
        raise ValueError(f"a patch of {patch} pixels does not fit into a picture of {size}")
    if not use_triton(impl, *clips, name="frame_patchify"):
        return frame_patchify_reference(frames, size=size, patch=patch, mean=mean, std=std, dtype=dtype)
    return _patchify(clips, size, patch, tuple(mean), tuple(std), dtype)


__all__ = ["frame_patchify", "frame_patchify_reference"]
