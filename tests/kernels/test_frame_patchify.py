"""Patch rows against torch's nearest resize and convolution, and against the reference's recordings."""

import json

import numpy as np
import pytest
import torch
from fastvid_kernels import frame_patchify
from torch.nn.functional import conv2d, interpolate

CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


def _pixels(rows_TPK, size, patch):
    """[T, 3, N, N] pictures that patch rows were cut from."""
    grid = size // patch
    rows = rows_TPK.view(-1, grid, grid, 3, patch, patch)
    return rows.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, grid * patch, grid * patch)


def _direct(frames, size, mean, std):
    """The reference's chain: float, nearest, uint8, then scale and normalise in float32."""
    small = interpolate(frames.permute(0, 3, 1, 2).float(), size=(size, size)).to(torch.uint8)
    small = (small.double() / 255).float()
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return (small - mean) / std


@pytest.mark.parametrize("height, width, size, patch", [
    (48, 64, 32, 16), (93, 98, 336, 14), (336, 336, 336, 14), (1, 1, 28, 14), (240, 320, 224, 14), (61, 35, 30, 7)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bit_identical_to_the_chain(height, width, size, patch, dtype):
    frames = torch.randint(0, 256, (3, height, width, 3), dtype=torch.uint8)
    rows = frame_patchify(frames, size=size, patch=patch, dtype=dtype, **CLIP)
    whole = size // patch * patch
    assert rows.dtype == dtype and rows.shape == (3, (size // patch) ** 2, 3 * patch * patch)
    assert torch.equal(_pixels(rows, size, patch), _direct(frames, size, **CLIP)[:, :, :whole, :whole].to(dtype))


def test_the_convolution_becomes_a_product():
    frames = torch.randint(0, 256, (2, 40, 50, 3), dtype=torch.uint8)
    rows = frame_patchify(frames, size=30, patch=7, dtype=torch.float32, **CLIP).double()
    weight = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    expected = conv2d(_direct(frames, 30, **CLIP).double(), weight, stride=7).flatten(2).transpose(1, 2)
    assert torch.allclose(rows @ weight.reshape(5, -1).T, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("strided", [
    lambda: torch.randint(0, 256, (2, 3, 40, 50), dtype=torch.uint8).permute(0, 2, 3, 1),
    lambda: torch.randint(0, 256, (4, 80, 50, 3), dtype=torch.uint8)[::2, ::2].flip(2),
    lambda: torch.randint(0, 256, (1, 40, 50, 3), dtype=torch.uint8).expand(3, 40, 50, 3),
    lambda: torch.randint(0, 256, (0, 40, 50, 3), dtype=torch.uint8),
])
def test_strides(strided):
    frames = strided()
    before = frames.clone()
    rows = frame_patchify(frames, size=28, patch=14, **CLIP)
    assert torch.equal(rows, frame_patchify(frames.contiguous(), size=28, patch=14, **CLIP))
    assert rows.is_contiguous() and len(rows) == len(frames)
    assert torch.equal(frames, before)


@pytest.mark.parametrize("frames, options, message", [
    (torch.zeros(2, 4, 4, 3), {}, "uint8"),
    (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, r"\[2, 3, 4, 4\]"),
    (torch.zeros(2, 0, 4, 3, dtype=torch.uint8), {}, r"\[2, 0, 4, 3\]"),
    (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {"patch": 29}, "29"),
    (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {"patch": 0}, "0"),
    (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {"impl": "fast"}, "'fast'"),
])
def test_refusals(frames, options, message):
    with pytest.raises(ValueError, match=message):
        frame_patchify(frames, **{"size": 28, "patch": 14, **CLIP, **options})


def test_triton_is_not_silently_replaced():
    with pytest.raises(NotImplementedError, match="Triton"):
        frame_patchify(torch.zeros(1, 4, 4, 3, dtype=torch.uint8), size=28, patch=14, impl="triton", **CLIP)


def test_pixel_values_of_the_recordings(shared):
    recorded = json.loads((shared / "golden" / "preprocess.json").read_text())
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    for dtype, expected in (
            (torch.float32, np.array([[int(v, 16) for v in row] for row in recorded["lut_f32_hex"]], np.uint32)),
            (torch.float16, np.array(recorded["lut_f16"], np.float16).view(np.uint16))):
        rows = frame_patchify(frames, size=16, patch=16, dtype=dtype, **CLIP)
        assert (rows.view(3, 256).numpy().view(expected.dtype) == expected).all()


def test_nearest_maps_of_the_recordings(shared):
    recorded = json.loads((shared / "golden" / "preprocess.json").read_text())["nearest"]
    identity = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}
    for key, maps in recorded.items():
        height, width, size = map(int, key.replace("->", "x").split("x"))
        row, column = torch.arange(height)[:, None], torch.arange(width)
        coordinates = [row % 256 + 0 * column, row // 256 * 16 + column // 256, column % 256 + 0 * row]
        frames = torch.stack(coordinates, -1)[None].to(torch.uint8)
        rows = frame_patchify(frames, size=size, patch=14, dtype=torch.float32, **identity)
        low_row, high, low_column = _pixels(rows, size, 14)[0].round().long()
        assert (low_row + 256 * (high // 16))[:, 0].tolist() == maps["row"], key
        assert (low_column + 256 * (high % 16))[0].tolist() == maps["col"], key
