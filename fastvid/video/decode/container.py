"""Containers: which file is opened as a video, which of its streams counts, and whether all of it is there."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from fastvid.files import StrPath, wrong_content
from fastvid.video.decode.info import DecodeError

if TYPE_CHECKING:
    from av import VideoFrame, VideoStream
    from av.container import InputContainer
    from torch import Tensor

# Containers of recorded video. Playlists (HLS, DASH, concat), which name other files and addresses, are not among them.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,dv,mxf,nut,rm,wtv,yuv4mpegpipe,h264,hevc,m4v,mpegvideo"
# What FFmpeg says of damage in no other way. Containers also complain of what has nothing to do with pictures, and
# decoders of remarks beside them and of what encoders forgot.
_OF_CONTAINERS = ("invalid as first byte",)
_NOT_OF_PICTURES = ("SEI", "APP fields", "no frame!", "co located POCs", "mmco:")
_STRAIGHT = 5  # degrees off a right angle that players, too, round away: phones write such matrices


@contextmanager
def open_video(path: StrPath) -> Iterator[tuple[InputContainer, VideoStream, Callable[[], list[str]]]]:
    """The container, its best video stream, and what FFmpeg says of damage; its errors become DecodeError.

    FFmpeg shows something in place of what is missing, and marks not every such frame: the third value, called, gives
    the complaints so far. Its log is one for the whole process: two videos at a time are told of each other's damage.

    Covers of audio files are no video streams. Opens regular files only: a pipe would wait for ever.
    """
    with log() as lines, open_again(path) as (container, stream):
        yield container, stream, lambda: complaints(lines, container.format.name, stream.codec_context.name)


@contextmanager
def open_again(path: StrPath) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and stream of `open_video`, within a `log`: of one video, several at a time."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise DecodeError(path, wrong_content(path) or "is no regular file")
    except OSError as error:
        raise DecodeError(path, f"cannot be opened as a video ({error.strerror})") from error
    with _opened(path) as container:
        stream = _best(path, container)
        try:
            yield container, stream
        finally:
            # A decoder that is closed waits for its threads while it holds Python's lock, and one of them that has
            # something to log waits for that. This lets the lock go, and afterwards none of them has any work.
            stream.codec_context.flush_buffers()


@contextmanager
def _opened(path):
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(f"file:{path}", container_options=options)
    except av.FFmpegError as error:
        why = wrong_content(path)
        raise DecodeError(
            path, f"cannot be opened as a video ({error.strerror})" + (f": it {why}" if why else "")
        ) from error
    try:
        with container:
            yield container
    except av.FFmpegError as error:
        raise DecodeError(path, f"does not decode to its end ({error.strerror})") from error


def _best(path, container: InputContainer) -> VideoStream:
    """The stream that FFmpeg thinks best, of those that are videos."""
    stream = container.streams.best("video")
    if stream is not None and _is_cover(stream):
        stream = next((other for other in container.streams.video if not _is_cover(other)), None)
    if stream is None:
        raise DecodeError(path, "has no video stream")
    if stream.codec_context is None:
        raise DecodeError(path, "FFmpeg has no decoder for its codec")
    return cast("VideoStream", stream)


@contextmanager
def log() -> Iterator[list[tuple[int, str, str]]]:
    """FFmpeg's log lines of errors, (level, part, text), as they come, repeated ones too.

    To be left when every container opened within is closed, and their decoders' threads with them.
    """
    import av.logging

    level, skips = av.logging.get_level(), av.logging.get_skip_repeated()
    av.logging.set_level(av.logging.ERROR)
    av.logging.set_skip_repeated(False)
    try:
        with av.logging.Capture(local=False) as lines:
            yield lines
    finally:
        av.logging.set_skip_repeated(skips)
        av.logging.set_level(level)


def complaints(lines: Iterable[tuple[int, str, str]], container: str, codec: str) -> list[str]:
    """The texts among FFmpeg's log lines that speak of damage to a stream; the names are FFmpeg's."""
    found = []
    for _, part, text in lines:
        of_pictures = part == codec and not any(words in text for words in _NOT_OF_PICTURES)
        if of_pictures or (part == container and any(words in text for words in _OF_CONTAINERS)):
            found.append(" ".join(text.split()))
    return found


def _is_cover(stream):
    """Whether a stream is a still picture that belongs to the sound."""
    from av.stream import Disposition

    return bool(stream.disposition & Disposition.attached_pic)


def refuse_cut(path: StrPath, container: InputContainer, stream: VideoStream) -> None:
    """Raise DecodeError if the file is smaller than its container says, or lacks the container's end."""
    there, least = os.path.getsize(path), 0
    if "mov" in container.format.name:
        least = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    elif "matroska" in container.format.name:
        with open(path, "rb") as file:
            least = _segment_end(file.read(4096).ljust(8192, b"\0"))
    elif container.format.name == "gif":
        with open(path, "rb") as file:
            file.seek(max(0, there - 64))
            if not file.read().rstrip(b"\0").endswith(b"\x3b"):
                raise DecodeError(path, "is cut short: a GIF's last byte is missing")
    if there < least:
        raise DecodeError(path, f"is cut short: {there:,} of at least {least:,} bytes are there")


def _segment_end(head):
    """Where a Matroska file's one segment ends (RFC 8794: four bytes of ID, then a size of variable length)."""

    def sized(at):
        length = 9 - (head[at] or 1).bit_length()
        size = int.from_bytes(head[at : at + length], "big") & (1 << 7 * length) - 1
        return at + length, size

    start, size = sized(4)
    if head[start + size : start + size + 4] != b"\x18\x53\x80\x67":
        return 0
    start, size = sized(start + size + 4)
    return 0 if (size + 1).bit_count() == 1 else start + size  # all ones: unknown, as in a live recording


@dataclass(frozen=True)
class Orientation:
    """How the stored picture becomes upright: transposed first, then mirrored; and the angle that amounts to."""

    angle: int = 0
    transpose: bool = False
    mirror_rows: bool = False
    mirror_columns: bool = False

    def upright(self, picture: Tensor, axis: int = 0) -> Tensor:
        """A stored picture, a tensor whose rows are along `axis` and its columns along the next one, turned upright."""
        if self.transpose:
            picture = picture.transpose(axis, axis + 1)
        flipped = [axis + i for i, mirrored in enumerate((self.mirror_rows, self.mirror_columns)) if mirrored]
        return picture.flip(flipped) if flipped else picture


def orientation(frame: VideoFrame, path: StrPath) -> Orientation:
    """How a frame's picture becomes upright.

    The display matrix is that of FFmpeg's ``libavutil/display.h``: x' = a·x + c·y, y' = b·x + d·y in 16.16 fixed point.
    One of zeros says nothing; one a few degrees off a right angle means the right angle.

    Raises:
        DecodeError: it is turned by another angle.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return Orientation()
    (a, b), (c, d) = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2].tolist()
    if a == b == c == d == 0:
        return Orientation()
    turned, straight = math.degrees(math.atan2(-b, a)), math.tan(math.radians(_STRAIGHT))
    angle = round(turned / 90) * 90 % 360
    if a and d and max(abs(b), abs(c)) <= straight * min(abs(a), abs(d)):
        return Orientation(angle, False, mirror_rows=d < 0, mirror_columns=a < 0)
    if b and c and max(abs(a), abs(d)) <= straight * min(abs(b), abs(c)):
        return Orientation(angle, True, mirror_rows=b < 0, mirror_columns=c < 0)
    raise DecodeError(path, f"its picture is turned by {round(turned) % 360}°, not by a multiple of 90°")
