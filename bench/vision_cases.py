"""Rows of the kernels around and within the CLIP tower, and the reference's CPU code that they replace.

Dimensions: B videos, T frames, P patches, C and F channels, R rows of all images, N temporal rows, H×W decoded
pixels, S tower pixels per side.
"""

import math
from functools import partial

import numpy as np
import torch
from fastvid_kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from fastvid_kernels.frame_patchify import frame_patchify, frame_patchify_reference
from fastvid_kernels.grid_pool import grid_pool
from fastvid_kernels.patch_rows import row_length
from fastvid_kernels.quick_gelu import quick_gelu, quick_gelu_reference
from fastvid_kernels.spatio_temporal_pool import spatio_temporal_pool
from fastvid_kernels.yuv_patchify import yuv_patchify, yuv_to_rgb
from PIL import Image
from torch.nn.functional import adaptive_avg_pool3d

from bench.cases import Case, Gradients, forward, in_fp32, library, normal, ways_of, with_compiled

NUM_TEMPORAL = 100
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BT709 = (9539, 128, 14686, 17305, -1747, -4366)  # of `yuv_patchify`'s conversions
SECTOR = 32  # bytes that memory hands over at once


def two_means(x_BTPC, num_temporal):
    """Pooling as one writes it in torch: two reads of the input."""
    padding = x_BTPC.new_zeros(x_BTPC.shape[0], num_temporal - x_BTPC.shape[1], x_BTPC.shape[3])
    return torch.cat([x_BTPC.mean(2), padding, x_BTPC.mean(1)], dim=1)


def _states(generator, device, B, T, P, C, dtype):
    """Patch states as the tower leaves them: a view past the class token."""
    return normal(generator, device, B, T, P + 1, C, dtype=dtype)[:, :, 1:]


def _pool_cases(B, T, P, C, dtype):
    item, rows = dtype.itemsize, NUM_TEMPORAL + P
    shapes = {"B": B, "T": T, "P": P, "C": C, "dtype": str(dtype).removeprefix("torch.")}
    moved = item * B * C * (T * P + rows)
    functions = with_compiled(
        {
            "ours": lambda x: spatio_temporal_pool(x, num_temporal=NUM_TEMPORAL),
            "eager": lambda x: two_means(x, NUM_TEMPORAL),
        }
    )

    def inputs(generator, device):
        return (_states(generator, device, B, T, P, C, dtype),)

    def inputs_and_gradient(generator, device):
        return *inputs(generator, device), (normal(generator, device, B, rows, C, dtype=dtype),)

    yield Case(
        "spatio_temporal_pool",
        "forward",
        shapes,
        inputs,
        ways_of(forward, functions),
        in_fp32(forward(functions["eager"])),
        moved,
    )
    yield Case(
        "spatio_temporal_pool",
        "backward",
        shapes,
        inputs_and_gradient,
        ways_of(Gradients, functions),
        in_fp32(Gradients(functions["eager"])),
        moved,
    )


def grid_in_torch(x_TPC, grid):
    """The same by torch's own operation, which wants channels first; on a CPU it would sum in 16 bits."""
    side = math.isqrt(x_TPC.shape[1])
    x_CTHW = (x_TPC if x_TPC.is_cuda else x_TPC.float()).unflatten(1, (side, side)).movedim(-1, 0)
    return adaptive_avg_pool3d(x_CTHW[None], grid)[0].flatten(1).T.to(x_TPC.dtype)


def _grid_case(T, P, C, grid, dtype):
    functions = with_compiled({"ours": lambda x: grid_pool(x, grid), "eager": lambda x: grid_in_torch(x, grid)})
    return Case(
        "grid_pool",
        "forward",
        {"T": T, "P": P, "C": C, "grid": "x".join(map(str, grid)), "dtype": str(dtype).removeprefix("torch.")},
        lambda generator, device: (normal(generator, device, T, P, C, dtype=dtype),),
        ways_of(forward, functions),
        in_fp32(forward(functions["eager"])),
        dtype.itemsize * C * (T * P + math.prod(grid)),
    )


def patchify_in_torch(frames_THW3, size, patch, dtype):
    """Patch rows by operations on whole tensors, as one writes them in torch."""
    _, H, W, _ = frames_THW3.shape
    device, grid = frames_THW3.device, size // patch
    rows, columns = (
        torch.floor(torch.arange(size, device=device) * torch.tensor(n / size, device=device))
        .long()
        .clamp(max=n - 1)[: grid * patch]
        for n in (H, W)
    )
    return _normalised_patches(frames_THW3[:, rows[:, None], columns], patch, dtype)


def _normalised_patches(pixels_TSS3, patch, dtype):
    """Patch rows of sampled bytes."""
    T, grid = len(pixels_TSS3), pixels_TSS3.shape[1] // patch
    mean, std = (torch.tensor(v, device=pixels_TSS3.device) for v in (MEAN, STD))
    pixels = ((pixels_TSS3.float() / 255 - mean) / std).to(dtype)
    used = pixels.view(T, grid, patch, grid, patch, 3).transpose(2, 3).reshape(T, grid * grid, -1)
    return torch.nn.functional.pad(used, (0, row_length(patch) - used.shape[2]))


