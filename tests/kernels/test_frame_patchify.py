"""Patch rows against torch's nearest resize and convolution, and against the reference's recordings."""

import json

import numpy as np
import pytest
import torch
from fastvid_kernels import frame_patchify
from fastvid_kernels.patch_rows import affine, embedding_matrix, row_length
from harness import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import each_pair
from torch.nn.functional import conv2d, interpolate

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "reference"]
each_impl = pytest.mark.parametrize("impl", IMPLS)
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}


# No scale and offset give these values: the kernel must look them up.
ODD = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 1e-3, 7e4)}


def _frames(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def _pixels(rows_TPK, size, patch):
    """[T, 3, N, N] pictures that patch rows were cut from; what fills the rows up is zero."""
    grid, used = size // patch, 3 * patch * patch
    assert (rows_TPK[..., used:] == 0).all()
    rows = rows_TPK[..., :used].reshape(-1, grid, grid, patch, patch, 3)
    return rows.permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, grid * patch, grid * patch)


def _direct(frames, size, mean, std):
    """The reference's chain: float, nearest, uint8, then scale and normalise in float32."""
    small = interpolate(frames.permute(0, 3, 1, 2).float(), size=(size, size)).to(torch.uint8)
    small = (small.double() / 255).float()
    mean, std = torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
    return (small - mean) / std


