"""Rows of pixels, a patch each: their layout, the matrix that embeds them, and the values that bytes become.

A row holds its patch pixel by pixel, row after row, the three channels of a pixel side by side as decoders and cameras
have them: 3·p·p numbers, then zeros up to a multiple of 8. So runs of it are runs of the picture, and a row of 16-bit
numbers begins at a multiple of 16 bytes, as matrix products on a GPU want it.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def row_length(patch: int) -> int:
    """K: numbers in the row of a patch of `patch` × `patch` pixels."""
    return -(-3 * patch * patch // 8) * 8


def embedding_matrix(weight_C3pp: Tensor) -> Tensor:
    """[C, K] matrix by which rows are embedded, of the convolution's weight [C, 3, p, p]: ``rows @ matrix.T``."""
    C, _, p, _ = weight_C3pp.shape
    return torch.nn.functional.pad(weight_C3pp.permute(0, 2, 3, 1).reshape(C, -1), (0, row_length(p) - 3 * p * p))


def nearest_indices(length: int, size: int, device: torch.device | str) -> Tensor:
    """Source pixel of each of `size` pixels, in float32 as ``torch.nn.functional.interpolate`` computes it."""
    scale = torch.tensor(length, dtype=torch.float32) / size
    source = torch.floor(torch.arange(size, dtype=torch.float32) * scale).long()
    return source.clamp(max=length - 1).to(device)


def pixel_table(mean: Sequence[float], std: Sequence[float], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """[3 · 256] value of each byte in each channel: x/255 rounded to float32, (x − mean)/std in float32, then `dtype`.

    A table is exact; v·(1/255), which compilers and GPUs make of v/255, is not.
    """
    value = (torch.arange(256, dtype=torch.float64) / 255).float()
    mean_31, std_31 = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (mean, std))
    return ((value - mean_31) / std_31).to(device, dtype).flatten()


@functools.lru_cache(maxsize=8)
def device_table(
    mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """`pixel_table`, kept: copying it to a GPU waits for the GPU."""
    return pixel_table(mean, std, dtype, device)


@functools.lru_cache(maxsize=8)
def affine(mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> tuple[float, ...] | None:
    """Scale and offset of each channel whose v·scale + offset in float32, rounded to `dtype`, is the table; else None.

    Tried on all 768 entries, with the product rounded and unrounded before the sum, since a compiler may fuse them.
    """
    value = torch.arange(256, dtype=torch.float64)
    mean64, std64 = (torch.tensor(v, dtype=torch.float32).double()[:, None] for v in (mean, std))
    scale, offset = (1 / (255 * std64)).float(), (-mean64 / std64).float()
    fused = (value * scale.double() + offset.double()).float()
    rounded = value.float() * scale + offset
    table = pixel_table(mean, std, dtype, "cpu").view(3, 256)
    if torch.equal(fused.to(dtype), table) and torch.equal(rounded.to(dtype), table):
        return *scale.flatten().tolist(), *offset.flatten().tolist()
    return None


def patches(pixels_NN3: Tensor, grid: int) -> Tensor:
    """[P, 3·p·p] bytes of the patches of a picture, as rows hold them."""
    patch = len(pixels_NN3) // grid
    return pixels_NN3.reshape(grid, patch, grid, 3 * patch).transpose(1, 2).reshape(grid * grid, -1)


def normalise(bytes_PK: Tensor, mean: Sequence[float], std: Sequence[float], out_PK: Tensor) -> None:
    """Put the values of bytes [P, 3·p·p] into rows [P, K], zeros behind them: those of `pixel_table`, step by step.

    Every divisor is a tensor: by a number GPUs would multiply with its inverse.
    """
    wanted, device = bytes_PK.shape[1], out_PK.device
    largest = torch.tensor(255.0, device=device)
    mean_K, std_K = (torch.tensor(v, dtype=torch.float32, device=device).repeat(wanted // 3) for v in (mean, std))
    values_PK = bytes_PK.float().div_(largest).sub_(mean_K)
    if out_PK.dtype == torch.float32:
        torch.div(values_PK, std_K, out=out_PK[:, :wanted])
    else:
        out_PK[:, :wanted] = values_PK.div_(std_K)
    out_PK[:, wanted:] = 0


__all__ = [
    "affine",
    "device_table",
    "embedding_matrix",
    "nearest_indices",
    "normalise",
    "patches",
    "pixel_table",
    "row_length",
]
