"""Which packets of a stream have to be decoded for the frames that are wanted.

A coded picture needs those that it was predicted from, and no others: nothing before the last point at which decoding
can begin, nothing after itself in decoding order, and no picture that no other refers to. Which these are stands in
the headers of the packets, so that a pass over the container, without decoding, is enough.

Left alone are streams of which that is not certain (`scan` then gives None, and every packet is decoded): other codecs
than those named here; pictures without times of their own, or unevenly spaced ones, among which one may be missing;
units that do not fill their packet; parameter sets beyond those of the first packet, which one that is left out may
have brought.

H.264: ITU-T H.264, 7.3.1 (unit headers) and 7.4.1; HEVC: ITU-T H.265, 7.3.1.2; VP8: RFC 6386, 9.1.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from av import VideoStream
    from av.container import InputContainer

# Every packet's key mark is to be believed. H.264 and HEVC also mark points from which pictures become right by and by.
_KEYS_ARE_CLEAN = {"vp8", "vp9", "av1", "mjpeg", "ffv1"}
_UNEVEN = 1.5  # times the middle interval between pictures, from which on one may be missing


@dataclass(frozen=True)
class Packets:
    """The packets of a stream that hold something, in decoding order.

    Attributes:
        times: [P] int64 presentation times.
        clean: [P] bool, whether decoding can begin here.
        skippable: [P] bool, whether no other picture refers to it.
        shown: [P] bool, whether it becomes a frame.
    """

    times: np.ndarray
    clean: np.ndarray
    skippable: np.ndarray
    shown: np.ndarray

    @property
    def frames(self) -> int:
        return int(self.shown.sum())

    @property
    def frame_times(self) -> np.ndarray:
        """[frames] presentation times of the frames, in display order."""
        return np.sort(self.times[self.shown])

    def needed(self, wanted: Sequence[int]) -> np.ndarray:
        """[P] bool, the packets to decode for frames `wanted` (numbers in display order)."""
        shown = np.flatnonzero(self.shown)
        in_order = shown[np.argsort(self.times[shown], kind="stable")]
        is_wanted = np.zeros(len(self.times), bool)
        is_wanted[in_order[np.asarray(wanted, np.int64)]] = True
        keep = is_wanted | ~self.skippable
        starts = np.flatnonzero(self.clean)
        for start, end in zip(starts, [*starts[1:], len(keep)]):
            last = np.flatnonzero(is_wanted[start:end])
            keep[start + last[-1] + 1 if len(last) else start : end] = False
        return keep

    def shares(self, keep: np.ndarray, count: int) -> list[np.ndarray]:
        """The packets marked in `keep`, [P] bool, as at most `count` such masks, each of which decodes by itself."""
        cuts, total = [], int(keep.sum())
        done = np.concatenate([[0], np.cumsum(keep)])[np.flatnonzero(self.clean)]  # kept packets before each beginning
        for place in range(1, count):
            nearest = np.abs(done - total * place / count).argmin()
            cuts.append(np.flatnonzero(self.clean)[nearest])
        borders = [0, *sorted(set(cuts) - {0}), len(keep)]
        masks = []
        for start, end in itertools.pairwise(borders):
            mask = np.zeros(len(keep), bool)
            mask[start:end] = keep[start:end]
            if mask.any():
                masks.append(mask)
        return masks


def scan(container: InputContainer, stream: VideoStream) -> Packets | None:
    """The packets of a stream, or None where all of them have to be decoded."""
    codec = stream.codec_context.codec.canonical_name
    units = _UNITS.get(codec)
    if units is None and codec not in _KEYS_ARE_CLEAN:
        return None
    rows, parameters = [], None
    length_bytes = _length_bytes(codec, stream.codec_context.extradata) if units else 0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if packet.pts is None or packet.is_corrupt:
            return None
        clean, layer, referred, shown = packet.is_keyframe, 0, True, not packet.is_discard
        if codec == "vp8":
            shown = shown and bool(memoryview(packet)[0] & 0x10)
        elif units:
            parts = _units(memoryview(packet), length_bytes)
            if parts is None:
                return None
            picture = units(parts)
            if picture is None:
                return None
            clean, layer, referred, own = picture
            parameters = own if parameters is None else parameters
            if not own <= parameters:
                return None
        rows.append((packet.pts, clean, layer, referred, shown))
    if not rows:
        return None
    times, clean, layer, referred, shown = (np.array(column) for column in zip(*rows))
    # One that others of its layer do not refer to may be referred to by those of higher layers.
    found = Packets(times, clean, ~referred & (layer == layer.max()), shown)
    steps = np.diff(found.frame_times)
    if not clean[0] or not shown.any() or (steps <= 0).any():
        return None
    if len(steps) and steps.max() > _UNEVEN * np.median(steps) + 1:  # times may be rounded to the unit
        return None
    return found


def _length_bytes(codec, extradata):
    """Bytes of the length before each unit; 0 where start codes part them (ISO/IEC 14496-15)."""
    if not extradata or extradata[0] != 1:
        return 0
    return (extradata[4 if codec == "h264" else 21] & 3) + 1


def _units(data, length_bytes):
    """Where a packet's units begin and end; None where they do not fill it."""
    size, at, found = len(data), 0, []
    if not length_bytes:
        content = bytes(data)
        starts, at = [], content.find(b"\0\0\1")
        while at >= 0:
            starts.append(at + 3)
            at = content.find(b"\0\0\1", at + 3)
        return [content[start:end] for start, end in zip(starts, [*(s - 3 for s in starts[1:]), size])] or None
    while at < size:
        length = int.from_bytes(data[at : at + length_bytes], "big")
        at += length_bytes
        if not length or at + length > size:
            return None
        found.append(data[at : at + length])
        at += length
    return found


def _h264(units):
    """(clean, layer, referred, parameter sets) of one H.264 packet; None without a picture that can be told."""
    clean, referred, slices, parameters = False, False, 0, set()
    for unit in units:
        if not unit or unit[0] & 0x80:
            return None
        kind = unit[0] & 31
        if kind in (1, 5):
            slices += 1
            clean |= kind == 5
            referred |= bool(unit[0] & 0x60)
        elif kind in (2, 3, 4, 20, 21):  # parted data; further views
            return None
        elif kind in (7, 8, 13, 15):
            parameters.add(bytes(unit).rstrip(b"\0"))
    return (clean, 0, referred, parameters) if slices else None


def _hevc(units):
    """As `_h264`, of HEVC."""
    clean, layer, referred, slices, parameters = False, 0, False, 0, set()
    for unit in units:
        if len(unit) < 2 or unit[0] & 0x80:
            return None
        kind = unit[0] >> 1
        if (unit[0] & 1) << 5 | unit[1] >> 3:  # a further view or layer
            return None
        if kind < 32:
            slices += 1
            clean |= kind in (19, 20)
            layer = max(layer, (unit[1] & 7) - 1)
            referred |= kind > 14 or kind % 2 == 1
        elif kind in (32, 33, 34):
            parameters.add(bytes(unit).rstrip(b"\0"))
    return (clean, layer, referred, parameters) if slices else None


_UNITS = {"h264": _h264, "hevc": _hevc}
