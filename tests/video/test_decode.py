"""Decoding of drawn clips, whose frames show their numbers, and of those of the recordings."""

import hashlib
import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from clips import draw, number, numbered
from conftest import GOLDEN

from fastvid.video.decode import DecodeError, decode
from fastvid.video.decode import pyav as module
from fastvid.video.sampling import frame_indices, nearest_indices

CLIPS = sorted(path.name for path in (GOLDEN / "videos").glob("*"))
DECORDS = json.loads((GOLDEN / "clips.json").read_text())["clips"]
B_FRAMES = {"bf": "3", "g": "12", "x264-params": "b-adapt=0"}


def _numbers(frames):
    return [number(picture) for picture in frames]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp4", {}),
        ("b_frames.mp4", {"options": B_FRAMES}),
        ("b_frames.mkv", {"options": B_FRAMES}),
        ("b_frames.ts", {"options": B_FRAMES}),
        ("variable_rate.mp4", {"times": [7 * i * i for i in range(60)], "options": B_FRAMES}),
        ("non_zero_start.mp4", {"times": [9000 + 24 * i for i in range(60)]}),
        ("mpeg4_b_frames.mp4", {"codec": "mpeg4", "options": {"bf": "2"}}),
        ("mpeg4.avi", {"codec": "mpeg4"}),
        ("vp9.webm", {"codec": "libvpx-vp9", "options": {"cpu-used": "8", "deadline": "realtime"}}),
        ("odd_444.mp4", {"size": (71, 49), "pixels": "yuv444p"}),
        ("10_bit.mp4", {"pixels": "yuv420p10le"}),
    ],
)
def test_frames_by_number_in_display_order(tmp_path, name, options):
    path = draw(tmp_path / name, 60, **options)
    frames, info = decode(path, num_frames=100)
    assert info.frames == 60 and len(frames) == 60
    assert _numbers(frames) == frame_indices(60)
    assert _numbers(decode(path, num_frames=7)[0]) == frame_indices(60, 7)
    assert _numbers(decode(path, indices=[59, 0, 31, 31])[0]) == [59, 0, 31, 31]
    assert frames.shape[1:] == (info.height, info.width, 3) and frames.dtype == np.uint8
    assert (info.width, info.height) == options.get("size", (64, 48))


@pytest.mark.parametrize("believed", [0, 1, 9, 200])
def test_a_count_that_lies_changes_nothing(tmp_path, monkeypatch, believed):
    path = draw(tmp_path / "a.mp4", 40, codec="mpeg4")
    expected, info = decode(path, num_frames=16)
    monkeypatch.setattr(module, "_count_by_index", lambda path: believed)
    frames, again = decode(path, num_frames=16)
    assert (frames == expected).all() and again == info and info.frames == 40


@pytest.fixture
def passes(monkeypatch):
    """Names of the passes over a video."""
    done = []
    for name in ("some", "whole"):
        function = getattr(module._Pass, name)

        def counted(*a, _name=name, _function=function):
            done.append(_name)
            return _function(*a)

        monkeypatch.setattr(module._Pass, name, counted)
    return done


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, options",
    [
        ("a.mp4", {}),
        ("a.mkv", {}),
        ("a.ts", {}),
        ("a.mp4", {"codec": "libx265"}),
        ("a.webm", {"codec": "libvpx-vp9"}),
        ("a.webm", {"codec": "libvpx"}),
        ("a.avi", {"codec": "mjpeg", "pixels": "yuvj420p"}),
    ],
)
def test_needed_packets_are_enough(tmp_path, passes, name, options):
    decode(draw(tmp_path / name, 60, options=B_FRAMES if "codec" not in options else {}, **options))
    assert passes == ["some"]


def test_needed_packets_are_enough_for_discarded_frames(golden, passes):
    decode(golden / "videos" / "discard_first.mp4")
    assert passes == ["some"]


@pytest.mark.parametrize(
    "options",
    [
        {"codec": "mpeg4"},
        {"times": [0, *range(48, 24 * 59 + 48, 24)]},  # a picture is missing, or was late
    ],
)
def test_every_packet_is_decoded_where_the_needed_ones_are_not_certain(tmp_path, passes, options):
    frames, _info = decode(draw(tmp_path / "a.mp4", 60, **options))
    assert passes == ["whole"] and _numbers(frames) == frame_indices(60)


