"""Video files to frames: exact frame numbers, upright RGB, bounded memory.

Frames are numbered in display order, as the decoder puts them out, so presentation times (variable rate, a start
other than zero) play no part. Nothing seeks: seeking is exact in no container that lies about its key frames, and
decoding is needed anyway to know how many frames there are. A pass decodes every frame and converts the wanted ones;
which these are depends on the count, so the first pass believes the container's index and is repeated if it was wrong.

The stream, colours and orientation are those of the reference's decoder (decord): the stream that FFmpeg thinks
best, swscale's default conversion to RGB, and the picture turned as its display matrix says.

A file that ends before its container says so, an interrupted copy or download, is refused: FFmpeg takes what is there
for the whole video, and the frames chosen from that would stand for another one.
"""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from fastvid.video.sampling import frame_indices, nearest_indices

MAX_PIXELS = 8192 * 4320
# Containers of recorded video. Playlists (HLS, DASH, concat), which name other files and addresses, are not among them.
FORMATS = "mov,matroska,avi,mpegts,mpeg,flv,asf,ogg,gif,ivf,dv,mxf,nut,rm,wtv,yuv4mpegpipe,h264,hevc,m4v,mpegvideo"


class DecodeError(ValueError):
    """A video that cannot be decoded.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path, reason):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        codec: FFmpeg's name of the codec.
        width, height: pixels of the upright picture.
        frames: frames that decode; the container's own count may differ.
        fps: average frames per second as the container says; 0 if it does not.
        rotation: degrees counterclockwise by which the stored picture was turned to stand upright: 0, 90, 180, 270.
        duration: seconds as the container says; 0 if it does not.
        decoder: name and versions of what decoded it.
    """

    codec: str
    width: int
    height: int
    frames: int
    fps: float
    rotation: int
    duration: float
    decoder: str


def decode(path, *, num_frames=100, indices=None, size=None, decoder="auto", max_pixels=MAX_PIXELS):
    """Decode the frames that stand for a video, or those asked for.

    Args:
        path: video file.
        num_frames: most frames to take, spread as `fastvid.video.sampling.frame_indices` says.
        indices: frame numbers to take instead, in any order, repeats allowed.
        size: resize every frame to size × size by nearest neighbour; None keeps the video's size.
        decoder: "auto" or "pyav".
        max_pixels: refuse larger pictures.

    Returns:
        frames [T, H, W, 3] uint8 RGB, upright, and the video's `VideoInfo`.

    Raises:
        DecodeError: the file does not exist, is damaged, cut short or not a video, or holds no frame; its picture is
            too large, changes size or is turned by an angle that is not a multiple of 90°; or it has no frame of some
            number.
        ValueError: unknown `decoder`.
    """
    if decoder not in ("auto", "pyav"):
        raise ValueError(f"decoder must be 'auto' or 'pyav', found {decoder!r}")
    if indices is not None:
        frames, info = _decode_pass(path, list(indices), size, max_pixels)
        if any(not 0 <= i < info.frames for i in indices):
            raise DecodeError(path, f"holds {info.frames} frames; asked for {min(indices)} … {max(indices)}")
        return frames, info
    expected = _count_by_index(path)
    frames, info = _decode_pass(path, frame_indices(expected, num_frames) if expected else [], size, max_pixels)
    if info.frames != expected:
        frames, info = _decode_pass(path, frame_indices(info.frames, num_frames), size, max_pixels)
    return frames, info


def probe(path, *, max_pixels=MAX_PIXELS) -> VideoInfo:
    """What a video holds. Decodes it to the end, because only that tells how many frames it has.

    Raises:
        DecodeError: as `decode`.
    """
    return _decode_pass(path, [], None, max_pixels)[1]


@contextmanager
def _open(path):
    """The container and its best video stream; FFmpeg's errors become DecodeError."""
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(f"file:{path}", container_options=options)
    except av.FFmpegError as error:
        raise DecodeError(path, f"cannot be opened as a video ({error.strerror})") from error
    try:
        with container:
            stream = container.streams.best("video")
            if stream is None:
                raise DecodeError(path, "has no video stream")
            if stream.codec_context is None:
                raise DecodeError(path, "FFmpeg has no decoder for its codec")
            yield container, stream
    except av.FFmpegError as error:
        raise DecodeError(path, f"does not decode to its end ({error.strerror})") from error


def _count_by_index(path):
    """Frames as the container's index says; packets counted where it says nothing. Fast, and wrong for some files."""
    with _open(path) as (container, stream):
        if stream.frames:
            return max(stream.frames - sum(entry.is_discard for entry in stream.index_entries), 0)
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