def _surfaces(surfaces_THW):
    """[(Y, U, V)] of NV12 surfaces [T, 3·H/2, W]."""
    height = surfaces_THW.shape[1] * 2 // 3
    chroma = surfaces_THW[:, height:].unflatten(2, (-1, 2))
    return list(zip(surfaces_THW[:, :height].unbind(), chroma[..., 0].unbind(), chroma[..., 1].unbind()))


def yuv_in_torch(surfaces_THW, size, patch, dtype):
    """Patch rows of NV12 surfaces by operations on whole tensors, as one writes them in torch."""
    device, height, width = surfaces_THW.device, surfaces_THW.shape[1] * 2 // 3, surfaces_THW.shape[2]
    rows, columns = (
        torch.floor(torch.arange(size, device=device) * torch.tensor(n / size, device=device))
        .long()
        .clamp(max=n - 1)[: size // patch * patch]
        for n in (height, width)
    )
    chroma = surfaces_THW[:, height:].unflatten(2, (-1, 2))[:, rows[:, None] // 2, columns // 2]
    rgb = yuv_to_rgb(surfaces_THW[:, rows[:, None], columns], chroma[..., 0], chroma[..., 1], BT709)
    return _normalised_patches(rgb, patch, dtype)


def _yuv_case(T, H, W, size, patch, dtype=torch.float16):
    def ours(impl):
        def way(surfaces):
            frames = _surfaces(surfaces)
            return torch.no_grad()(
                partial(
                    yuv_patchify,
                    frames,
                    [BT709] * T,
                    size=size,
                    patch=patch,
                    mean=MEAN,
                    std=STD,
                    dtype=dtype if impl == "auto" else torch.float32,
                    impl=impl,
                )
            )

        return way

    whole = with_compiled({"eager": lambda surfaces: yuv_in_torch(surfaces, size, patch, dtype)})
    grid = size // patch
    read = sampled_bytes(H, W, size, patch, 1) + sampled_bytes(H, W, size, patch, 1, halved=True)
    return Case(
        "yuv_patchify",
        "forward",
        {"T": T, "H": H, "W": W, "S": size, "dtype": "float16"},
        lambda generator, device: (_frames(generator, device, T, H * 3 // 2, W),),
        {"ours": ours("auto")} | ways_of(forward, whole),
        ours("reference"),
        T * (read + dtype.itemsize * grid**2 * row_length(patch)),
    )


def sampled_bytes(height, width, size, patch, item=3, *, halved=False):
    """Bytes of the sectors of a contiguous picture of `item` bytes a pixel that hold a sampled pixel.

    `halved`: of the chroma of NV12, whose rows are as long, and half as many.
    """
    kept = size // patch * patch
    rows, columns = (
        np.minimum(np.floor(np.arange(kept, dtype=np.float32) * (np.float32(n) / np.float32(size))), n - 1).astype(
            np.int64
        )
        for n in (height, width)
    )
    if halved:
        rows, columns = rows // 2, columns // 2 * 2
    first = (np.unique(rows)[:, None] * width + np.unique(columns)) * item
    return SECTOR * np.unique(np.concatenate([first // SECTOR, (first + item - 1 + halved) // SECTOR])).size


def _frames(generator, device, *shape):
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8, device=device)


def _patchify_case(T, H, W, size, patch, dtype=torch.float16):
    functions = with_compiled(
        {
            "ours": lambda frames: frame_patchify(frames, size=size, patch=patch, mean=MEAN, std=STD, dtype=dtype),
            "eager": lambda frames: patchify_in_torch(frames, size, patch, dtype),
        }
    )
    ways = ways_of(forward, functions)
    ways["reference's chain"] = _chain(size, patch, dtype)
    grid = size // patch
    return Case(
        "frame_patchify",
        "forward",
        {"T": T, "H": H, "W": W, "S": size, "dtype": "float16"},
        lambda generator, device: (_frames(generator, device, T, H, W, 3),),
        ways,
        forward(
            lambda frames: frame_patchify_reference(
                frames, size=size, patch=patch, mean=MEAN, std=STD, dtype=torch.float32
            )
        ),
        T * (sampled_bytes(H, W, size, patch) + dtype.itemsize * grid**2 * row_length(patch)),
    )


def _chain(size, patch, dtype):
    """PG-Video-LLaVA's way from decoded frames to the tower's input: float, resize, bytes, PIL, CLIP's processor."""

    def prepare(frames):
        processor, frames = _clip_processor(size), frames.cpu()

        def call():
            resized = torch.nn.functional.interpolate(frames.permute(0, 3, 1, 2).float(), size=(size, size))
            pixels = resized.permute(0, 2, 3, 1).to(torch.uint8).numpy()
            images = [Image.fromarray(image) for image in pixels]
            values = processor.preprocess(images, return_tensors="pt")["pixel_values"].to(dtype)
            return _patch_rows(values, patch)

        return call

    return prepare


def _patch_rows(values_T3SS, patch):
    """The same rows as frame_patchify's."""
    used = torch.nn.functional.unfold(values_T3SS, patch, stride=patch).transpose(1, 2)
    used = used.unflatten(2, (3, -1)).transpose(2, 3).flatten(2)
    return torch.nn.functional.pad(used, (0, row_length(patch) - used.shape[2]))


def _clip_processor(size):
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def _layer_norm_case(R, C, dtype):
    functions = with_compiled(
        {
            "ours": lambda *given: add_layer_norm(*given, 1e-5),
            "eager": lambda *given: add_layer_norm_reference(*given, 1e-5),
        }
    )
    functions |= library("liger_kernel", "Liger", _liger_layer_norm, triton=True)

    def reference(residual, branch, weight, bias):
        """In fp32, of the rounded sum: that is what the next layer reads."""
        total = residual + branch
        return total, add_layer_norm_reference(total.float(), None, weight.float(), bias.float(), 1e-5)[1]

    return Case(
        "add_layer_norm",
        "forward",
        {"R": R, "C": C, "dtype": str(dtype).removeprefix("torch.")},
        lambda generator, device: tuple(
            normal(generator, device, *shape, dtype=dtype) for shape in ((R, C), (R, C), (C,), (C,))
        ),
        ways_of(forward, functions),
        # The compiler keeps the sum in fp32 and normalises that: where the bias cancels a large number, the sum's
        # rounding shows.
        forward(reference),
        4 * R * C * dtype.itemsize,
        looser={"torch.compile": 2**-9},
    )


def _liger_layer_norm():
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    def norm(residual, branch, weight, bias):
        total = residual + branch
        return total, LigerLayerNormFunction.apply(total, weight, bias, 1e-5)

    return norm


def _quick_gelu_case(R, F, dtype):
    functions = with_compiled({"ours": quick_gelu, "eager": lambda x: x * torch.sigmoid(1.702 * x)})
    return Case(
        "quick_gelu",
        "forward",
        {"R": R, "F": F, "dtype": str(dtype).removeprefix("torch.")},
        lambda generator, device: (normal(generator, device, R, F, dtype=dtype),),
        ways_of(forward, functions),
        in_fp32(forward(quick_gelu_reference)),
        2 * R * F * dtype.itemsize,
    )


def cases(small):
    """Rows on a GPU; their small shapes are checked on a CPU."""
    if small:
        yield from _pool_cases(2, 5, 6, 32, torch.bfloat16)
        yield _grid_case(5, 16, 32, (2, 2, 3), torch.float16)
        yield _patchify_case(3, 45, 80, 28, 14)
        yield _yuv_case(3, 46, 80, 28, 14)
        yield _layer_norm_case(5, 32, torch.float16)
        yield _quick_gelu_case(5, 64, torch.float16)
        return
    yield from _pool_cases(1, 100, 576, 1024, torch.float16)  # as extraction runs it
    yield from _pool_cases(8, 100, 576, 1024, torch.bfloat16)
    yield _grid_case(16, 576, 1024, (16, 12, 12), torch.float16)  # PLLaVA's
    yield _grid_case(100, 576, 1024, (16, 12, 12), torch.float16)
    for height, width in ((336, 336), (720, 1280)):  # resized by the decoder, and whole
        yield _patchify_case(400, height, width, 336, 14)
    yield _yuv_case(100, 720, 1280, 336, 14)
    yield _layer_norm_case(25 * 577, 1024, torch.float16)  # a pass of the tower
    yield _quick_gelu_case(25 * 577, 4096, torch.float16)


def pool_with_numpy(x_TPC):
    """The reference's pooling, ``get_spatio_temporal_features``: two numpy means of an fp16 array."""
    temporal_TC = np.mean(x_TPC, axis=1)
    padding = NUM_TEMPORAL - x_TPC.shape[0]
    temporal_NC = np.pad(temporal_TC, ((0, padding), (0, 0)))
    return torch.from_numpy(np.concatenate([temporal_NC, np.mean(x_TPC, axis=0)], axis=0))


def cpu_cases(small):
    """Rows that mean something on a CPU: what extraction computes there, against the reference's code."""
    T, P, C = (5, 6, 32) if small else (100, 576, 1024)
    yield Case(
        "spatio_temporal_pool",
        "on a CPU",
        {"T": T, "P": P, "C": C, "dtype": "float16"},
        lambda generator, device: (normal(generator, device, T, P, C, dtype=torch.float16),),
        {
            "ours": forward(lambda x: spatio_temporal_pool(x, num_temporal=NUM_TEMPORAL)),
            "reference's chain": lambda x: lambda: pool_with_numpy(x.numpy()),
        },
        in_fp32(forward(lambda x: two_means(x[None], NUM_TEMPORAL)[0])),
        2 * C * (T * P + NUM_TEMPORAL + P),
    )
    size, patch = (28, 14) if small else (336, 14)
    for height, width in [(45, 80)] if small else [(720, 1280), (1080, 1920)]:
        case = _patchify_case(T if small else 100 if height == 720 else 50, height, width, size, patch)
        ways = {name: case.ways[name] for name in ("ours", "reference's chain")}
        yield Case(case.kernel, "on a CPU", case.shapes, case.make, ways, case.expected, case.bytes)