def test_one_pass_is_enough_for_the_whole(tmp_path, passes):
    decode(draw(tmp_path / "a.mkv", 60, codec="mpeg4"))
    assert passes == ["whole"]


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_wanted_frames_alone_are_converted(tmp_path, monkeypatch, codec):
    converted, take = [], module._Picture.take
    monkeypatch.setattr(module._Picture, "take", lambda *a: converted.append(1) or take(*a))
    frames, _ = decode(draw(tmp_path / "a.mkv", 60, codec=codec), num_frames=5)
    assert len(converted) == len(frames) == 5


def test_size_is_a_nearest_resize(tmp_path):
    path = draw(tmp_path / "a.mp4", 4, size=(70, 46))
    full, info = decode(path)
    small, same = decode(path, size=28)
    assert (small == full[:, nearest_indices(46, 28)[:, None], nearest_indices(70, 28)]).all()
    assert info == same


def test_what_it_holds(tmp_path):
    info = decode(draw(tmp_path / "a.mp4", 50))[1]
    assert (info.codec, info.width, info.height, info.frames, info.rotation) == ("h264", 64, 48, 50, 0)
    assert info.fps == 25 and info.duration == pytest.approx(2, abs=0.01)
    assert av.__version__ in info.decoder


@pytest.mark.parametrize("angle", [0, 90, 180, 270])
def test_rotated_videos_stand_upright(tmp_path, angle):
    stored = [np.ascontiguousarray(np.rot90(numbered(i), -angle // 90)) for i in range(5)]
    height, width = stored[0].shape[:2]
    path = draw(
        tmp_path / "a.mp4",
        pictures=stored,
        size=(width, height),
        turn=lambda stream: stream.set_display_rotation(angle),
    )
    frames, info = decode(path)
    assert frames.shape[1:] == (48, 64, 3) and (info.width, info.height) == (64, 48)
    assert info.rotation == angle
    assert _numbers(frames) == frame_indices(5)


@pytest.mark.parametrize(
    "matrix, undo",
    [
        ((-1, 0, 0, 1), lambda p: p[:, ::-1]),
        ((1, 0, 0, -1), lambda p: p[::-1]),
        ((0, 1, 1, 0), lambda p: p.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda p: p[::-1, ::-1].transpose(1, 0, 2)),
    ],
)
def test_mirrored_videos_stand_upright(tmp_path, matrix, undo):
    a, b, c, d = (65536 * v for v in matrix)
    pictures = [np.ascontiguousarray(undo(numbered(i))) for i in range(5)]
    height, width = pictures[0].shape[:2]
    path = draw(
        tmp_path / "a.mp4",
        pictures=pictures,
        size=(width, height),
        turn=lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30)),
    )
    assert _numbers(decode(path)[0]) == frame_indices(5)


def test_odd_angles_are_refused(tmp_path):
    path = draw(tmp_path / "a.mp4", turn=lambda stream: stream.set_display_rotation(30))
    with pytest.raises(DecodeError, match="turned by 30°"):
        decode(path)


def test_large_pictures_are_refused(tmp_path):
    path = draw(tmp_path / "a.mp4")
    assert len(decode(path, max_pixels=64 * 48)[0])
    with pytest.raises(DecodeError, match="64×48 is over the limit"):
        decode(path, max_pixels=64 * 48 - 1)


def test_pictures_that_grow_are_refused(tmp_path):
    path = tmp_path / "a.h264"
    small, large = draw(tmp_path / "s.h264"), draw(tmp_path / "l.h264", size=(128, 96))
    path.write_bytes(small.read_bytes() + large.read_bytes())
    with pytest.raises(DecodeError, match="changes from 64×48 to 128×96 at frame 10"):
        decode(path)
    with pytest.raises(DecodeError, match="does not decode to its end"):
        decode(path, max_pixels=64 * 48)


def test_the_best_of_several_streams(tmp_path):
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        streams = []
        for size in ((32, 24), (64, 48)):
            stream = container.add_stream("libx264", rate=25)
            stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
            streams.append((stream, size))
        for stream, size in streams:
            for i in range(10):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(i, *size), format="rgb24")))
            container.mux(stream.encode(None))
    with av.open(str(path)) as container:
        best = container.streams.best("video").index
    info = decode(path)[1]
    assert (info.width, info.height) == streams[best][1]


