"""Frames through PyAV, FFmpeg's decoders on the CPU: what serves every file.

Frames are numbered in display order, as the decoder puts them out, so presentation times (variable rate, a start
other than zero) play no part in their choice. Nothing seeks: seeking is exact in no container that lies about its key
frames. Where the packets tell which of them the wanted frames need, the others are left out (`packets`); otherwise a
pass decodes every frame and converts the wanted ones. Which these are depends on the count, so the first pass believes
the container's index and is repeated if that was wrong.

The stream, colours and orientation are those of the reference's decoder (decord): the stream that FFmpeg thinks
best, swscale's default conversion to RGB, and the picture turned as its display matrix says.

A file that ends before its container says so, an interrupted copy or download, is refused: FFmpeg takes what is there
for the whole video, and the frames chosen from that would stand for another one. So is one whose frames decode with
errors, or of which some do not come: FFmpeg shows others in their place.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fastvid.files import StrPath
from fastvid.video.decode.container import (
    Orientation,
    complaints,
    log,
    open_again,
    open_video,
    orientation,
    refuse_cut,
)
from fastvid.video.decode.info import MAX_PIXELS, DecodeError, VideoInfo
from fastvid.video.decode.packets import scan
from fastvid.video.decode.planes import can_gather, gather
from fastvid.video.sampling import frame_indices, nearest_indices

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

_MARKS_RUN_AHEAD = 3  # packets between a mark of a lost one and the place that it was lost at


def decode(
    path: StrPath,
    *,
    num_frames: int = 100,
    indices: Iterable[int] | None = None,
    size: int | None = None,
    max_pixels: int = MAX_PIXELS,
    max_frames: int | None = None,
    max_seconds: float | None = None,
    threads: int = 0,
    allow_damaged: bool = False,
    into: np.ndarray | None = None,
) -> tuple[np.ndarray, VideoInfo]:
    """Decode the frames that stand for a video, or those asked for.

    Args:
        path: video file.
        num_frames: most frames to take, spread as `fastvid.video.sampling.frame_indices` says.
        indices: frame numbers to take instead, in any order, repeats allowed.
        size: resize every frame to size × size by nearest neighbour; None keeps the video's size.
        max_pixels: refuse larger pictures.
        max_frames, max_seconds: refuse videos that say they have more; None: no limit.
        threads: that decode; 0: as many as there are cores.
        allow_damaged: take frames that decode with errors, and put up with missing ones; `VideoInfo.damaged` counts.
        into: flat uint8 array, of at least as many values as the frames have, to put them into. It takes a `size`.

    Returns:
        frames [T, H, W, 3] uint8 RGB, upright, and the video's `VideoInfo`.

    Raises:
        DecodeError: the file does not exist, is damaged, cut short or not a video, or holds no frame; its picture is
            too large, changes size or is turned by an angle that is not a multiple of 90°; it has no frame of some
            number; or it is longer than a limit.
    """
    if max_seconds is not None and (lasts := duration(path)) > max_seconds:
        raise DecodeError(path, f"lasts {lasts:,.1f} s, over the limit of {max_seconds:,g} s")
    video = _Pass(path, size, max_pixels, threads, allow_damaged, into)
    packets = _packets(path)
    expected = packets.frames if packets is not None else _count_by_index(path)
    if max_frames is not None and expected > max_frames:
        raise DecodeError(path, f"has {expected:,} frames, over the limit of {max_frames:,}")
    if packets is not None:
        wanted = frame_indices(packets.frames, num_frames) if indices is None else list(indices)
        check_numbers(path, wanted, packets.frames)
        # The last frame is looked at as well: a file that was cut ends with a broken one.
        keep = packets.needed([*wanted, packets.frames - 1])
        if found := video.some(wanted, packets, keep):
            return found
    wanted = (frame_indices(expected, num_frames) if expected else []) if indices is None else list(indices)
    frames, info = video.whole(wanted)
    if indices is not None:
        check_numbers(path, wanted, info.frames)
    elif info.frames != expected:
        frames, info = video.whole(frame_indices(info.frames, num_frames))
    return frames, info


def duration(path: StrPath) -> float:
    """Seconds that a video lasts, as its container says; 0 if it does not.

    Raises:
        DecodeError: it cannot be opened.
    """
    import av

    with open_video(path) as (container, _, _):
        return (container.duration or 0) / av.time_base


def frame_times(path: StrPath, numbers: Sequence[int], info: VideoInfo) -> list[float]:
    """Seconds from a video's first frame to those numbered; by its average rate where the packets' times do not tell.

    Args:
        info: of the video.

    Raises:
        DecodeError: it cannot be opened.
    """
    with open_video(path) as (container, stream, _):
        unit = float(stream.time_base or 0)
        times = sorted(
            packet.pts
            for packet in container.demux(stream)
            if packet.size and packet.pts is not None and not packet.is_discard
        )
    if unit and len(times) == info.frames:
        return [(times[number] - times[0]) * unit for number in numbers]
    return [number / info.fps for number in numbers] if info.fps else []


def check_numbers(path: StrPath, wanted: Sequence[int], frames: int) -> None:
    """Raise DecodeError if a video of so many frames lacks one that is wanted."""
    if any(not 0 <= i < frames for i in wanted):
        raise DecodeError(path, f"holds {frames} frames; asked for {min(wanted)} … {max(wanted)}")


def _packets(path):
    """`packets.scan` of a video."""
    with open_video(path) as (container, stream, _):
        return scan(container, stream)


def _count_by_index(path):
    """Frames as the container's index says; packets counted where it says nothing. Fast, and wrong for some files."""
    with open_video(path) as (container, stream, _):
        if stream.frames:
            return max(stream.frames - sum(entry.is_discard for entry in stream.index_entries), 0)
        return sum(1 for packet in container.demux(stream) if packet.size and not packet.is_discard)


