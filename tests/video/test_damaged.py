"""Videos of which a part is missing or wrong: refused, or counted by who takes them as they are."""

import os
import subprocess
import sys

import av
import numpy as np
import pytest
from clips import draw, number

from fastvid.video.decode import DecodeError, decode
from fastvid.video.sampling import frame_indices


def without(source, target, *left_out):
    """Copy a video, but for packets of these numbers."""
    with av.open(str(source)) as one, av.open(str(target), "w") as other:
        stream = other.add_stream_from_template(one.streams.video[0])
        for count, packet in enumerate(one.demux(one.streams.video[0])):
            if packet.size and count not in left_out:
                packet.stream = stream
                other.mux(packet)
    return target


def positions(path):
    """(place in the file, bytes) of a video's packets."""
    with av.open(str(path)) as container:
        return [(packet.pos, packet.size) for packet in container.demux(container.streams.video[0]) if packet.size]


@pytest.fixture
def moving(tmp_path):
    """Draws 60 pictures that are predicted from one another."""
    texture = np.random.default_rng(0).integers(0, 256, (24, 80, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return lambda name, **options: draw(
        tmp_path / name, size=(128, 96), **options, pictures=[texture[:, 3 * i : 3 * i + 128].copy() for i in range(60)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, left_out",
    [
        ("a.mp4", [0]),
        ("a.mkv", [0]),
        ("a.mp4", range(27, 33)),
        ("a.mkv", range(27, 33)),
    ],
)
def test_missing_packets(tmp_path, moving, name, left_out):
    path = without(moving("whole.mp4", options={"g": "20"}), tmp_path / name, *left_out)
    with pytest.raises(DecodeError, match="is damaged"):
        decode(path)
    frames, info = decode(path, allow_damaged=True)
    assert info.damaged > 0 and len(frames) == info.frames


@pytest.mark.slow
@pytest.mark.parametrize("ending, codec", [(".mp4", "libx264"), (".avi", "mpeg4"), (".mpg", "mpeg2video")])
def test_wrong_bytes(moving, ending, codec):
    path = moving(f"a{ending}", codec=codec)
    content = bytearray(path.read_bytes())
    place, size = positions(path)[0]
    for at in range(place + size // 2, place + size // 2 + 40):
        content[at] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(DecodeError, match="is damaged"):
        decode(path)
    assert decode(path, allow_damaged=True)[1].damaged > 0


@pytest.mark.slow
@pytest.mark.parametrize("codec", ["libx264", "mpeg4", "libvpx-vp9"])
def test_a_tail_of_zeros(moving, codec):
    path = moving("a.mkv", codec=codec)
    content = bytearray(path.read_bytes())
    content[len(content) * 2 // 3 :] = bytes(len(content) - len(content) * 2 // 3)
    path.write_bytes(content)
    with pytest.raises(DecodeError):
        decode(path)


@pytest.mark.slow
def test_zeros_between_packets(moving):
    """The container's reader goes on where it finds a packet again."""
    path = moving("a.mkv", options={"bf": "0", "g": "5"})
    content, places = bytearray(path.read_bytes()), positions(path)
    (start, _), (end, size) = places[20], places[23]
    content[start : end + size] = bytes(end + size - start)
    path.write_bytes(content)
    with pytest.raises(DecodeError, match="is damaged"):
        decode(path)


def test_a_gif_without_its_end(tmp_path):
    path = draw(tmp_path / "a.gif", 20, codec="gif", pixels="rgb8")
    assert decode(path)[1].frames == 20
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DecodeError, match="cut short"):
        decode(path)


def test_a_whole_video_has_nothing_damaged(moving):
    assert decode(moving("a.mp4"))[1].damaged == 0


def test_another_recording_after_the_first(tmp_path):
    """Times and counters begin again, which loses nothing."""
    one, two = (draw(tmp_path / name, 30, options={"bf": "0"}).read_bytes() for name in ("1.ts", "2.ts"))
    (tmp_path / "a.ts").write_bytes(one + two)
    frames, info = decode(tmp_path / "a.ts")
    assert info.frames == 60 and info.damaged == 0
    assert [number(picture) for picture in frames] == [i % 30 for i in frame_indices(60)]


def test_the_cover_of_a_piece_of_music_is_no_video(tmp_path):
    path = tmp_path / "a.m4a.mp4"
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=8000)
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.rate = 8000
        picture = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")
        for stream, frame in ((cover, picture), (sound, silence)):
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    with pytest.raises(DecodeError, match="has no video stream"):
        decode(path)


@pytest.mark.parametrize(
    "matrix, rotation",
    [
        ((0, 0, 0, 0), 0),
        ((65526, 1144, -1144, 65526), 0),
        ((1144, 65526, -65526, 1144), 270),
    ],
)
def test_matrices_as_players_read_them(tmp_path, matrix, rotation):
    a, b, c, d = matrix
    path = draw(tmp_path / "a.mp4", turn=lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1 << 30)))
    assert decode(path)[1].rotation == rotation


REFUSED = """
import sys
from fastvid.video.decode import DecodeError, decode
for _ in range(300):
    try:
        decode(sys.argv[1], threads=8)
    except DecodeError as error:
        assert "turned by 30" in str(error)
"""


@pytest.mark.slow
def test_a_video_that_is_left_while_threads_decode_it_waits_for_nothing(tmp_path):
    """Threads that have something to log want Python's lock, which closing their decoder must not hold."""
    path = draw(tmp_path / "a.mp4", 60, size=(320, 240), turn=lambda stream: stream.set_display_rotation(30))
    subprocess.run(
        [sys.executable, "-c", REFUSED, str(path)],
        check=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
