"""Frames through the GPU's decoder, over a stand-in for the driver's library that decodes on the host."""

import ctypes
import struct

import numpy as np
import pytest
import torch

from fastvid.video.decode import nvcuvid
from fastvid.video.decode.bitstream import Bitstream, Unsuited
from fastvid.video.decode.container import Orientation
from fastvid.video.decode.info import VideoInfo
from fastvid.video.decode.nvdec import NvDecoder

MAGIC = 0x56444D46


@pytest.fixture
def decoder(fake_nvcuvid):
    fake_nvcuvid.reset_counts()
    made = NvDecoder("cpu", fake_nvcuvid)
    yield made
    made.close()
    for name in ("mapped", "decoders", "parsers"):
        assert count(fake_nvcuvid, name) == 0, f"{name} are left"


def count(fake_nvcuvid, name):
    return ctypes.c_int.in_dll(fake_nvcuvid, name).value


def picture(rng, width, height):
    """Random planes (Y, U, V) of a picture."""
    return tuple(
        torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
        for size in ((height, width), (-(-height // 2), -(-width // 2)), (-(-height // 2), -(-width // 2)))
    )


def packet(planes, *, status=2, interlaced=0, field=0, shown=False):
    """The stand-in's packet of a picture; `shown` counts in VP8 alone."""
    height, width = planes[0].shape
    coded = -(-width // 16) * 16, -(-height // 16) * 16
    samples = np.full((coded[1] * 3 // 2, coded[0]), 0x55, np.uint8)
    samples[:height, :width] = planes[0]
    rows, columns = planes[1].shape
    for start, plane in enumerate(planes[1:]):
        samples[coded[1] : coded[1] + rows, start : 2 * columns : 2] = plane
    return struct.pack("8i", MAGIC | 0x10 * shown, width, height, *coded, status, interlaced, field) + samples.tobytes()


UPRIGHT = Orientation()


def stream_of(packets, numbers, wanted, *, size, codec="h264", turn=UPRIGHT, frames=None):
    width, height = size[::-1] if turn.transpose else size
    info = VideoInfo(codec, width, height, frames or max(numbers) + 1, 25.0, turn.angle, 0.0, "")
    return Bitstream(
        b"".join(packets),
        np.cumsum([len(p) for p in packets], dtype=np.int64),
        np.array(numbers, np.int64),
        wanted,
        (9539, 128, 13075, 16525, -3209, -6660),
        turn,
        info,
    )


def taken(decoder, stream):
    """{place: planes} that a decoder hands on, copied while they are there."""
    found = {}

    def take(pictures):
        for places, planes in pictures:
            for place in places:
                assert place not in found
                found[place] = tuple(plane.clone() for plane in planes)

    decoder.decode(stream, take)
    return found


def assert_same(found, expected):
    assert len(found) == len(expected)
    for place, planes in enumerate(expected):
        for ours, true in zip(found[place], planes, strict=True):
            assert torch.equal(ours, true), f"frame at place {place} differs"


DISPLAY_ORDERS = [[0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 2, 1, 4, 3, 6, 5, 8, 7, 9]]


@pytest.mark.slow
@pytest.mark.parametrize("order", DISPLAY_ORDERS)
@pytest.mark.parametrize("size", [(64, 48), (50, 34), (33, 22)])
@pytest.mark.parametrize("wanted", [[0, 3, 4, 9], [9], list(range(10)), [2, 2, 5, 2]])
def test_wanted_planes_are_handed_on(decoder, size, order, wanted):
    rng = np.random.default_rng(0)
    pictures = [picture(rng, *size) for _ in range(10)]
    stream = stream_of([packet(pictures[i]) for i in order], order, wanted, size=size)
    assert_same(taken(decoder, stream), [pictures[i] for i in wanted])


@pytest.mark.parametrize(
    "turn",
    [
        Orientation(90, True, True, False),
        Orientation(180, False, True, True),
        Orientation(270, True, False, True),
        Orientation(0, False, False, True),
    ],
)
def test_planes_are_upright(decoder, turn):
    rng, size = np.random.default_rng(1), (48, 32)
    stored = picture(rng, *size)
    stream = stream_of([packet(stored)], [0], [0], size=size, turn=turn)
    axes = [axis for axis, mirrored in enumerate((turn.mirror_rows, turn.mirror_columns)) if mirrored]
    upright = tuple((plane.T if turn.transpose else plane).flip(axes) for plane in stored)
    assert upright[0].shape == (stream.info.height, stream.info.width)
    assert_same(taken(decoder, stream), [upright])


def test_packets_that_are_not_shown(decoder):
    rng, size = np.random.default_rng(2), (32, 32)
    pictures = [picture(rng, *size) for _ in range(4)]
    stream = stream_of([packet(p) for p in pictures], [-1, 0, 1, 2], [0, 2], size=size)
    assert_same(taken(decoder, stream), [pictures[1], pictures[3]])


@pytest.mark.parametrize(
    "fault, told",
    [
        ({"status": 8}, "decodes with errors"),
        ({"status": 9}, "is concealed"),
        ({"status": 0}, "has no status"),
        ({"status": 110}, "has no status"),
        ({"interlaced": 2}, "interlaced"),
        ({"field": 1}, "interlaced"),
    ],
)
@pytest.mark.parametrize("at", [0, 3, 9])
@pytest.mark.parametrize("wanted", [[0], [0, 4, 8]])
def test_what_is_not_right_is_unsuited(decoder, fault, told, at, wanted):
    """Whether the picture is wanted or not: others may refer to it."""
    rng, size = np.random.default_rng(4), (32, 32)
    pictures = [picture(rng, *size) for _ in range(10)]
    packets = [packet(p, **(fault if i == at else {})) for i, p in enumerate(pictures)]
    with pytest.raises(Unsuited, match=told):
        taken(decoder, stream_of(packets, list(range(10)), wanted, size=size))
    good = stream_of([packet(p) for p in pictures], list(range(10)), wanted, size=size)
    assert_same(taken(decoder, good), [pictures[i] for i in wanted])


@pytest.mark.parametrize("wanted", [[9], [0, 4, 8]])
def test_the_status_of_a_picture_is_waited_for(decoder, wanted):
    rng, size = np.random.default_rng(9), (32, 32)
    pictures = [picture(rng, *size) for _ in range(10)]
    slow = [packet(p, status=105) for p in pictures]
    assert_same(taken(decoder, stream_of(slow, list(range(10)), wanted, size=size)), [pictures[i] for i in wanted])


def test_frames_that_do_not_come_are_noticed(decoder):
    rng, size = np.random.default_rng(5), (32, 32)
    packets = [packet(picture(rng, *size)) for _ in range(6)]
    packets[2] = b"\0" * len(packets[2])  # no picture
    with pytest.raises(Unsuited, match="5 of 6 frames came"):
        taken(decoder, stream_of(packets, list(range(6)), [0, 5], size=size))


def test_interlaced_sequences_and_other_sizes(decoder):
    rng, size = np.random.default_rng(6), (32, 32)
    with pytest.raises(Unsuited, match="interlaced"):
        taken(decoder, stream_of([packet(picture(rng, *size), interlaced=1)], [0], [0], size=size))
    with pytest.raises(Unsuited, match="32×32"):
        taken(decoder, stream_of([packet(picture(rng, *size))], [0], [0], size=(48, 32)))
    two = [packet(picture(rng, *size)), packet(picture(rng, 64, 64))]
    with pytest.raises(Unsuited, match="64×64"):
        taken(decoder, stream_of(two, [0, 1], [0], size=size))


@pytest.mark.parametrize(
    "codec, size", [("av1", (64, 64)), ("vp9", (64, 64)), ("h264", (8, 8)), ("h264", (5000, 64)), ("flv1", (64, 64))]
)
def test_what_the_hardware_does_not_take(decoder, codec, size):
    assert not decoder.takes(codec, *size)
    with pytest.raises(Unsuited, match=f"does not decode {codec}"):
        decoder.decode(stream_of([b"x"], [0], [0], size=size, codec=codec), None)


def test_a_decoder_serves_many_videos(decoder, fake_nvcuvid):
    """One of the same kind, or smaller, takes the hardware decoder that is there; a larger one makes another."""
    rng = np.random.default_rng(7)
    for size, created, reconfigured in (
        ((64, 48), 1, 0),
        ((64, 48), 1, 0),
        ((32, 32), 1, 1),
        ((64, 48), 1, 2),
        ((96, 32), 2, 2),
        ((64, 48), 2, 3),
        ((96, 48), 2, 4),
    ):
        pictures = [picture(rng, *size) for _ in range(5)]
        stream = stream_of(list(map(packet, pictures)), list(range(5)), [0, 1, 2, 3, 4], size=size)
        assert_same(taken(decoder, stream), pictures)
        assert (count(fake_nvcuvid, "created"), count(fake_nvcuvid, "reconfigured")) == (created, reconfigured)
    assert count(fake_nvcuvid, "most_mapped") <= 8


def test_what_take_raises_comes_through(decoder):
    rng, size = np.random.default_rng(8), (32, 32)
    stream = stream_of([packet(picture(rng, *size)) for _ in range(9)], list(range(9)), list(range(9)), size=size)

    def full(_):
        raise MemoryError("no room")

    with pytest.raises(MemoryError, match="no room"):
        decoder.decode(stream, full)


def test_a_video_that_is_cancelled_ends(decoder):
    rng, size = np.random.default_rng(10), (32, 32)
    stream = stream_of([packet(picture(rng, *size)) for _ in range(9)], list(range(9)), list(range(9)), size=size)
    handed = []

    def take(pictures):
        handed.append(len(pictures))
        decoder.cancelled = True

    with pytest.raises(Unsuited, match="cancelled"):
        decoder.decode(stream, take)
    assert len(handed) == 1


def test_a_missing_library_is_told():
    with pytest.raises(nvcuvid.NoDecoder, match="NVIDIA_DRIVER_CAPABILITIES"):
        nvcuvid.library("libnvcuvid-that-is-not-there.so.1")
