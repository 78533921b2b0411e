"""A decoder's own planes to normalised patch rows: sampling, conversion to RGB, normalisation and patches in one pass.

Dimensions: T frames, H×W decoded pixels, N tower pixels per side, p pixels per patch side, G = N // p patches per
side, P = G² patches, K values per patch row (`patch_rows.row_length`), F frames of one work item.

Of progressive 8-bit 4:2:0 pictures of even height the RGB bytes are those of FFmpeg's swscale. Its default conversion
is an integer function of one pixel's samples, with the chroma sample of the nearest whole pair. H.264, HEVC and VP9 say
to the bit what a decoder must give, so planes of a GPU's decoder become the very patches that PyAV's frames become.
"""

import itertools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .dispatch import launch, use_triton
from .frame_patchify import sampled_pixels
from .patch_rows import affine, device_table, look_up, nearest_indices, pixel_table, row_length


def yuv_to_rgb(y, u, v, factors):
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


def yuv_patchify_reference(frames, conversions, *, size, patch, mean, std, dtype=torch.float16):
    """Plain torch on any device: see `yuv_patchify`."""
    device, grid = frames[0][0].device, size // patch
    table = pixel_table(mean, std, dtype, device)
    out_TPK = torch.empty(len(frames), grid * grid, row_length(patch), dtype=dtype, device=device)
    for (y, u, v), factors, out_PK in zip(frames, conversions, out_TPK):
        rows = nearest_indices(y.shape[0], size, device)[:grid * patch].view(grid, 1, patch, 1)
        columns = nearest_indices(y.shape[1], size, device)[:grid * patch].view(1, grid, 1, patch)
        chroma = rows // 2, columns // 2
        rgb = yuv_to_rgb(y[rows, columns], u[chroma], v[chroma], factors)
        look_up(table, rgb.view(grid * grid, -1), out_PK)
    return out_TPK


def _tiles(values, frames):
    """Output values of a block, in lines of adjacent ones, and frames that share their arithmetic on addresses."""
    return min(1024, triton.next_power_of_2(values)), max(1, min(8, frames))


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
    if (len(shape) != 2 or 0 in shape or (run.u[0], run.v[0]) != (half, half)
            or any(dtype != torch.uint8 for *_, dtype in planes)):
        raise ValueError("a frame must be uint8 planes [H, W], [⌈H/2⌉, ⌈W/2⌉], [⌈H/2⌉, ⌈W/2⌉], found "
                         + ", ".join(f"{dtype} {list(shape)}" for shape, _, dtype in planes))
    if len(run.factors) != 6 or not all(isinstance(number, int) for number in run.factors):
        raise ValueError(f"a conversion must be six whole numbers, found {run.factors}")


def _work(frames, runs, most):
    """What the kernel reads of `runs`, at most `most` frames together.

    Returns:
        items [items, 14] int64: strides of rows and columns of Y and of U and V, H, W, the six factors, the first
        frame, F; addresses [T, 3] int64 of Y, U and V.
    """
    items = [(*run.y[1], *run.u[1], *run.y[0], *run.factors, first, min(most, run.first + run.count - first))
             for run in runs for first in range(run.first, run.first + run.count, most)]
    addresses = [[plane.data_ptr() for plane in frame] for frame in frames]
    tables = torch.tensor(items, dtype=torch.int64), torch.tensor(addresses, dtype=torch.int64)
    device = frames[0][0].device
    # From pinned memory the copies do not wait for the GPU.
    return [table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table for table in tables]


