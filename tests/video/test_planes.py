"""Samples to RGB: every triple of every conversion against swscale, and the gathered pixels of whole pictures."""

import av
import numpy as np
import pytest
from clips import draw

from fastvid.video.decode import decode
from fastvid.video.decode.planes import can_gather, gather, to_rgb
from fastvid.video.sampling import nearest_indices

LIMITED, FULL = 1, 2  # FFmpeg's numbers of ranges
SPACES = {"BT.709": 1, "unspecified": 2, "FCC": 4, "BT.470": 5, "BT.601": 6, "240M": 7, "BT.2020": 9}


def frame_of(y, u, v, *, space=2, reach=LIMITED, pixels="yuv420p"):
    """A frame of planes [H, W], [H/2, W/2], [H/2, W/2]."""
    frame = av.VideoFrame(y.shape[1], y.shape[0], pixels)
    for plane, values in zip(frame.planes, (y, u, v)):
        padded = np.zeros((values.shape[0], plane.line_size), np.uint8)
        padded[:, : values.shape[1]] = values
        plane.update(padded.tobytes())
    frame.colorspace, frame.color_range = space, reach
    return frame


@pytest.mark.slow
@pytest.mark.parametrize("reach", [LIMITED, FULL])
@pytest.mark.parametrize("space", SPACES)
def test_every_triple_is_swscales(space, reach):
    """Each of 64 pictures holds all pairs of U and V, each beside four values of Y."""
    u, v = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    wide_u, wide_v = (plane.repeat(2, 0).repeat(2, 1) for plane in (u, v))
    for first in range(0, 256, 4):
        y = np.tile(np.arange(first, first + 4, dtype=np.uint8).reshape(2, 2), (256, 256))
        frame = frame_of(y, u, v, space=SPACES[space], reach=reach)
        expected = frame.to_ndarray(format="rgb24")
        assert np.array_equal(to_rgb(y, wide_u, wide_v, SPACES[space], reach == FULL), expected)


@pytest.mark.parametrize("pixels", ["yuv420p", "yuvj420p"])
@pytest.mark.parametrize("width, height", [(2, 2), (202, 112), (853, 480), (854, 480), (1366, 768), (63, 4), (64, 50)])
def test_gathered_pixels_are_those_of_the_whole_picture(width, height, pixels):
    rng = np.random.default_rng(width)
    half = (height // 2, -(-width // 2))
    frame = frame_of(
        *(rng.integers(0, 256, shape, np.uint8) for shape in ((height, width), half, half)),
        space=1,
        reach=FULL if pixels == "yuvj420p" else LIMITED,
        pixels=pixels,
    )
    rows, columns = rng.integers(0, height, (9, 1)), rng.integers(0, width, (1, 7))
    assert can_gather(frame)
    whole = frame.to_ndarray(format="rgb24")
    for down, right in ((rows, columns), (columns % height, rows % width)):
        expected = whole[down, right]
        found = np.zeros_like(expected)
        gather(frame, down, right, found)
        assert np.array_equal(found, expected)


@pytest.mark.parametrize(
    "pixels, height",
    [("yuv420p", 49), ("yuv422p", 48), ("yuv444p", 48), ("yuv420p10le", 48), ("rgb24", 48), ("gray", 48), ("nv12", 48)],
)
def test_others_are_left_to_swscale(pixels, height):
    assert not can_gather(av.VideoFrame(64, height, pixels))


def test_interlaced_pictures_are_left_to_swscale(tmp_path):
    """Each of their fields has chroma of its own."""
    path = draw(
        tmp_path / "a.mp4",
        pictures=np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), np.uint8),
        options={"crf": "1", "flags": "+ildct+ilme"},
    )
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    assert len(frames) == 4 and not any(map(can_gather, frames))
    expected = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
    found, _ = decode(path, size=28, indices=range(4))
    assert np.array_equal(found, expected[:, nearest_indices(48, 28)[:, None], nearest_indices(64, 28)])


@pytest.mark.parametrize("space", [0, 3, 8, 10, 14])
def test_other_colour_spaces_are_left_to_swscale(space):
    frame = av.VideoFrame(64, 48, "yuv420p")
    frame.colorspace = space
    assert not can_gather(frame)