@pytest.mark.parametrize("share", [0.55, 0.75])
@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".mkv", None),
        (".avi", None),
        (".mp4", {"movflags": "faststart"}),
        (".mp4", {"movflags": "frag_keyframe+empty_moov"}),
    ],
)
def test_a_cut_file_is_refused(tmp_path, ending, options, share):
    noise = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    whole = draw(tmp_path / f"a{ending}", codec="mpeg4", pictures=noise, options={"g": "10"})
    if options:
        drawn, whole = whole, tmp_path / "whole.mp4"
        with av.open(str(drawn)) as source, av.open(str(whole), "w", options=options) as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(source.streams.video[0]):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    assert decode(whole)[1].frames == 60
    content, cut = whole.read_bytes(), tmp_path / f"cut{ending}"
    cut.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DecodeError, match="cut short"):
        decode(cut)


def test_a_recording_of_unknown_length_is_whole(tmp_path):
    path = draw(tmp_path / "a.mkv", 20)
    content = path.read_bytes()
    at = content.index(b"\x18\x53\x80\x67") + 4
    path.write_bytes(content[:at] + b"\x01" + b"\xff" * 7 + content[at + 8 :])
    assert decode(path)[1].frames == 20


@pytest.mark.parametrize("count", [0, 7, 90])
def test_a_wrong_count_is_corrected(tmp_path, monkeypatch, count):
    monkeypatch.setattr(module, "_count_by_index", lambda path: count)
    frames, info = decode(draw(tmp_path / "a.mp4", 60), num_frames=10)
    assert info.frames == 60 and _numbers(frames) == frame_indices(60, 10)


def _sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _text(content):
    return lambda path: path.write_bytes(content)


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "is a folder"),
        (_text(b""), "it is empty"),
        (_text(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"), "git-lfs pointer"),
        (lambda path: os.mkfifo(path), "no regular file"),
        (_text(b"no video at all\n" * 99), "cannot be opened as a video"),
        (_sound, "no video stream"),
        (
            lambda path: path.write_bytes(draw(path.with_suffix(".mov")).read_bytes()[:800]),
            "cannot be opened as a video",
        ),
    ],
)
def test_refusals(tmp_path, make, reason):
    path = tmp_path / "a.mp4"
    make(path)
    with pytest.raises(DecodeError, match=reason) as error:
        decode(path)
    assert error.value.path == str(path) and str(path) in str(error.value) and reason in error.value.reason


@pytest.mark.parametrize(
    "playlist",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {clip}\n",
    ],
)
def test_playlists_open_no_other_file(tmp_path, playlist):
    draw(tmp_path / "clip.ts")
    path = tmp_path / "a.mp4"
    path.write_text(playlist.format(clip="clip.ts"))
    with pytest.raises(DecodeError, match="cannot be opened"):
        decode(path)


def test_addresses_are_file_names():
    with pytest.raises(DecodeError, match="No such file"):
        decode("concat:a.ts|b.ts")


def test_a_frame_beyond_the_end(tmp_path):
    path = draw(tmp_path / "a.mp4", 10)
    for indices in ([3, 10], [-1]):
        with pytest.raises(DecodeError, match="holds 10 frames"):
            decode(path, indices=indices)


@pytest.mark.slow
def test_importing_it_needs_no_decoder():
    code = "import sys, fastvid.video.decode; sys.exit('av' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", CLIPS)
def test_clips_of_the_recordings(golden, name):
    path = golden / "videos" / name
    frames, info = decode(path, num_frames=8)
    with av.open(str(path)) as container:  # all frames at once, converted by PyAV itself, turned by hand
        stored = [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.best("video"))]
    assert len(stored) == info.frames and frames.shape == (8, info.height, info.width, 3)
    assert (frames == np.stack([np.rot90(stored[i], info.rotation // 90) for i in frame_indices(len(stored), 8)])).all()


@pytest.mark.parametrize("name", DECORDS)
def test_pictures_are_those_of_the_reference(golden, name):
    """Decoded, chosen and resized by the reference and decord."""
    path, recorded = golden / "videos" / name, DECORDS[name]
    frames, info = decode(path, num_frames=100)
    assert info.frames == recorded["frames"] and list(frames.shape[1:]) == recorded["shape"]
    assert frame_indices(info.frames, 100) == recorded["indices"]
    assert hashlib.sha256(frames).hexdigest() == recorded["sha256"]
    for size, expected in recorded["resized_sha256"].items():
        assert hashlib.sha256(decode(path, num_frames=100, size=int(size))[0]).hexdigest() == expected