@dataclass(frozen=True)
class _Pass:
    """One opening of a video; arguments as `decode`'s."""

    path: StrPath
    size: int | None
    max_pixels: int
    threads: int = 0
    allow_damaged: bool = False
    into: np.ndarray | None = None

    def some(self, wanted, packets, keep):
        """(frames, VideoInfo) of the frames `wanted`, from the packets marked in `keep`; None if any fails to come.

        Threads take a share of the packets each, where decoding can begin at their first: that is faster than threads
        of one decoder, which wait for one another.
        """
        rows = _rows_by_frame(wanted)
        at = {time: rows.get(number) for number, time in enumerate(packets.frame_times.tolist())}
        threads = self.threads or len(os.sched_getaffinity(0))
        shares = packets.shares(keep, threads)
        held = _Held(len(wanted))
        each = [threads // len(shares) + (number < threads % len(shares)) for number in range(len(shares))]
        with log() as lines:
            with ThreadPoolExecutor(len(shares)) as pool:
                came = list(pool.map(lambda share, count: self._share(share, count, packets, at, held), shares, each))
            filled = [count for count in came if count is not None]
            if len(filled) < len(came) or sum(filled) != len(rows) or complaints(lines, *held.names):
                return None
        assert held.picture is not None
        return held.picture.frames, replace(held.picture.info, frames=packets.frames)

    def _share(self, keep, threads, packets, at, held):
        """Put the wanted frames of some packets into `held`; how many they were, or None if one fails to come."""
        import av

        expected, came, filled = int((keep & packets.shown).sum()), 0, 0
        with open_again(self.path) as (container, stream):
            refuse_cut(self.path, container, stream)
            sent = (
                packet for number, packet in enumerate(p for p in container.demux(stream) if p.size) if keep[number]
            )
            try:
                for frame in self._decoded(stream, sent, threads):
                    picture = held.of(frame, container, stream, self)
                    if frame.is_corrupt or frame.pts not in at or not picture.alike(frame):
                        return None
                    came += 1
                    if at[frame.pts]:
                        picture.take(frame, at[frame.pts])
                        filled += 1
            except av.InvalidDataError:  # every packet tells whether the video is damaged
                return None
        return filled if came == expected else None

    def whole(self, wanted):
        """(frames, VideoInfo) of those of the frames `wanted` that exist, from every packet."""
        rows, picture, total, corrupt, interlaced = _rows_by_frame(wanted), None, 0, 0, False
        with open_video(self.path) as (container, stream, complaints):
            refuse_cut(self.path, container, stream)
            sent = _Sent(container, stream)
            for frame in self._decoded(stream, sent, self.threads):
                picture = picture or _Picture.of(frame, container, stream, self, len(wanted))
                if total in rows:
                    picture.refuse_other_size(frame, total)
                    picture.take(frame, rows[total])
                total, corrupt = total + 1, corrupt + frame.is_corrupt
                interlaced |= frame.interlaced_frame
            sent.refuse_cut(self.path)
            said = complaints()
        if picture is None:
            raise DecodeError(self.path, "no frame decodes")
        # A packet of interlaced video may hold one field of a frame.
        missing = 0 if interlaced and total <= sent.shown <= 2 * total else abs(sent.shown - total)
        damaged = max(corrupt, missing, sent.corrupt, bool(said))
        if damaged and not self.allow_damaged:
            raise DecodeError(
                self.path,
                "is damaged: "
                + (
                    f"{corrupt} of {total} frames decode with errors"
                    if corrupt
                    else f"{sent.shown} packets decode to {total} frames"
                    if missing
                    else f"{sent.corrupt} of {sent.shown} packets are incomplete"
                    if sent.corrupt
                    else said[0]
                ),
            )
        return picture.frames, replace(picture.info, frames=total, damaged=damaged)

    def _decoded(self, stream, packets, threads):
        """Frames of some packets of a stream, in display order."""
        import av

        codec = stream.codec_context
        if codec.width * codec.height > self.max_pixels:
            raise DecodeError(
                self.path,
                f"its picture of {codec.width}×{codec.height} is over the limit of {self.max_pixels:,} pixels",
            )
        codec.thread_type, codec.thread_count = "AUTO", threads
        # Holds for pictures that grow within the stream, too.
        codec.options = {"max_pixels": str(self.max_pixels)}
        for packet in packets:
            try:
                yield from packet.decode()
            except av.InvalidDataError:
                if not self.allow_damaged:
                    raise
        yield from codec.decode(None)


class _Sent:
    """The packets of a stream that hold something, and what is known of them when all are read.

    Attributes:
        shown: packets that become frames.
        corrupt: packets of which a part is missing.
    """

    def __init__(self, container, stream):
        self.container, self.stream, self.shown, self.corrupt, self.cut = container, stream, 0, 0, False

    def __iter__(self):
        hidden_frames = self.stream.codec_context.codec.canonical_name == "vp8"
        recent, before = [], None  # marks since a moment ago
        for packet in self.container.demux(self.stream):
            if not packet.size:
                continue
            self.cut = packet.is_corrupt
            self.shown += not packet.is_discard and not (hidden_frames and not memoryview(packet)[0] & 0x10)
            recent = [*recent[-_MARKS_RUN_AHEAD:], packet.is_corrupt]
            if packet.dts is not None and before is not None and packet.dts < before:
                # Another recording begins. The counters that would tell lost packets have begun again as well.
                self.corrupt -= sum(recent)
            self.corrupt += packet.is_corrupt
            before = before if packet.dts is None else packet.dts
            yield packet

    def refuse_cut(self, path):
        if self.cut and self.container.format.name != "mpegts":  # there it need not be the end that is missing
            raise DecodeError(path, "is cut short: its last packet is incomplete")


def describe(container: InputContainer, stream: VideoStream, shape: tuple[int, int], turn: Orientation) -> VideoInfo:
    """What a video is, but for its frames, of a stored picture of (width, height) and how that is turned."""
    import av

    version = ".".join(map(str, av.library_versions["libavcodec"]))
    return VideoInfo(
        codec=stream.codec_context.codec.canonical_name,
        width=shape[turn.transpose],
        height=shape[not turn.transpose],
        frames=0,
        fps=float(stream.average_rate or 0),
        rotation=turn.angle,
        duration=(container.duration or 0) / av.time_base,
        decoder=f"pyav {av.__version__}, libavcodec {version}",
    )


class _Held:
    """The picture of a video whose shares are decoded side by side: the first frame to come decides what it is like.

    Attributes:
        picture: `_Picture`; names: of the container's format and of the codec.
    """

    def __init__(self, count):
        self.count, self.lock, self.picture, self.names = count, threading.Lock(), None, ("", "")

    def of(self, frame, container, stream, video):
        with self.lock:
            if self.picture is None:
                self.picture = _Picture.of(frame, container, stream, video, self.count)
                self.names = container.format.name, stream.codec_context.name
        return self.picture


@dataclass
class _Picture:
    """What the first frame of a stream decides, and the frames taken so far."""

    path: StrPath
    size: int | None
    shape: tuple[int, int]
    turn: Orientation
    info: VideoInfo
    frames: np.ndarray
    source: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, frame, container, stream, video, count):
        turn, stored = orientation(frame, video.path), (frame.width, frame.height)
        info = describe(container, stream, stored, turn)
        size = video.size
        shape = count, size or info.height, size or info.width, 3
        frames = np.empty(shape, np.uint8) if video.into is None else video.into[: math.prod(shape)].reshape(shape)
        source = _source(turn, info.height, info.width, size) if size else None
        return cls(video.path, size, stored, turn, info, frames, source)

    def alike(self, frame):
        return (frame.width, frame.height) == self.shape

    def refuse_other_size(self, frame, number):
        if not self.alike(frame):
            raise DecodeError(
                self.path,
                f"its picture changes from {self.shape[0]}×{self.shape[1]} to {frame.width}×"
                f"{frame.height} at frame {number}",
            )

    def take(self, frame, rows):
        """Put an upright RGB frame, resized by nearest neighbour if a size is asked for, into rows of the result."""
        if self.source and can_gather(frame):
            gather(frame, *self.source, self.frames[rows[0]])
            self.frames[rows[1:]] = self.frames[rows[0]]
            return
        pixels = frame.to_ndarray(format="rgb24")
        if self.source:
            self.frames[rows] = pixels[self.source]
            return
        if self.turn.transpose:
            pixels = pixels.transpose(1, 0, 2)
        step_down, step_right = (
            -1 if mirrored else 1 for mirrored in (self.turn.mirror_rows, self.turn.mirror_columns)
        )
        self.frames[rows] = pixels[::step_down, ::step_right]


def _source(turn, height, width, size):
    """(rows, columns) of the stored picture that a size × size upright one is taken from."""
    down, right = nearest_indices(height, size)[:, None], nearest_indices(width, size)[None, :]
    if turn.mirror_rows:
        down = height - 1 - down
    if turn.mirror_columns:
        right = width - 1 - right
    return (right, down) if turn.transpose else (down, right)


def _rows_by_frame(wanted):
    """{frame number: rows of the result that show it}."""
    rows = {}
    for row, index in enumerate(wanted):
        rows.setdefault(index, []).append(row)
    return rows