@triton.jit
def _yuv_patchify_kernel(
        work_ptr, address_ptr, table_ptr, out_ptr, scale_0, scale_1, scale_2, offset_0, offset_1, offset_2,
        N: tl.constexpr, p: tl.constexpr, K: tl.constexpr, AFFINE: tl.constexpr, OFFSETS: tl.constexpr,
        BLOCK: tl.constexpr, LINE: tl.constexpr):
    """A block of output values of each frame of one work item; offsets within a frame are computed once."""
    VALUES: tl.constexpr = (N // p) * (N // p) * K
    work_ptr += tl.program_id(1).to(tl.int64) * 14
    y_row, y_column = tl.load(work_ptr).to(OFFSETS), tl.load(work_ptr + 1).to(OFFSETS)
    uv_row, uv_column = tl.load(work_ptr + 2).to(OFFSETS), tl.load(work_ptr + 3).to(OFFSETS)
    H, W = tl.load(work_ptr + 4).to(tl.int32), tl.load(work_ptr + 5).to(tl.int32)
    luma, dark = tl.load(work_ptr + 6).to(tl.int32), tl.load(work_ptr + 7).to(tl.int32)
    v_red, u_blue = tl.load(work_ptr + 8).to(tl.int32), tl.load(work_ptr + 9).to(tl.int32)
    u_green, v_green = tl.load(work_ptr + 10).to(tl.int32), tl.load(work_ptr + 11).to(tl.int32)
    first, count = tl.load(work_ptr + 12), tl.load(work_ptr + 13)
    start = tl.program_id(0) * BLOCK
    mask, channel, row, column = sampled_pixels(start, H, W, N, p, K, BLOCK, LINE)
    y_at = row * y_row + column * y_column
    uv_at = (row >> 1) * uv_row + (column >> 1) * uv_column
    u_factor = tl.where(channel == 0, 0, tl.where(channel == 1, u_green, u_blue))
    v_factor = tl.where(channel == 0, v_red, tl.where(channel == 1, v_green, 0))
    if AFFINE:
        scale = tl.where(channel == 0, scale_0, tl.where(channel == 1, scale_1, scale_2))
        offset = tl.where(channel == 0, offset_0, tl.where(channel == 1, offset_1, offset_2))
    flat = start + tl.arange(0, BLOCK)
    for f in range(first, first + count):
        y_ptr = tl.load(address_ptr + f * 3).to(tl.pointer_type(tl.uint8))
        u_ptr = tl.load(address_ptr + f * 3 + 1).to(tl.pointer_type(tl.uint8))
        v_ptr = tl.load(address_ptr + f * 3 + 2).to(tl.pointer_type(tl.uint8))
        y = 8 * tl.load(y_ptr + y_at, mask=mask, other=0).to(tl.int32) - dark
        u = 8 * (tl.load(u_ptr + uv_at, mask=mask, other=0).to(tl.int32) - 128)
        v = 8 * (tl.load(v_ptr + uv_at, mask=mask, other=0).to(tl.int32) - 128)
        byte = (y * luma >> 16) + (u * u_factor >> 16) + (v * v_factor >> 16)
        byte = tl.minimum(tl.maximum(byte, 0), 255)
        if AFFINE:
            out = tl.where(mask, byte.to(tl.float32) * scale + offset, 0.0).to(out_ptr.dtype.element_ty)
        else:
            out = tl.load(table_ptr + channel * 256 + byte, mask=mask, other=0.0)
        tl.store(out_ptr + f * VALUES + flat, tl.reshape(out, (BLOCK,)), mask=flat < VALUES)


def _patchify(frames, runs, size, patch, mean, std, dtype):
    """Launch the kernel on a list of frames."""
    if any(run.u[1] != run.v[1] for run in runs):  # the kernel has one offset for both
        frames = [(y, u.contiguous(), v.contiguous()) for y, u, v in frames]
        runs = _runs(frames, [run.factors for run in runs for _ in range(run.count)])
    reach = max(sum((n - 1) * stride for n, stride in zip(shape, strides))
                for run in runs for shape, strides, _ in (run.y, run.u))
    device, grid = frames[0][0].device, size // patch
    out_TPK = torch.empty(len(frames), grid * grid, row_length(patch), dtype=dtype, device=device)
    values = out_TPK[0].numel()
    block, together = _tiles(values, max(run.count for run in runs))
    work, addresses = _work(frames, runs, together)
    numbers = affine(mean, std, dtype)
    table = out_TPK if numbers else device_table(mean, std, dtype, device)  # the affine kernel reads none
    launch(
        _yuv_patchify_kernel, (triton.cdiv(values, block), len(work)),
        work, addresses, table, out_TPK, *(numbers or (0.0,) * 6), N=size, p=patch, K=row_length(patch),
        AFFINE=numbers is not None, OFFSETS=tl.int32 if reach < 2**31 else tl.int64, BLOCK=block,
        LINE=min(block, 128), num_warps=4)
    return out_TPK


def yuv_patchify(frames, conversions, *, size, patch, mean, std, dtype=torch.float16, impl="auto"):
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
