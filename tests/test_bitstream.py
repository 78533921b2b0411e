"""What a GPU's decoder is given of a video: decoded by FFmpeg here, packet by packet, it must be the very frames."""

import re
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import draw
from fastvid_kernels import frame_patchify, yuv_patchify

from fastvid.video.decode import DecodeError, decode
from fastvid.video.decode.bitstream import IN_DISPLAY_ORDER, Unsuited, read_bitstream
from fastvid.video.decode.worker import DecodeWorker

PATCHES = dict(size=56, patch=14, mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28), dtype=torch.float32)


def planes_of(stream):
    """{number: (Y, U, V)} of the frames that a bitstream's packets decode to, by FFmpeg, upright."""
    codec, found = av.CodecContext.create({"av1": "libdav1d"}.get(stream.codec, stream.codec), "r"), {}
    codec.thread_count, queue = 1, []  # a codec of one thread gives frames as early as it can

    def keep(frames):
        for frame in frames:
            number = queue.pop(0) if stream.codec in IN_DISPLAY_ORDER else frame.pts
            sizes = (frame.width, frame.height), *[(-(-frame.width // 2), -(-frame.height // 2))] * 2
            planes = (np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[:height, :width].copy()
                      for plane, (width, height) in zip(frame.planes, sizes))
            found[number] = tuple(upright(torch.from_numpy(plane), stream.turn) for plane in planes)

    for data, number in stream.packets():
        packet = av.Packet(bytes(data))
        packet.pts = packet.dts = number
        if number >= 0 or stream.codec != "vp8":
            queue.append(number)
        keep(codec.decode(packet))
    keep(codec.decode(None))
    return found


def upright(plane, turn):
    plane = plane.T if turn.transpose else plane
    return plane.flip([axis for axis, mirrored in enumerate((turn.mirror_rows, turn.mirror_columns)) if mirrored])


def assert_same_patches(path):
    """The patch rows of a bitstream's frames are those of the frames that PyAV decodes, to the bit."""
    stream = read_bitstream(path, num_frames=12)
    frames, info = decode(path, num_frames=12, size=PATCHES["size"])
    planes = planes_of(stream)
    ours = yuv_patchify([planes[number] for number in stream.wanted], [stream.factors] * len(stream.wanted), **PATCHES)
    assert torch.equal(ours, frame_patchify(torch.from_numpy(frames), **PATCHES))
    assert len(planes) == int((stream.numbers >= 0).sum()) + int((stream.numbers < 0).sum() > 0 and stream.codec != "vp8")
    assert (stream.info.codec, stream.info.width, stream.info.height, stream.info.frames, stream.info.rotation) == (
        info.codec, info.width, info.height, info.frames, info.rotation)
    return stream
