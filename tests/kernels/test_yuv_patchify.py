"""Patch rows of planes against those of the frames that swscale converts, to the bit."""

import mmap

import av
import numpy as np
import pytest
import torch
from fastvid_kernels import frame_patchify, yuv_patchify
from fastvid_kernels.yuv_patchify import yuv_to_rgb
from harness import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import each_pair

from fastvid.video.decode.planes import can_gather, factors, to_rgb

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "reference"]
each_impl = pytest.mark.parametrize("impl", IMPLS)
CLIP = {"mean": (0.48145466, 0.4578275, 0.40821073), "std": (0.26862954, 0.26130258, 0.27577711)}
ODD = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 1e-3, 7e4)}  # by a table: no scale and offset give these values
LIMITED, FULL = 1, 2  # FFmpeg's numbers of ranges
SPACES = [1, 2, 4, 5, 6, 7, 9]
SIX = factors(6, False)
CONVERSIONS = [(space, full) for space in SPACES for full in (False, True)]


def planes(height, width, seed=0):
    """Y, U, V of noise."""
    generator = torch.Generator().manual_seed(seed)
    half = (-(-height // 2), -(-width // 2))
    return tuple(
        torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator).to(DEVICE)
        for shape in ((height, width), half, half)
    )


def nv12(y, u, v, pitch=64):
    """The same samples as a decoder's surface has them: rows at a pitch, U and V side by side."""
    wide = -(-y.shape[1] // pitch) * pitch
    surface = torch.full((y.shape[0] + u.shape[0], wide), 77, dtype=torch.uint8, device=y.device)
    surface[: len(y), : y.shape[1]] = y
    chroma = surface[len(y) :].view(len(u), -1, 2)
    chroma[:, : u.shape[1], 0], chroma[:, : u.shape[1], 1] = u, v
    return surface[: len(y), : y.shape[1]], chroma[:, : u.shape[1], 0], chroma[:, : u.shape[1], 1]


def swscales(y, u, v, space=2, full=False):
    """[1, H, W, 3] that PyAV makes of the planes."""
    frame = av.VideoFrame(y.shape[1], y.shape[0], "yuv420p")
    for plane, values in zip(frame.planes, (y, u, v)):
        padded = np.zeros((values.shape[0], plane.line_size), np.uint8)
        padded[:, : values.shape[1]] = values.cpu().numpy()
        plane.update(padded.tobytes())
    frame.colorspace, frame.color_range = space, FULL if full else LIMITED
    return torch.from_numpy(frame.to_ndarray(format="rgb24"))[None].to(DEVICE)


def check(given, *, impl, size=28, patch=14, dtype=torch.float32, options=CLIP):
    """`given`: [(planes, colour space, whether of full range)]."""
    settings = {"size": size, "patch": patch, "dtype": dtype, **options}
    found = yuv_patchify(
        [frame for frame, *_ in given], [factors(*about) for _, *about in given], impl=impl, **settings
    )
    pictures = [swscales(*frame, *about) for frame, *about in given]
    assert torch.equal(found, frame_patchify(pictures, impl="reference", **settings))
    assert found.is_contiguous() and found.dtype == dtype


@pytest.mark.slow
@each_pair(
    sizes=[(48, 64, 32, 16), (2, 1, 28, 14), (240, 320, 56, 14), (62, 35, 30, 7), (56, 56, 56, 14), (62, 853, 28, 14)],
    dtype=DTYPES,
    impl=IMPLS,
)
def test_the_bits_of_converted_frames(sizes, dtype, impl):
    height, width, size, patch = sizes
    check(
        [(planes(height, width, seed), 2, False) for seed in range(3)], impl=impl, size=size, patch=patch, dtype=dtype
    )


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("space, full", CONVERSIONS)
def test_every_conversion(impl, space, full):
    check([(planes(28, 28), space, full)], impl=impl)


@pytest.mark.slow
@pytest.mark.parametrize("space, full", CONVERSIONS)
def test_all_triples(space, full):
    """Of the plain function; the one of the CPU's pipeline is compared with swscale on all of them."""
    numbers = np.arange(256, dtype=np.uint8)
    for y in range(0, 256, 16):
        triple = np.meshgrid(numbers[y : y + 16], numbers, numbers, indexing="ij")
        found = yuv_to_rgb(*map(torch.from_numpy, triple), factors(space, full))
        assert np.array_equal(found.numpy(), to_rgb(*triple, space, full))


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("edge", [0, 16, 128, 235, 240, 255])
def test_samples_at_the_ends(impl, edge):
    """Also those that no camera writes: sums above white and below black are cut off."""
    extremes = torch.tensor([0, 16, 128, 240, 255], dtype=torch.uint8, device=DEVICE)
    u, v = (x.contiguous() for x in torch.broadcast_tensors(extremes[:, None], extremes[None]))
    y = torch.full((10, 10), edge, dtype=torch.uint8, device=DEVICE)
    for about in ((6, False), (1, True), (9, False)):
        check([((y, u, v), *about)], impl=impl, size=10, patch=5)


@pytest.mark.slow
@each_impl
@given(
    height=st.integers(1, 60),
    width=st.integers(1, 99),
    patch=st.integers(1, 9),
    extra=st.integers(0, 30),
    dtype=st.sampled_from(DTYPES),
    about=st.sampled_from(CONVERSIONS),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_size(impl, height, width, patch, extra, dtype, about, seed):
    check([(planes(2 * height, width, seed), *about)], impl=impl, size=patch + extra, patch=patch, dtype=dtype)


@pytest.mark.slow
@each_impl
def test_frames_of_several_videos(impl):
    """Other sizes, colour spaces and strides between them; runs longer than what a program takes."""
    given = [(planes(30, 40, seed), 1, False) for seed in range(11)]
    given += [
        (planes(30, 40, 20), 1, True),
        (nv12(*planes(30, 40, 21)), 1, True),
        (nv12(*planes(78, 20, 22)), 9, False),
        (planes(30, 40, 23), 1, False),
    ]
    check(given, impl=impl, dtype=torch.float16)


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("options", [CLIP, ODD], ids=["affine", "table"])
def test_any_mean_and_deviation(impl, options):
    for dtype in DTYPES:
        check([(planes(40, 50), 6, False)], impl=impl, dtype=dtype, options=options)


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize(
    "strided",
    [
        nv12,
        lambda *frame: tuple(x.T.contiguous().T for x in frame),
        lambda *frame: tuple(x[:1].expand(x.shape) for x in frame),
        lambda *frame: tuple(x.repeat_interleave(2, 0).repeat_interleave(3, 1)[::2, ::3] for x in frame),
        lambda y, u, v: (y.T.contiguous().T, u, v.T.contiguous().T),
    ],
    ids=["a surface", "turned", "expanded", "spread", "chroma of two kinds"],
)
def test_strides(impl, strided):
    frame = strided(*planes(40, 50))
    before = [x.clone() for x in frame]
    check([(frame, 6, False)], impl=impl)
    assert all(map(torch.equal, frame, before))


@pytest.mark.slow
@each_impl
def test_rows_further_apart_than_32_bits_reach(impl):
    y, u, v = planes(4, 6)
    step = 2**30
    with mmap.mmap(-1, 3 * step + 6) as memory:  # of which the rows' pages alone are ever there
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        far = everything.as_strided((4, 6), (step, 1))
        far.copy_(y)
        found = yuv_patchify(
            [(far.to(DEVICE) if DEVICE == "cuda" else far, u, v)], [SIX], size=28, patch=14, impl=impl, **CLIP
        )
        del far, everything
    assert torch.equal(found, yuv_patchify([(y, u, v)], [SIX], size=28, patch=14, impl="reference", **CLIP))


@pytest.mark.slow
@each_impl
def test_odd_heights_are_of_the_formula(impl):
    """Which is not swscale's there: such videos are left to it."""
    frame = planes(31, 40)
    wide = [x.repeat_interleave(2, 0)[:31].repeat_interleave(2, 1)[:, :40] for x in frame[1:]]
    expected = frame_patchify(
        yuv_to_rgb(frame[0], *wide, factors(6, False))[None], size=28, patch=14, impl="reference", **CLIP
    )
    assert torch.equal(yuv_patchify([frame], [factors(6, False)], size=28, patch=14, impl=impl, **CLIP), expected)


@pytest.mark.slow
@each_impl
def test_clips_of_the_recordings(golden, impl):
    """Every clip of 8-bit 4:2:0; the first at the tower's own size, others at one small enough to be interpreted."""
    seen = []
    for path in sorted((golden / "videos").glob("*")):
        try:
            with av.open(str(path)) as container:
                frame = next(container.decode(video=0))
        except (av.FFmpegError, StopIteration, IndexError):
            continue
        if not can_gather(frame):
            continue
        y, u, v = (
            torch.from_numpy(np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:, : plane.width].copy()).to(
                DEVICE
            )
            for plane in frame.planes
        )
        numbers = factors(int(frame.colorspace), frame.format.name == "yuvj420p" or frame.color_range == FULL)
        large = not seen and (impl == "reference" or DEVICE != "cpu")
        settings = {"size": 336 if large else 28, "patch": 14, "dtype": torch.float16, **CLIP}
        found = yuv_patchify([(y, u, v)], [numbers], impl=impl, **settings)
        picture = torch.from_numpy(frame.to_ndarray(format="rgb24"))[None].to(DEVICE)
        assert torch.equal(found, frame_patchify(picture, impl="reference", **settings)), path.name
        seen.append(path.name)
    assert len(seen) >= 5


Y, HALF = torch.zeros(4, 6, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.uint8)


@pytest.mark.parametrize(
    "frames, conversions, options, message",
    [
        ([], [], {}, "at least one"),
        ([(Y, HALF, HALF)], [], {}, "a conversion for each of 1 frames, found 0"),
        ([(Y, HALF, HALF)], [SIX[:5]], {}, r"six whole numbers, found \(9539, 128, 13075, 16525, -3209\)"),
        ([(Y, HALF, HALF)], [(*SIX[:5], 0.5)], {}, r"six whole numbers, found .*0.5"),
        ([(Y, HALF)], [SIX], {}, "three planes, Y, U and V, found 2"),
        ([()], [SIX], {}, "three planes, Y, U and V, found 0"),
        ([(Y, HALF, HALF[:1])], [SIX], {}, r"\[1, 3\]"),
        ([(Y.short(), HALF, HALF)], [SIX], {}, "int16"),
        ([(Y[None], HALF, HALF)], [SIX], {}, r"\[1, 4, 6\]"),
        ([(Y[:0], HALF[:0], HALF[:0])], [SIX], {}, r"\[0, 6\]"),
        ([(Y, HALF, HALF)], [SIX], {"patch": 29}, "29"),
        ([(Y, HALF, HALF)], [SIX], {"impl": "fast"}, "'fast'"),
    ],
)
def test_refusals(frames, conversions, options, message):
    with pytest.raises(ValueError, match=message):
        yuv_patchify(frames, conversions, **{"size": 28, "patch": 14, **CLIP, **options})
