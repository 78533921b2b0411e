"""Videos of all codecs that are decoded, as their encoders order and mark their packets."""

import numpy as np
from clips import draw

X264 = {"preset": "veryfast", "g": "40", "bf": "3"}
STREAMS = {
    "pyramid.mp4": ("libx264", {**X264, "x264-params": "b-pyramid=normal:b-adapt=0"}),
    "no pyramid.mkv": ("libx264", {**X264, "x264-params": "b-pyramid=none:b-adapt=0"}),
    "start codes.ts": ("libx264", X264),
    "start codes.h264": ("libx264", X264),
    "open groups.mp4": ("libx264", {**X264, "x264-params": "open-gop=1"}),
    "intra refresh.mp4": ("libx264", {**X264, "x264-params": "intra-refresh=1"}),
    "interlaced.mp4": ("libx264", {**X264, "flags": "+ildct+ilme"}),
    "every frame alone.mp4": ("libx264", {"g": "1"}),
    "hevc.mp4": ("libx265", {"preset": "ultrafast", "x265-params": "keyint=40:open-gop=0:bframes=3:log-level=none"}),
    "hevc open.mkv": (
        "libx265",
        {"preset": "ultrafast", "x265-params": "keyint=40:open-gop=1:bframes=3:log-level=none"},
    ),
    "hevc layers.mp4": (
        "libx265",
        {"preset": "ultrafast", "x265-params": "keyint=40:temporal-layers=2:bframes=3:log-level=none"},
    ),
    "vp9.webm": (
        "libvpx-vp9",
        {"g": "40", "cpu-used": "8", "deadline": "good", "auto-alt-ref": "1", "lag-in-frames": "16"},
    ),
    "vp8.webm": ("libvpx", {"g": "40", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1.mkv": ("libsvtav1", {"g": "40", "preset": "12"}),
    "mjpeg.avi": ("mjpeg", {}),
}


def moving_texture(count):
    """[96, 128, 3] uint8 pictures of a texture that moves, so that each differs and is predicted from others."""
    texture = np.random.default_rng(0).integers(0, 256, (24, 120, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return [texture[:96, 3 * i % 300 :][:, :128].copy() for i in range(count)]


def draw_stream(path, pictures, **more):
    """Write pictures of `moving_texture` as the one of `STREAMS` that the file's name says; `more` goes to `draw`."""
    codec, options = STREAMS[path.name]
    usual = {"codec": codec, "options": options, "pixels": "yuvj420p" if codec == "mjpeg" else "yuv420p"}
    return draw(path, size=(128, 96), pictures=pictures, **usual | more)
