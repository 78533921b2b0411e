"""What a GPU's decoder is given of a video: decoded by FFmpeg here, packet by packet, it must be the very frames."""

from dataclasses import asdict

import av
import numpy as np
import pytest
import torch
from clips import draw
from fastvid_kernels import frame_patchify, yuv_patchify
from streams import STREAMS, draw_stream, moving_texture
from test_decode import CLIPS

from fastvid.video.decode import DecodeError, bitstream, decode
from fastvid.video.decode.bitstream import Bitstream, Unsuited, read_bitstream
from fastvid.video.decode.worker import DecodeWorker

# Clips that are PyAV's, and why.
UNSUITED = {
    "start codes.h264": "do not tell which of them are needed",
    "interlaced.mp4": "yuv420p of 128×96, interlaced",
    "h264_10_bits.mp4": "yuv420p10le of",
    "h265_10_bits.mp4": "yuv420p10le of",
    "mpeg4.avi": "do not tell which of them are needed",
    "odd_444.mp4": "yuv444p of 71×49",
}
IN_DISPLAY_ORDER = "vp8", "vp9", "av1"  # codecs whose packets come in the order in which their frames are shown
PATCHES = {"size": 56, "patch": 14, "mean": (0.48, 0.46, 0.41), "std": (0.27, 0.26, 0.28), "dtype": torch.float32}


