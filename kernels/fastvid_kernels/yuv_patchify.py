"""A decoder's own planes to normalised patch rows: sampling, conversion to RGB, normalisation and patches in one pass.

Dimensions: T frames, H×W decoded pixels, N tower pixels per side, p pixels per patch side, G = N // p patches per
side, P = G² patches, K values per patch row (`patch_rows.row_length`), F frames of one work item.

Of progressive 8-bit 4:2:0 pictures of even height the RGB bytes are those of FFmpeg's swscale. Its default conversion
is an integer function of one pixel's samples, with the chroma sample of the nearest whole pair. H.264, HEVC and VP9 say
to the bit what a decoder must give, so planes of a GPU's decoder become the very patches that PyAV's frames become.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, use_triton
from .frame_patchify import nearest_source, normalised
from .patch_rows import affine, device_table, nearest_indices, normalise, patches, row_length


def yuv_to_rgb(y: Tensor, u: Tensor, v: Tensor, factors: Sequence[int]) -> Tensor:
    """RGB of samples, in plain torch.

    Args:
        y, u, v: uint8 tensors of one shape.
        factors: luma factor, luma offset, V to red, U to blue, U to green, V to green. Factors are of eight times a
            sample, in 1/65536; the offset is in eighths of a sample.

    Returns:
        [..., 3] uint8.
    """
    luma, offset, v_red, u_blue, u_green, v_green = factors
    y, u, v = 8 * y.int() - offset, 8 * (u.int() - 128), 8 * (v.int() - 128)
    grey = y * luma >> 16
    added = v * v_red >> 16, (u * u_green >> 16) + (v * v_green >> 16), u * u_blue >> 16
    return torch.stack([grey + channel for channel in added], -1).clamp(0, 255).to(torch.uint8)


def yuv_patchify_reference(
    frames: Sequence[Sequence[Tensor]],
    conversions: Sequence[Sequence[int]],
    *,
    size: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float16,
) -> Tensor:
    """Plain torch on any device: see `yuv_patchify`."""
    device, grid = frames[0][0].device, size // patch
    out_TPK = torch.empty(len(frames), grid * grid, row_length(patch), dtype=dtype, device=device)
    for (y, u, v), factors, out_PK in zip(frames, conversions, out_TPK):
        rows = nearest_indices(y.shape[0], size, device)[: grid * patch, None]
        columns = nearest_indices(y.shape[1], size, device)[: grid * patch]
        chroma = rows // 2, columns // 2
        normalise(patches(yuv_to_rgb(y[rows, columns], u[chroma], v[chroma], factors), grid), mean, std, out_PK)
    return out_TPK


def _tiles(pixels, frames):
    """Pixels of a block, frames that share their arithmetic on addresses, and warps."""
    return min(128, max(8, triton.next_power_of_2(pixels))), max(1, min(50, frames)), 2


@dataclass(frozen=True)
class _Run:
    """Frames that follow one another and differ in their addresses alone.

    Attributes:
        first, count: of the frames.
        y, u, v: of each plane, (shape, strides, dtype).
        factors: of their conversion.
    """

    first: int
    count: int
    y: tuple
    u: tuple
    v: tuple
    factors: tuple


def _runs(frames, conversions):
    """[_Run] of all frames."""

    def about(numbered):
        number, frame = numbered
        return tuple((tuple(x.shape), x.stride(), x.dtype) for x in frame), conversions[number]

    runs, first = [], 0
    for (planes, factors), alike in itertools.groupby(enumerate(frames), about):
        count = sum(1 for _ in alike)
        if len(planes) != 3:
            raise ValueError(f"a frame must be three planes, Y, U and V, found {len(planes)}")
        runs.append(_Run(first, count, *planes, factors))
        first += count
    return runs


def _check(run):
    """Refuse planes that do not belong together, and numbers that convert nothing."""
    (shape, _, _), planes = run.y, (run.y, run.u, run.v)
    half = tuple(-(-length // 2) for length in shape)
    if (
        len(shape) != 2
        or 0 in shape
        or (run.u[0], run.v[0]) != (half, half)
        or any(dtype != torch.uint8 for *_, dtype in planes)
    ):
        raise ValueError(
            "a frame must be uint8 planes [H, W], [⌈H/2⌉, ⌈W/2⌉], [⌈H/2⌉, ⌈W/2⌉], found "
            + ", ".join(f"{dtype} {list(shape)}" for shape, _, dtype in planes)
        )
    if len(run.factors) != 6 or not all(isinstance(number, int) for number in run.factors):
        raise ValueError(f"a conversion must be six whole numbers, found {run.factors}")


def _work(frames, runs, most):
    """What the kernel reads of `runs`, at most `most` frames together.

    Returns:
        items [items, 14] int64: strides of rows and columns of Y and of U and V, H, W, the six factors, the first
        frame, F; addresses [T, 3] int64 of Y, U and V.
    """
    items = [
        (*run.y[1], *run.u[1], *run.y[0], *run.factors, first, min(most, run.first + run.count - first))
        for run in runs
        for first in range(run.first, run.first + run.count, most)
    ]
    addresses = [[plane.data_ptr() for plane in frame] for frame in frames]
    table, device = torch.tensor(list(itertools.chain(*items, *addresses)), dtype=torch.int64), frames[0][0].device
    if device.type == "cuda":  # from pinned memory the copy, one for both, does not wait for the GPU
        table = table.pin_memory().to(device, non_blocking=True)
    return table[: 14 * len(items)].view(-1, 14), table[14 * len(items) :].view(-1, 3)


@triton.jit
def _sampled_pixels(
    first,
    y_row,
    y_column,
    uv_row,
    uv_column,
    H,
    W,
    N: tl.constexpr,
    p: tl.constexpr,
    PIXELS: tl.constexpr,
    LINE: tl.constexpr,
):
    """Of PIXELS pixels in the order of patch rows: where their luma lies, and where their chroma.

    They lie in lines, so that the lanes of a warp read adjacent pixels.
    """
    G: tl.constexpr = N // p
    pixel = first + tl.arange(0, PIXELS // LINE)[:, None] * LINE + tl.arange(0, LINE)[None, :]
    pixel = tl.minimum(pixel, G * G * p * p - 1)
    cell, pixel = pixel // (p * p), pixel % (p * p)
    row = nearest_source((cell // G) * p + pixel // p, H, N)
    column = nearest_source((cell % G) * p + pixel % p, W, N)
    return row * y_row + column * y_column, (row >> 1) * uv_row + (column >> 1) * uv_column


@triton.jit
def _byte(number):
    return tl.minimum(tl.maximum(number, 0), 255)


@triton.jit
def _rgb(y, u, v, luma, dark, v_red, u_blue, u_green, v_green):
    """Red, green and blue in the three lowest bytes of a number."""
    y = (8 * y.to(tl.int32) - dark) * luma >> 16
    u, v = 8 * u.to(tl.int32) - 1024, 8 * v.to(tl.int32) - 1024
    red = y + (v * v_red >> 16)
    green = y + ((u * u_green >> 16) + (v * v_green >> 16))
    blue = y + (u * u_blue >> 16)
    return _byte(red) | (_byte(green) << 8) | (_byte(blue) << 16)


@triton.jit
def _samples(address_ptr, y_at, uv_at):
    """Y, U and V of a frame whose three addresses lie at `address_ptr`."""
    y_ptr = tl.load(address_ptr).to(tl.pointer_type(tl.uint8))
    u_ptr = tl.load(address_ptr + 1).to(tl.pointer_type(tl.uint8))
    v_ptr = tl.load(address_ptr + 2).to(tl.pointer_type(tl.uint8))
    return tl.load(y_ptr + y_at), tl.load(u_ptr + uv_at), tl.load(v_ptr + uv_at)


@triton.jit
def _places(value, first, p: tl.constexpr, K: tl.constexpr):
    """Of output values: the place of each one's pixel behind the `first`, its channel, and whether it is a pixel's."""
    cell, k = value // K, value % K
    inside = k < 3 * p * p
    return tl.where(inside, cell * (p * p) + k // 3 - first, 0), k % 3, inside


@triton.jit
def _yuv_patchify_kernel(
    work_ptr,
    address_ptr,
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
    PIXELS: tl.constexpr,
    LINE: tl.constexpr,
):
    """A block of output values of each frame of one work item; offsets within a frame are computed once.

    Each pixel is read and converted once. Its three values then take it from shared memory, since the values of a
    thread, adjacent ones, are not those of its pixels. Three values a pixel come in two tiles: 2 · PIXELS and PIXELS.
    """
    VALUES: tl.constexpr = (N // p) * (N // p) * K
    BLOCK: tl.constexpr = 3 * PIXELS - 8  # wherever in a pixel it begins, it ends within PIXELS pixels
    work_ptr += tl.program_id(1).to(tl.int64) * 14
    y_row, y_column = tl.load(work_ptr).to(OFFSETS), tl.load(work_ptr + 1).to(OFFSETS)
    uv_row, uv_column = tl.load(work_ptr + 2).to(OFFSETS), tl.load(work_ptr + 3).to(OFFSETS)
    H, W = tl.load(work_ptr + 4).to(tl.int32), tl.load(work_ptr + 5).to(tl.int32)
    luma, dark = tl.load(work_ptr + 6).to(tl.int32), tl.load(work_ptr + 7).to(tl.int32)
    v_red, u_blue = tl.load(work_ptr + 8).to(tl.int32), tl.load(work_ptr + 9).to(tl.int32)
    u_green, v_green = tl.load(work_ptr + 10).to(tl.int32), tl.load(work_ptr + 11).to(tl.int32)
    first, count = tl.load(work_ptr + 12), tl.load(work_ptr + 13)
    start = tl.program_id(0) * BLOCK
    # Blocks and rows begin at multiples of 8, and fewer than 8 zeros end a row: no block begins with one.
    pixel = start // K * (p * p) + start % K // 3
    y_at, uv_at = _sampled_pixels(pixel, y_row, y_column, uv_row, uv_column, H, W, N, p, PIXELS, LINE)
    many, few = start + tl.arange(0, 2 * PIXELS), start + 2 * PIXELS + tl.arange(0, PIXELS)
    many_at, many_channel, many_inside = _places(many, pixel, p, K)
    few_at, few_channel, few_inside = _places(tl.minimum(few, start + BLOCK - 1), pixel, p, K)
    few_wanted = (few < start + BLOCK) & (few < VALUES)
    last = first + count - 1
    for f in range(first, first + count, 2):
        # Two frames at once, so that twice as many reads are under way.
        y, u, v = _samples(address_ptr + f * 3, y_at, uv_at)
        next_y, next_u, next_v = _samples(address_ptr + tl.minimum(f + 1, last) * 3, y_at, uv_at)
        for half in tl.static_range(2):
            if half == 0:
                rgb = _rgb(y, u, v, luma, dark, v_red, u_blue, u_green, v_green)
            else:
                rgb = _rgb(next_y, next_u, next_v, luma, dark, v_red, u_blue, u_green, v_green)
            rgb = tl.reshape(rgb, (PIXELS,))
            there = f + half <= last
            out = normalised(
                tl.gather(rgb, many_at, 0) >> (8 * many_channel) & 255,
                many_channel,
                many_inside,
                table_ptr,
                scale_0,
                scale_1,
                scale_2,
                offset_0,
                offset_1,
                offset_2,
                AFFINE,
            )
            tl.store(
                out_ptr + (f + half) * VALUES + many, out.to(out_ptr.dtype.element_ty), mask=(many < VALUES) & there
            )
            out = normalised(
                tl.gather(rgb, few_at, 0) >> (8 * few_channel) & 255,
                few_channel,
                few_inside,
                table_ptr,
                scale_0,
                scale_1,
                scale_2,
                offset_0,
                offset_1,
                offset_2,
                AFFINE,
            )
            tl.store(out_ptr + (f + half) * VALUES + few, out.to(out_ptr.dtype.element_ty), mask=few_wanted & there)


def _patchify(frames, runs, size, patch, mean, std, dtype):
    """Launch the kernel on a list of frames."""
    if any(run.u[1] != run.v[1] for run in runs):  # the kernel has one offset for both
        frames = [(y, u.contiguous(), v.contiguous()) for y, u, v in frames]
        runs = _runs(frames, [run.factors for run in runs for _ in range(run.count)])
    reach = max(
        sum((n - 1) * stride for n, stride in zip(shape, strides))
        for run in runs
        for shape, strides, _ in (run.y, run.u)
    )
    device, grid = frames[0][0].device, size // patch
    out_TPK = torch.empty(len(frames), grid * grid, row_length(patch), dtype=dtype, device=device)
    values = out_TPK[0].numel()
    pixels, together, warps = _tiles(grid**2 * patch**2, max(run.count for run in runs))
    work, addresses = _work(frames, runs, together)
    numbers = affine(mean, std, dtype)
    table = out_TPK if numbers else device_table(mean, std, dtype, device)  # the affine kernel reads none
    launch(
        _yuv_patchify_kernel,
        (triton.cdiv(values, 3 * pixels - 8), len(work)),
        work,
        addresses,
        table,
        out_TPK,
        *(numbers or (0.0,) * 6),
        N=size,
        p=patch,
        K=row_length(patch),
        AFFINE=numbers is not None,
        OFFSETS=tl.int32 if reach < 2**31 else tl.int64,
        PIXELS=pixels,
        LINE=min(pixels, 32),
        num_warps=warps,
    )
    return out_TPK


def yuv_patchify(
    frames: Sequence[Sequence[Tensor]],
    conversions: Sequence[Sequence[int]],
    *,
    size: int,
    patch: int,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float16,
    impl: str = "auto",
) -> Tensor:
    """Planes of 8-bit 4:2:0 frames resized to the tower's size, converted to RGB, normalised, cut into patches.

    The result is what `frame_patchify` makes of the frames as PyAV's ``to_ndarray(format="rgb24")`` gives them, to the
    bit, where their height is even and they are not interlaced. No gradient: samples are bytes.

    Args:
        frames: [(Y, U, V)], uint8 planes [H, W], [⌈H/2⌉, ⌈W/2⌉] and the same, of any strides, on one device; sizes may
            differ from frame to frame. Of NV12 they are ``y, uv[..., 0], uv[..., 1]``. On a GPU they must be ready on
            the current stream, and stay as they are until it has come here: the kernel has their addresses alone.
        conversions: of each frame, six whole numbers as `yuv_to_rgb` takes them.
        size: N, pixels per side that the tower takes; nearest neighbour, aspect ratio not kept.
        patch: p, pixels per side of a patch.
        mean, std: per channel, of pixel values in [0, 1].
        dtype: of the result; float32 holds the exact values, the others are those rounded once.
        impl: "auto", "reference" (plain torch) or "triton".

    Returns:
        [T, P, K] in `dtype`, contiguous; the layout of its rows is that of `patch_rows`.

    Raises:
        ValueError: a shape, size or `impl` that does not fit.
    """
    frames, conversions = [tuple(frame) for frame in frames], [tuple(factors) for factors in conversions]
    if not frames:
        raise ValueError("frames must hold at least one frame")
    if len(conversions) != len(frames):
        raise ValueError(f"there must be a conversion for each of {len(frames)} frames, found {len(conversions)}")
    runs = _runs(frames, conversions)
    for run in runs:
        _check(run)
    if not 1 <= patch <= size:
        raise ValueError(f"a patch of {patch} pixels does not fit into a picture of {size}")
    if not use_triton(impl, *itertools.chain(*frames), name="yuv_patchify"):
        return yuv_patchify_reference(frames, conversions, size=size, patch=patch, mean=mean, std=std, dtype=dtype)
    return _patchify(frames, runs, size, patch, tuple(mean), tuple(std), dtype)


__all__ = ["yuv_patchify", "yuv_patchify_reference", "yuv_to_rgb"]