def _refuse_cut(path, container, stream):
    """Raise DecodeError if the file is smaller than its container says."""
    there, least = os.path.getsize(path), 0
    if "mov" in container.format.name:
        least = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    elif "matroska" in container.format.name:
        with open(path, "rb") as file:
            least = _segment_end(file.read(4096).ljust(8192, b"\0"))
    if there < least:
        raise DecodeError(path, f"is cut short: {there:,} of at least {least:,} bytes are there")


def _segment_end(head):
    """Where a Matroska file's one segment ends (RFC 8794: four bytes of ID, then a size of variable length)."""
    def sized(at):
        length = 9 - (head[at] or 1).bit_length()
        size = int.from_bytes(head[at:at + length], "big") & (1 << 7 * length) - 1
        return at + length, size

    start, size = sized(4)
    if head[start + size:start + size + 4] != b"\x18\x53\x80\x67":
        return 0
    start, size = sized(start + size + 4)
    return 0 if (size + 1).bit_count() == 1 else start + size  # all ones: unknown, as in a live recording


def _frames(path, container, stream):
    """Every frame of the stream, in display order."""
    cut = False
    for packet in container.demux(stream):
        if packet.size:
            cut = packet.is_corrupt
        yield from packet.decode()
    if cut and container.format.name != "mpegts":  # there it also marks a lost packet, which is common in recordings
        raise DecodeError(path, "is cut short: its last packet is incomplete")


def _decode_pass(path, wanted, size, max_pixels):
    """Decode every frame, keep the wanted numbers that exist: ([len(wanted), H, W, 3] uint8, VideoInfo)."""
    import av

    rows = {}
    for row, index in enumerate(wanted):
        rows.setdefault(index, []).append(row)
    frames, info, total = None, None, 0
    with _open(path) as (container, stream):
        _refuse_cut(path, container, stream)
        codec = stream.codec_context
        if codec.width * codec.height > max_pixels:
            raise DecodeError(path, f"its picture of {codec.width}×{codec.height} is over the limit of {max_pixels:,} "
                              "pixels")
        codec.thread_type = "AUTO"
        codec.options = {"max_pixels": str(max_pixels)}  # holds for pictures that grow within the stream, too
        for frame in _frames(path, container, stream):
            if info is None:
                turn = _orientation(frame, path)
                shape = (frame.width, frame.height)
                version = ".".join(map(str, av.library_versions["libavcodec"]))
                info = VideoInfo(
                    codec=codec.codec.canonical_name, width=shape[turn.transpose], height=shape[not turn.transpose],
                    frames=0, fps=float(stream.average_rate or 0), rotation=turn.angle,
                    duration=(container.duration or 0) / av.time_base,
                    decoder=f"pyav {av.__version__}, libavcodec {version}")
                frames = np.empty((len(wanted), size or info.height, size or info.width, 3), np.uint8)
            if total in rows:
                if (frame.width, frame.height) != shape:
                    raise DecodeError(path, f"its picture changes from {shape[0]}×{shape[1]} to {frame.width}×"
                                      f"{frame.height} at frame {total}")
                frames[rows[total]] = _pixels(frame, turn, size)
            total += 1
    if info is None:
        raise DecodeError(path, "no frame decodes")
    return frames, replace(info, frames=total)


@dataclass(frozen=True)
class _Orientation:
    """How the stored picture becomes upright: transposed first, then mirrored; and the angle that amounts to."""

    angle: int
    transpose: bool
    mirror_rows: bool
    mirror_columns: bool


def _orientation(frame, path):
    """The display matrix of FFmpeg's ``libavutil/display.h``: x' = a·x + c·y, y' = b·x + d·y in 16.16 fixed point."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return _Orientation(0, False, False, False)
    (a, b), (c, d) = np.frombuffer(bytes(matrix), np.int32).reshape(3, 3)[:2, :2]
    angle = round(math.degrees(math.atan2(-b, a))) % 360
    if b == c == 0 and a and d:
        return _Orientation(angle, False, mirror_rows=bool(d < 0), mirror_columns=bool(a < 0))
    if a == d == 0 and b and c:
        return _Orientation(angle, True, mirror_rows=bool(b < 0), mirror_columns=bool(c < 0))
    raise DecodeError(path, f"its picture is turned by {angle}°, not by a multiple of 90°")


def _pixels(frame, turn, size):
    """[H, W, 3] upright RGB of one frame, resized by nearest neighbour if `size` is given."""
    pixels = frame.to_ndarray(format="rgb24")
    if turn.transpose:
        pixels = pixels.transpose(1, 0, 2)
    if turn.mirror_rows:
        pixels = pixels[::-1]
    if turn.mirror_columns:
        pixels = pixels[:, ::-1]
    if size:
        height, width = pixels.shape[:2]
        pixels = pixels[nearest_indices(height, size)[:, None], nearest_indices(width, size)]
    return pixels
