"""What a GPU's decoder is given of a video: the packets that its wanted frames need, and how to read the pictures.

The container is read on the CPU, in a process that may crash or hang. The GPU's decoder then gets packets of the one
stream, and the number of the frame that each becomes: no container's index, clock or edit list reaches it.

A GPU's decoder tells less of damage than FFmpeg, and its planes become the reference's bytes under conditions alone
(`planes.can_gather`). Whatever is in doubt is `Unsuited`: PyAV decodes that video, or refuses it.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np

from fastvid.files import StrPath
from fastvid.video.decode.container import Orientation, open_video, orientation, refuse_cut
from fastvid.video.decode.info import MAX_PIXELS, VideoInfo
from fastvid.video.decode.packets import scan
from fastvid.video.decode.planes import can_gather, factors
from fastvid.video.decode.pyav import check_numbers, describe
from fastvid.video.sampling import frame_indices

_ANNEX_B = {"h264": "h264_mp4toannexb", "hevc": "hevc_mp4toannexb"}
_MOST_BYTES = 2**30  # of the packets of one video


class Unsuited(Exception):
    """A video that is PyAV's, for the reason given. It may be a good one."""


@dataclass(frozen=True)
class Bitstream:
    """The packets of a video that its wanted frames need, in decoding order, P of them.

    H.264 and HEVC have start codes before their units (Annex B), and their parameter sets with them.

    Attributes:
        data: bytes of all packets, end to end.
        ends: [P] int64, where each ends.
        numbers: [P] int64, the frame that each becomes, in display order; −1: one that is not shown.
        wanted: numbers of the frames to take; repeats allowed.
        factors: six numbers of the conversion to RGB, as `planes.factors` gives them.
        turn: how the stored picture becomes upright.
        info: of the whole video; its decoder is not named yet.
        coded_size: width and height of the picture as it is coded, with what is cropped, as FFmpeg knows them.
    """

    data: bytes
    ends: np.ndarray
    numbers: np.ndarray
    wanted: list[int]
    factors: tuple[int, ...]
    turn: Orientation
    info: VideoInfo
    coded_size: tuple[int, int] | None = None

    @property
    def codec(self) -> str:
        return self.info.codec

    @property
    def stored_size(self) -> tuple[int, int]:
        """Width and height of the picture as it is stored."""
        width, height = self.info.width, self.info.height
        return (height, width) if self.turn.transpose else (width, height)

    def packets(self) -> Iterator[tuple[memoryview, int]]:
        """(bytes, frame number) of each packet."""
        view, start = memoryview(self.data), 0
        for end, number in zip(self.ends.tolist(), self.numbers.tolist()):
            yield view[start:end], number
            start = end

    def described(self) -> dict[str, Any]:
        """All but the arrays, as JSON can hold it."""
        return {
            "wanted": self.wanted,
            "factors": self.factors,
            "turn": asdict(self.turn),
            "info": asdict(self.info),
            "coded_size": self.coded_size,
        }

    @classmethod
    def of(cls, described: dict[str, Any], data: bytes, ends: np.ndarray, numbers: np.ndarray) -> Self:
        """The bitstream that `described` describes."""
        return cls(
            data,
            ends,
            numbers,
            described["wanted"],
            tuple(described["factors"]),
            Orientation(**described["turn"]),
            VideoInfo(**described["info"]),
            tuple(described["coded_size"]),
        )


def read_bitstream(
    path: StrPath, *, num_frames: int = 100, indices: Iterable[int] | None = None, max_pixels: int = MAX_PIXELS
) -> Bitstream:
    """The packets that the frames standing for a video need, or those that `indices` names.

    Args: as `fastvid.video.decode.decode` takes them.

    Raises:
        DecodeError: it cannot be opened, is cut short, or has no frame of some number.
        Unsuited: it is PyAV's.
    """
    with open_video(path) as (container, stream, _):
        packets = scan(container, stream)
    if packets is None:
        raise Unsuited("its packets do not tell which of them are needed")
    wanted = frame_indices(packets.frames, num_frames) if indices is None else list(indices)
    check_numbers(path, wanted, packets.frames)
    # The last frame is looked at as well: a file that was cut ends with a broken one.
    keep = packets.needed([*wanted, packets.frames - 1])
    numbers = np.full(len(keep), -1, np.int64)
    shown = np.flatnonzero(packets.shown)
    numbers[shown[np.argsort(packets.times[shown], kind="stable")]] = np.arange(packets.frames)
    with open_video(path) as (container, stream, complaints):
        refuse_cut(path, container, stream)
        sent = _kept(container, stream, keep)
        frame = _first_frame(stream, sent, max_pixels)
        if frame is None or complaints():
            raise Unsuited("it may be damaged")
        turn, shape = orientation(frame, path), (frame.width, frame.height)
        if not can_gather(frame) or (shape[0] % 2 and turn != Orientation()):
            raise Unsuited(
                f"its pictures are {frame.format.name} of {shape[0]}×{shape[1]}"
                + (", interlaced" if frame.interlaced_frame else "")
            )
        full_range = frame.format.name == "yuvj420p" or frame.color_range == 2
        coded_size = stream.codec_context.coded_width, stream.codec_context.coded_height
        info, parts = describe(container, stream, shape, turn), _annex_b(stream, sent)
        return Bitstream(
            b"".join(parts),
            np.cumsum([len(part) for part in parts], dtype=np.int64),
            numbers[keep],
            wanted,
            factors(int(frame.colorspace), full_range),
            turn,
            replace(info, frames=packets.frames, decoder=""),
            coded_size,
        )


def _kept(container, stream, keep):
    """The packets of a stream that are marked in `keep`."""
    kept, size = [], 0
    for number, packet in enumerate(packet for packet in container.demux(stream) if packet.size):
        if keep[number]:
            kept.append(packet)
            size += packet.size
            if size > _MOST_BYTES:
                raise Unsuited(f"the packets that are needed have more than {_MOST_BYTES:,} bytes")
    return kept


def _annex_b(stream, packets):
    """The bytes of each packet, with start codes where the codec has any. The packets are empty afterwards."""
    import av

    try:
        return _with_start_codes(stream, packets)
    except av.FFmpegError as error:
        raise Unsuited(f"its packets cannot be written with start codes ({error.strerror})") from error


def _with_start_codes(stream, packets):
    from av.bitstream import BitStreamFilterContext

    name = _ANNEX_B.get(stream.codec_context.codec.canonical_name)
    head = stream.codec_context.extradata
    if name is None or not head or head[0] != 1:  # of start codes already (ISO/IEC 14496-15 begins with version 1)
        return [bytes(packet) for packet in packets]
    converter = BitStreamFilterContext(name, stream)
    parts = []
    for packet in packets:
        made = converter.filter(packet)
        if len(made) != 1:
            raise Unsuited(f"{name} makes {len(made)} packets of one")
        parts.append(bytes(made[0]))
    return parts


def _first_frame(stream, packets, max_pixels):
    """The first frame that packets decode to, or None."""
    import av

    codec = stream.codec_context
    if codec.width * codec.height > max_pixels:
        raise Unsuited("its picture is too large")
    codec.thread_count = 1
    codec.options = {"max_pixels": str(max_pixels)}
    try:
        for packet in packets:
            for frame in packet.decode():
                return None if frame.is_corrupt else frame
        for frame in codec.decode(None):
            return None if frame.is_corrupt else frame
    except av.InvalidDataError:
        pass
    return None


__all__ = ["Bitstream", "Unsuited", "read_bitstream"]
