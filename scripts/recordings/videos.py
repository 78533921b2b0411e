"""Small clips of every kind that the recordings and tests need, drawn and encoded with PyAV.

Encoders differ between versions: the clips are part of the recordings, not drawn again by tests.
"""

import struct
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))
from clips import draw

B_FRAMES = {"bf": "3", "g": "12", "x264-params": "b-adapt=0"}
QUIET = {"x265-params": "log-level=none"}
# Those whose features are recorded: more frames than are taken, fewer, a turned picture.
WITH_FEATURES = ("b_frames.mp4", "non_zero_start.mp4", "turned.mp4")


def scene(index, width, height):
    """[H, W, 3] uint8: a disc that crosses a slope of colours."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([255 * x / width, 255 * y / height, 128 + 100 * np.sin(index / 9) + 0 * x], -1)
    middle = width * (0.5 + 0.4 * np.sin(index / 7))
    pixels[(x - middle) ** 2 + (y - height / 2) ** 2 < (height / 5) ** 2] = 240, 230, 40
    return pixels.clip(0, 255).astype(np.uint8)


def _full_range(stream):
    stream.codec_context.color_range, stream.codec_context.colorspace = 2, 1


def _turned(stream):
    stream.set_display_matrix((0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30))


def _begin_later(path, frames):
    """Have the container's edit list begin `frames` later: players discard the frames before."""
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 4
    version, entries, length, begin = struct.unpack(">IIIi", content[at : at + 16])
    scale = struct.unpack(">I", content[content.index(b"mdhd") + 16 :][:4])[0]
    assert (version, entries) == (0, 1)
    struct.pack_into(">IIIi", content, at, version, entries, length, begin + frames * scale // 25)
    path.write_bytes(content)


CLIPS = {  # name: frames, size, options of `draw`
    "av1.mkv": (30, (96, 64), {"codec": "libsvtav1", "options": {"preset": "10"}}),
    "b_frames.mp4": (130, (96, 64), {"options": B_FRAMES}),
    "discard_first.mp4": (25, (64, 64), {"options": {"bf": "0", "g": "12"}}),
    "full_range_709.mp4": (12, (128, 72), {"pixels": "yuvj420p", "turn": _full_range}),
    "h264_10_bits.mp4": (12, (80, 80), {"pixels": "yuv420p10le"}),
    "h265.mp4": (10, (128, 128), {"codec": "libx265", "options": QUIET}),
    "h265_10_bits.mp4": (12, (80, 80), {"codec": "libx265", "pixels": "yuv420p10le", "options": QUIET}),
    "mpeg4.avi": (30, (128, 72), {"codec": "mpeg4"}),
    "non_zero_start.mp4": (12, (100, 56), {"times": [9000 + 24 * i for i in range(12)]}),
    "odd_444.mp4": (25, (71, 49), {"pixels": "yuv444p"}),
    "turned.mp4": (17, (96, 54), {"turn": _turned}),
}
# decord has no AV1, reads 10 bits in its own way, and counts frames that players discard.
NOT_DECORDS = ("av1.mkv", "discard_first.mp4", "h264_10_bits.mp4", "h265_10_bits.mp4")


def draw_all(folder):
    folder.mkdir(parents=True, exist_ok=True)
    for name, (frames, size, options) in CLIPS.items():
        draw(folder / name, size=size, pictures=[scene(i, *size) for i in range(frames)], **options)
    _begin_later(folder / "discard_first.mp4", 3)


if __name__ == "__main__":
    draw_all(Path(sys.argv[1]))
