"""The packets that wanted frames need, and the same pictures from them as from all."""

import os
from types import SimpleNamespace

import numpy as np
import pytest
from clips import draw
from streams import STREAMS, draw_stream, moving_texture

from fastvid.video.decode.container import open_video
from fastvid.video.decode.info import MAX_PIXELS
from fastvid.video.decode.packets import Packets, scan
from fastvid.video.decode.pyav import _Pass


def scanned(path):
    with open_video(path) as (container, stream, _):
        return scan(container, stream)


@pytest.fixture(scope="module")
def pictures():
    return moving_texture(120)


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_pictures_are_those_of_the_whole(tmp_path, pictures, name):
    path = draw_stream(tmp_path / name, pictures)
    packets = scanned(path)
    if packets is None:  # not every container tells times
        assert name.endswith(".h264")
        return
    assert packets.frames == 120
    video = _Pass(path, 28, MAX_PIXELS)
    for wanted in ([0], [119], [3], [57, 58], list(range(6, 120, 12))):
        keep = packets.needed(wanted)
        found = video.some(wanted, packets, keep)
        frames, info = video.whole(wanted)
        assert found is not None and np.array_equal(found[0], frames) and found[1] == info
        assert (
            keep.sum() < 120
            or (STREAMS[name][0] == "libx264" and "refresh" in name)
            or (wanted == [119] and "open" in name)
        )


def test_drawing_leaves_the_priority_alone(tmp_path):
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    codec, options = STREAMS["av1.mkv"]
    draw(tmp_path / "a.mkv", codec=codec, options=options)
    assert (os.sched_getscheduler(0), os.sched_getparam(0)) == before


def of(order, clean="", skippable="", shown=None):
    """Packets by the places of their frames, given in decoding order."""
    marks = ([at in where for at in range(len(order))] for where in ({*map(int, clean)}, {*map(int, skippable)}))
    times = np.array([int(digit) for digit in order])
    return Packets(times, *map(np.array, marks), np.array([shown is None or digit in shown for digit in order]))


@pytest.mark.parametrize(
    "wanted, places",
    [
        ([0], "0"),
        ([3], "01"),
        ([2], "012"),
        ([1], "0123"),
        ([4], "4"),
        ([6], "45"),
        ([5], "456"),
        ([0, 6], "045"),
        ([], ""),
    ],
)
def test_what_is_needed(wanted, places):
    """Frames are decoded in the order 0 3 2 1 | 4 6 5; no other refers to 5."""
    packets = of("0321465", clean="04", skippable="6")
    assert "".join(map(str, np.flatnonzero(packets.needed(wanted)))) == places


def test_hidden_packets_are_no_frames():
    packets = of("0123", clean="0", shown="023")
    assert packets.frames == 3 and packets.frame_times.tolist() == [0, 2, 3]
    assert packets.needed([1]).tolist() == [True, True, True, False]


def test_layers_above_refer_to_what_theirs_do_not(tmp_path, pictures):
    codec, options = STREAMS["hevc layers.mp4"]
    packets = scanned(draw(tmp_path / "a.mp4", codec=codec, options=options, size=(128, 96), pictures=pictures))
    assert 0 < packets.skippable.sum() < 120


class Packet(bytes):
    """What `scan` asks of a packet that holds these units."""

    is_corrupt = is_discard = is_keyframe = False
    size, pts = property(len), 0


def h264(*packets):
    """`scan` of packets of H.264 units, one frame after the other."""
    parts = [Packet(b"".join(b"\0\0\1" + unit for unit in units)) for units in packets]
    for pts, part in enumerate(parts):
        part.pts = pts
    codec = SimpleNamespace(codec=SimpleNamespace(canonical_name="h264"), extradata=None)
    return scan(SimpleNamespace(demux=lambda stream: parts), SimpleNamespace(codec_context=codec))


def test_parameter_sets_that_come_later_are_left_to_the_decoder():
    sequence, picture, other = b"\x67\x42\x00", b"\x68\xce\x01", b"\x68\xce\x02"
    first, next_, unreferred = b"\x65\x88", b"\x61\x88", b"\x01\x88"
    assert h264([sequence, picture, first], [next_], [sequence, picture, first]).frames == 3
    assert h264([sequence, picture, other, first], [next_], [other, first]).frames == 3
    assert h264([sequence, picture, first], [other, unreferred], [next_]) is None
    assert h264([first], [next_], [sequence, picture, first]) is None  # the container's own may be others


def test_units_that_do_not_fill_their_packet_are_left_to_the_decoder(tmp_path):
    path = draw(tmp_path / "a.mp4", 30, options={"x264-params": "keyint=10"})
    content = bytearray(path.read_bytes())
    with open_video(path) as (container, stream, _):
        packets = [p for p in container.demux(stream) if p.size]
    content[packets[20].pos : packets[20].pos + 4] = bytes(4)
    path.write_bytes(content)
    assert scanned(path) is None
