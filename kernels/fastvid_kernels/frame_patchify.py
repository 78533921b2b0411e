"""Decoded frames to normalised patch rows: what lies between a decoder and a CLIP tower's first matrix product.

Dimensions: T frames, H×W decoded pixels, N tower pixels per side, p pixels per patch side, G = N // p patches per
side, P = G² patches, K = 3·p·p values per patch.

The pixels are those of PG-Video-LLaVA's feature script (nearest resize, then CLIPImageProcessor), bit for bit.
"""

import torch


def _nearest_indices(length, size, device):
    """Source pixel of each of `size` pixels, in float32 as ``torch.nn.functional.interpolate`` computes it."""
    scale = torch.tensor(length, dtype=torch.float32) / size
    source = torch.floor(torch.arange(size, dtype=torch.float32) * scale).long()
    return source.clamp(max=length - 1).to(device)


def _pixel_table(mean, std, dtype, device):
    """[3 · 256] value of each byte in each channel: x/255 rounded to float32, (x − mean)/std in float32, then `dtype`.

    A table is exact; v·(1/255), which compilers and GPUs make of v/255, is not.
    """
    value = (torch.arange(256, dtype=torch.float64) / 255).float()
    mean, std = (torch.tensor(v, dtype=torch.float32)[:, None] for v in (mean, std))
    return ((value - mean) / std).to(device, dtype).flatten()


def frame_patchify_reference(frames, *, size, patch, mean, std, dtype=torch.float16):
    """Plain torch on any device: see `frame_patchify`. Frame by frame, so that a frame stays in cache."""
    T, H, W, _ = frames.shape
    grid = size // patch
    rows = _nearest_indices(H, size, frames.device)[:grid * patch, None]
    columns = _nearest_indices(W, size, frames.device)[:grid * patch]
    source = (rows * W + columns).flatten()
    table = _pixel_table(mean, std, dtype, frames.device)
    channel = 256 * torch.arange(3, dtype=torch.int32, device=frames.device)[:, None, None]
    out_TPK = torch.empty(T, grid * grid, 3 * patch * patch, dtype=dtype, device=frames.device)
    for frame_HW3, out_PK in zip(frames, out_TPK):
        pixels = frame_HW3.reshape(H * W, 3).index_select(0, source).view(grid, patch, grid, patch, 3)
        pixels = pixels.permute(0, 2, 4, 1, 3).int() + channel
        torch.index_select(table, 0, pixels.flatten(), out=out_PK.view(-1))
    return out_TPK


def frame_patchify(frames, *, size, patch, mean, std, dtype=torch.float16, impl="auto"):
    """Frames resized to the tower's size, normalised, cut into patches.

    A row holds its patch in the order of a convolution kernel (channel, row, column), so the tower's patch embedding
    is ``out @ conv.weight.reshape(C, -1).T``. Patches go row by row; pixels that do not fill a patch are left out, as
    the convolution leaves them. No gradient: frames are bytes.

    Args:
        frames: [T, H, W, 3] uint8 RGB, any H, W and strides.
        size: N, pixels per side that the tower takes; nearest neighbour, aspect ratio not kept.
        patch: p, pixels per side of a patch.
        mean, std: per channel, of pixel values in [0, 1].
        dtype: of the result; float32 holds the exact values, the others are those rounded once.
        impl: "auto", "reference" (plain torch) or "triton".

    Returns:
        [T, P, 3·p·p] in `dtype`, contiguous.

    Raises:
        ValueError: a shape, size or `impl` that does not fit.
        NotImplementedError: ``impl="triton"``.
    """
    if frames.dtype != torch.uint8 or frames.dim() != 4 or frames.shape[3] != 3 or 0 in frames.shape[1:3]:
        raise ValueError(f"frames must be uint8 [T, H, W, 3], found {frames.dtype} {list(frames.shape)}")
    if not 1 <= patch <= size:
        raise ValueError(f"a patch of {patch} pixels does not fit into a picture of {size}")
    if impl == "triton":
        raise NotImplementedError("frame_patchify has no Triton kernel yet; use impl='auto'")
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', found {impl!r}")
    return frame_patchify_reference(frames, size=size, patch=patch, mean=mean, std=std, dtype=dtype)


__all__ = ["frame_patchify", "frame_patchify_reference"]
