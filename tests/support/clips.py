"""Clips drawn for tests: every frame shows its own number, so that a decoded frame says which one it is."""

import os
from fractions import Fraction

import numpy as np


def numbered(index, width=64, height=48):
    """[H, W, 3] grey picture: its upper half shows `index` as eight vertical bars, lowest bit at the left."""
    picture = np.full((height, width, 3), 128, np.uint8)
    for bit in range(8):
        picture[: height // 2, bit * width // 8 : (bit + 1) * width // 8] = 255 if index >> bit & 1 else 0
    return picture


def number(picture):
    """The index that a decoded `numbered` picture shows."""
    height, width = picture.shape[:2]
    bars = [picture[height // 4, (2 * bit + 1) * width // 16].mean() > 128 for bit in range(8)]
    return sum(int(bar) << bit for bit, bar in enumerate(bars))


def draw(
    path,
    frames=10,
    *,
    codec="libx264",
    size=(64, 48),
    options=None,
    times=None,
    turn=None,
    pictures=None,
    pixels="yuv420p",
):
    """Write a clip.

    Args:
        path: its ending chooses the container.
        frames: how many `numbered` frames.
        times: presentation time of each frame in 1/600 s; default: 25 frames per second from 0.
        turn: called with the stream before writing, to set its rotation.
        pictures: [H, W, 3] uint8 pictures to draw instead.
        options: of the codec.
    """
    import av

    policy, priority = os.sched_getscheduler(0), os.sched_getparam(0)
    pictures = [numbered(i, *size) for i in range(frames)] if pictures is None else pictures
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options or {})
        stream.width, stream.height, stream.pix_fmt = size[0], size[1], pixels
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 600)
        if turn:
            turn(stream)
        container.start_encoding()
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 600)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    # SVT-AV1 gives its caller, if that is root, the highest real-time priority: nothing else of the machine would run.
    os.sched_setscheduler(0, policy, priority)
    return path


def draw_many(folder, count):
    """Write `count` clips of 4 frames and more below a new folder, every second one in a folder of its own."""
    (folder / "sub").mkdir(parents=True)
    for number in range(count):
        draw(folder / ("sub" * (number % 2)) / f"{number}.mp4", 4 + number)


def endless(path):
    """Write a clip of a terabyte, all but its beginning a hole: looking for the next frame takes minutes."""
    draw(path.with_suffix(".mpg"), codec="mpeg2video").rename(path)
    os.truncate(path, 1 << 40)
    return path