def planes_of(stream):
    """{number: (Y, U, V)} of the frames that a bitstream's packets decode to, by FFmpeg, upright."""
    codec, found = av.CodecContext.create({"av1": "libdav1d"}.get(stream.codec, stream.codec), "r"), {}
    codec.thread_count, queue = 1, []  # a codec of one thread gives frames as early as it can

    def keep(frames):
        for frame in frames:
            number = queue.pop(0) if stream.codec in IN_DISPLAY_ORDER else frame.pts
            sizes = (frame.width, frame.height), *[(-(-frame.width // 2), -(-frame.height // 2))] * 2
            planes = (
                np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width].copy()
                for plane, (width, height) in zip(frame.planes, sizes)
            )
            found[number] = tuple(stream.turn.upright(torch.from_numpy(plane)) for plane in planes)

    for data, number in stream.packets():
        packet = av.Packet(bytes(data))
        packet.pts = packet.dts = number
        if number >= 0 or stream.codec != "vp8":
            queue.append(number)
        keep(codec.decode(packet))
    keep(codec.decode(None))
    return found


def assert_same_patches(path):
    """The patch rows of a bitstream's frames are those of the frames that PyAV decodes, to the bit."""
    stream = read_bitstream(path, num_frames=12)
    frames, info = decode(path, num_frames=12, size=PATCHES["size"])
    planes = planes_of(stream)
    ours = yuv_patchify([planes[number] for number in stream.wanted], [stream.factors] * len(stream.wanted), **PATCHES)
    assert torch.equal(ours, frame_patchify(torch.from_numpy(frames), **PATCHES))
    assert {*planes} - {-1} == {*stream.numbers.tolist()} - {-1}, "frames come that no packet stands for, or too few"
    told = {**asdict(stream.info), "decoder": info.decoder}
    assert told == asdict(info) and stream.info.decoder == ""
    return stream


@pytest.fixture(scope="module")
def pictures():
    return moving_texture(60)


@pytest.fixture
def clip(tmp_path, pictures):
    """Draws those pictures as one of STREAMS."""

    def made(name, **more):
        return draw_stream(tmp_path / name, pictures, **more)

    return made


@pytest.fixture(scope="module")
def worker():
    worker = DecodeWorker(60)
    yield worker
    worker.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", STREAMS)
def test_patches_of_all_codecs_are_pyavs(clip, name):
    path = clip(name)
    if name in UNSUITED:
        with pytest.raises(Unsuited, match=UNSUITED[name]):
            read_bitstream(path)
        return
    stream = assert_same_patches(path)
    assert len(stream.ends) < 60 or "refresh" in name, "packets that nobody needs are among them"
    if stream.codec in ("h264", "hevc"):
        assert all(bytes(data[:3]) in (b"\0\0\1", b"\0\0\0") for data, _ in stream.packets())


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_patches_of_the_recordings_clips_are_pyavs(golden, name):
    path = golden / "videos" / name
    if name in UNSUITED:
        with pytest.raises(Unsuited, match=UNSUITED[name]):
            read_bitstream(path)
        return
    stream = assert_same_patches(path)
    assert (stream.numbers < 0).any() == name.startswith("discard")


@pytest.mark.parametrize("matrix", [(0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (0, 1, 1, 0)])
def test_patches_of_turned_and_mirrored_clips_are_pyavs(clip, matrix):
    a, b, c, d = (value << 16 for value in matrix)
    stream = assert_same_patches(
        clip("pyramid.mp4", turn=lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30)))
    )
    assert stream.stored_size == (128, 96)
    assert (stream.info.width, stream.info.height) == ((96, 128) if b else (128, 96))


def hide(path, number):
    """Clear the bit of VP8's that says that a packet is shown (RFC 6386, 9.1)."""
    with av.open(str(path)) as container:
        packet = bytes([p for p in container.demux(video=0) if p.size][number])
    content = path.read_bytes()
    assert content.count(packet) == 1
    path.write_bytes(content.replace(packet, bytes([packet[0] & ~0x10]) + packet[1:]))
    return path


@pytest.mark.slow
def test_packets_that_are_not_shown(clip, pictures):
    times = [24 * i for i in range(59)]
    times.insert(21, 24 * 20 + 12)
    stream = assert_same_patches(hide(clip("vp8.webm", times=times), 21))
    assert stream.info.frames == 59
    assert stream.numbers[:24].tolist() == [*range(21), -1, 21, 22]


@pytest.mark.parametrize(
    "size, pixels, told",
    [((64, 50), "yuv422p", "yuv422p of 64×50"), ((64, 49), "yuv420p", "yuv420p of 64×49"), ((63, 48), "yuv420p", None)],
)
def test_pictures_of_other_kinds(tmp_path, size, pixels, told):
    path = draw(tmp_path / "a.mkv", size=size, pixels=pixels, codec="libvpx-vp9")
    if told is None:
        assert_same_patches(path)
        return
    with pytest.raises(Unsuited, match=told):
        read_bitstream(path)


def test_odd_widths_that_are_turned(tmp_path):
    """Mirrored, the chroma samples of other pairs of columns would be taken."""
    path = draw(
        tmp_path / "a.mp4", size=(63, 48), codec="libvpx-vp9", turn=lambda stream: stream.set_display_rotation(180)
    )
    with pytest.raises(Unsuited, match="yuv420p of 63×48"):
        read_bitstream(path)


def test_more_bytes_than_are_held(tmp_path, monkeypatch):
    path = draw(tmp_path / "a.mp4", 30)
    size = len(read_bitstream(path).data)
    monkeypatch.setattr(bitstream, "_MOST_BYTES", size // 2)
    with pytest.raises(Unsuited, match="the packets that are needed have more than [0-9,]+ bytes"):
        read_bitstream(path)


def test_pictures_over_the_limit(tmp_path):
    with pytest.raises(Unsuited, match="too large"):
        read_bitstream(draw(tmp_path / "a.mp4"), max_pixels=1000)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pyramid.mp4", "no pyramid.mkv", "hevc.mp4", "vp9.webm", "vp8.webm", "mjpeg.avi"])
@pytest.mark.parametrize("damage", ["cut", "flipped", "first frame"])
def test_damaged_files_are_not_passed_on_unseen(clip, name, damage):
    """What is passed on all the same is for the decoder to refuse: its packets are not those of the whole file."""
    path = clip(name)
    whole, content = read_bitstream(path), bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        packets = [p for p in container.demux(video=0) if p.size]
    if damage == "cut":
        content = content[: len(content) * 6 // 10]
    else:
        packet = packets[0 if damage == "first frame" else 30]
        for at in range(packet.pos + packet.size // 3, packet.pos + packet.size // 3 + 8):
            content[at] ^= 0xFF
    path.write_bytes(content)
    try:
        found = read_bitstream(path)
    except (Unsuited, DecodeError):
        return
    assert damage != "cut" or name == "mjpeg.avi"
    if damage == "flipped":
        assert found.numbers.tolist() == whole.numbers.tolist() and found.wanted == whole.wanted
        assert found.data != whole.data or len(packets) > len(whole.ends)


def test_a_hole_that_the_container_complains_of(tmp_path, pictures):
    """The frames before it decode without a fault, and follow each other at one interval."""
    path = draw(tmp_path / "a.mkv", pictures=pictures, size=(128, 96), options={"bf": "0", "threads": "1"})
    with av.open(str(path)) as container:
        at = [p for p in container.demux(video=0) if p.size][57].pos
    content = bytearray(path.read_bytes())
    content[at : at + 200] = bytes(200)
    path.write_bytes(content)
    with pytest.raises(Unsuited, match="it may be damaged"):
        read_bitstream(path, indices=[0])


def test_a_missing_frame_is_named(tmp_path):
    with pytest.raises(DecodeError, match="holds 10 frames; asked for 3 … 10"):
        read_bitstream(draw(tmp_path / "a.mp4"), indices=[3, 10])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hevc.mp4", "vp9.webm"])
def test_the_same_from_a_process_of_its_own(clip, worker, name):
    path = clip(name, turn=lambda stream: stream.set_display_rotation(90))
    expected = read_bitstream(path, num_frames=7)
    found, digest = worker.read_bitstream(path, num_frames=7)
    for field in Bitstream.__dataclass_fields__:
        assert np.array_equal(getattr(found, field), getattr(expected, field)), field
    assert (type(found.turn), type(found.info)) == (type(expected.turn), type(expected.info))
    assert len(digest) == 64 and worker.read_bitstream(path, digest=False)[1] is None


@pytest.mark.slow
def test_what_a_process_of_its_own_refuses(tmp_path, worker):
    with pytest.raises(Unsuited, match="yuv420p of 64×49"):
        worker.read_bitstream(draw(tmp_path / "a.mkv", size=(64, 49), codec="libvpx-vp9"))
    with pytest.raises(DecodeError, match="cannot be opened as a video"):
        worker.read_bitstream(__file__)
    with pytest.raises(DecodeError, match="nowhere.mp4: cannot be opened"):
        worker.read_bitstream(tmp_path / "nowhere.mp4")
    assert worker.read_bitstream(draw(tmp_path / "b.mp4"))[0].info.frames == 10