def _assert_as_the_chain(frames, size, patch, dtype, impl, options=CLIP):
    rows = frame_patchify(frames, size=size, patch=patch, dtype=dtype, impl=impl, **options)
    whole = size // patch * patch
    assert rows.dtype == dtype and rows.shape == (len(frames), (size // patch) ** 2, row_length(patch))
    expected = _direct(frames.cpu(), size, **options)[:, :, :whole, :whole].to(dtype)
    assert torch.equal(_pixels(rows.cpu(), size, patch), expected)


@pytest.mark.slow
@each_pair(
    sizes=[(48, 64, 32, 16), (1, 1, 28, 14), (240, 320, 56, 14), (61, 35, 30, 7), (56, 56, 56, 14), (62, 76, 28, 14)],
    dtype=DTYPES,
    impl=IMPLS,
)
def test_bit_identical_to_the_chain(sizes, dtype, impl):
    height, width, size, patch = sizes
    _assert_as_the_chain(_frames(10, height, width, 3), size, patch, dtype, impl)


@pytest.mark.slow
@each_impl
def test_takes_the_pixels_of_float_arithmetic(impl):
    """212 pixels to 336, and 248 to 56, are lengths where integer arithmetic takes another pixel."""
    full = impl == "reference" or DEVICE != "cpu"  # an interpreter is slow
    height, size = (212, 336) if full else (248, 56)
    _assert_as_the_chain(_frames(1, height, 98, 3), size, 14, torch.float16, impl)


@each_impl
@pytest.mark.parametrize("dtype", DTYPES)
def test_any_mean_and_deviation(impl, dtype):
    _assert_as_the_chain(_frames(2, 40, 50, 3), 28, 14, dtype, impl, ODD)


@pytest.mark.slow
@each_impl
@given(
    height=st.integers(1, 99),
    width=st.integers(1, 99),
    patch=st.integers(1, 9),
    extra=st.integers(0, 30),
    T=st.integers(0, 3),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_size(impl, height, width, patch, extra, T, dtype, seed):
    _assert_as_the_chain(_frames(T, height, width, 3, seed=seed), patch + extra, patch, dtype, impl)


@pytest.mark.slow
@each_impl
def test_clips_of_several_sizes(impl):
    clips = [_frames(10, 30, 40, 3), _frames(0, 5, 6, 3), _frames(1, 77, 20, 3), _frames(3, 20, 77, 3)[:, :, ::2]]
    rows = frame_patchify(clips, size=28, patch=14, impl=impl, **CLIP)
    expected = [frame_patchify(clip, size=28, patch=14, impl="reference", **CLIP) for clip in clips]
    assert torch.equal(rows, torch.cat(expected))


@each_impl
def test_the_convolution_becomes_a_product(impl):
    frames = _frames(2, 40, 50, 3)
    rows = frame_patchify(frames, size=30, patch=7, dtype=torch.float32, impl=impl, **CLIP).double().cpu()
    weight = torch.randn(5, 3, 7, 7, dtype=torch.float64)
    expected = conv2d(_direct(frames.cpu(), 30, **CLIP).double(), weight, stride=7).flatten(2).transpose(1, 2)
    assert torch.allclose(rows @ embedding_matrix(weight).T, expected, rtol=1e-12, atol=1e-12)


@each_impl
@pytest.mark.parametrize(
    "strided",
    [
        lambda: _frames(2, 3, 40, 50).permute(0, 2, 3, 1),
        lambda: _frames(4, 80, 50, 3)[::2, ::2].flip(2),
        lambda: _frames(1, 40, 50, 3).expand(3, 40, 50, 3),
        lambda: _frames(0, 40, 50, 3),
        lambda: _frames(3, 40, 50, 4)[..., 1:],
    ],
)
def test_strides(impl, strided):
    frames = strided()
    before = frames.clone()
    rows = frame_patchify(frames, size=28, patch=14, impl=impl, **CLIP)
    assert torch.equal(rows, frame_patchify(frames.contiguous(), size=28, patch=14, impl="reference", **CLIP))
    assert rows.is_contiguous() and len(rows) == len(frames)
    assert torch.equal(frames, before)


@pytest.mark.parametrize("patch, length", [(1, 8), (2, 16), (7, 152), (14, 592), (16, 768), (32, 3072)])
def test_rows_are_multiples_of_eight(patch, length):
    assert row_length(patch) == length


@pytest.mark.parametrize(
    "frames, options, message",
    [
        (torch.zeros(2, 4, 4, 3), {}, "uint8"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), {}, r"\[2, 3, 4, 4\]"),
        (torch.zeros(2, 0, 4, 3, dtype=torch.uint8), {}, r"\[2, 0, 4, 3\]"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {"patch": 29}, "29"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {"patch": 0}, "0"),
        (torch.zeros(2, 4, 4, 3, dtype=torch.uint8), {"impl": "fast"}, "'fast'"),
    ],
)
def test_refusals(frames, options, message):
    with pytest.raises(ValueError, match=message):
        frame_patchify(frames, **{"size": 28, "patch": 14, **CLIP, **options})


def test_refuses_no_clips():
    with pytest.raises(ValueError, match="at least one"):
        frame_patchify([], size=28, patch=14, **CLIP)


@pytest.mark.parametrize("dtype, holds", [(torch.float16, True), (torch.bfloat16, True), (torch.float32, False)])
def test_scale_and_offset_replace_the_table_where_they_equal_it(dtype, holds):
    assert (affine(**CLIP, dtype=dtype) is not None) == holds
    assert affine(**ODD, dtype=dtype) is None


@each_impl
def test_pixel_values_of_the_recordings(golden, impl):
    recorded = json.loads((golden / "preprocess.json").read_text())
    frames = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    for dtype, expected in (
        (torch.float32, np.array([[int(v, 16) for v in row] for row in recorded["lut_f32_hex"]], np.uint32)),
        (torch.float16, np.array(recorded["lut_f16"], np.float16).view(np.uint16)),
    ):
        rows = frame_patchify(frames.to(DEVICE), size=16, patch=16, dtype=dtype, impl=impl, **CLIP).cpu()
        assert (rows.view(256, 3).T.contiguous().numpy().view(expected.dtype) == expected).all()


@pytest.mark.slow
def test_nearest_maps_of_the_recordings(golden):
    recorded = json.loads((golden / "preprocess.json").read_text())["nearest"]
    identity = {"mean": (0, 0, 0), "std": (1 / 255,) * 3}
    for key, maps in recorded.items():
        height, width, size = map(int, key.replace("->", "x").split("x"))
        row, column = torch.arange(height)[:, None], torch.arange(width)
        coordinates = [row % 256 + 0 * column, row // 256 * 16 + column // 256, column % 256 + 0 * row]
        frames = torch.stack(coordinates, -1)[None].to(torch.uint8)
        rows = frame_patchify(frames.to(DEVICE), size=size, patch=14, dtype=torch.float32, **identity).cpu()
        low_row, high, low_column = _pixels(rows, size, 14)[0].round().long()
        assert (low_row + 256 * (high // 16))[:, 0].tolist() == maps["row"], key
        assert (low_column + 256 * (high % 16))[0].tolist() == maps["col"], key
