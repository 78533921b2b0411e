"""Decoded samples to RGB, bit for bit as swscale's default conversion gives it: only the pixels that are wanted.

Of progressive 8-bit 4:2:0 pictures of even height the conversion is an integer function of one pixel's Y, U and V, with
the chroma sample of the nearest whole pair: ``u[row // 2, column // 2]``. The numbers are those of libswscale's tables:
BT.601's, BT.709's and so on in 16-bit fixed point; all 2²⁴ triples of every one of them are tested.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from av import VideoFrame

# FFmpeg's number of a colour space (libavutil/pixfmt.h): its row below. 2 is that of pictures that name none.
_SPACES = {1: "709", 2: "601", 4: "fcc", 5: "601", 6: "601", 7: "240m", 9: "2020"}
# Per colour space, of limited and of full range: what V adds to red, U to blue, U to green, V to green; in 1/65536.
_FACTORS = {
    "601": ((13075, 16525, -3209, -6660), (11485, 14516, -2819, -5850)),
    "709": ((14686, 17305, -1747, -4366), (12901, 15201, -1534, -3835)),
    "2020": ((13752, 17545, -1535, -5328), (12080, 15412, -1348, -4680)),
    "240m": ((14697, 17029, -2113, -4445), (12911, 14958, -1856, -3904)),
    "fcc": ((13056, 16600, -3095, -6639), (11469, 14582, -2718, -5831)),
}
_TOGETHER = 64  # rows that are converted in one piece, which stays in the processor's cache
_LUMA = ((9539, 128), (8192, 0))  # factor in 1/65536 of 8·Y less the offset, of limited and of full range


def factors(colour_space: int, full_range: bool) -> tuple[int, ...]:
    """(luma factor, luma offset, V to red, U to blue, U to green, V to green) of a conversion.

    Args:
        colour_space: FFmpeg's number (AVColorSpace).
        full_range: whether samples fill 0 … 255.

    Raises:
        KeyError: another colour space.
    """
    return *_LUMA[full_range], *_FACTORS[_SPACES[colour_space]][full_range]


def to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray, colour_space: int, full_range: bool) -> np.ndarray:
    """RGB of samples, bit for bit as swscale has it.

    Args:
        y, u, v: uint8 arrays of one shape.
        colour_space, full_range: as `factors` takes them.

    Returns:
        [..., 3] uint8.
    """
    rgb = np.empty((*y.shape, 3), np.uint8)
    _convert(y, u, v, factors(colour_space, full_range), rgb)
    return rgb


def _convert(y, u, v, conversion, rgb):
    """Put the RGB of samples into `rgb`: in 32 bits, which none of the products leaves."""
    luma, offset, v_red, u_blue, u_green, v_green = conversion
    grey, u, v = (plane.astype(np.int32) for plane in (y, u, v))
    grey *= 8 * luma
    grey -= offset * luma
    grey >>= 16
    u -= 128
    v -= 128
    channel = np.multiply(u, 8 * u_green)
    channel >>= 16
    green = np.multiply(v, 8 * v_green)
    green >>= 16
    green += channel
    v *= 8 * v_red
    u *= 8 * u_blue
    for number, value in enumerate((v, green, u)):
        if value is not green:
            value >>= 16
        value += grey
        rgb[..., number] = np.clip(value, 0, 255, out=value)


def can_gather(frame: VideoFrame) -> bool:
    """Whether `gather` gives PyAV's own bytes of a decoded frame."""
    return (
        frame.format.name in ("yuv420p", "yuvj420p")
        and frame.height % 2 == 0
        and not frame.interlaced_frame
        and int(frame.colorspace) in _SPACES
        and all(plane.line_size > 0 for plane in frame.planes)
    )


def gather(frame: VideoFrame, rows: np.ndarray, columns: np.ndarray, rgb: np.ndarray) -> None:
    """Put the RGB of some pixels of a decoded frame into `rgb`.

    Args:
        frame: `av.VideoFrame` for which `can_gather`.
        rows, columns: int64 arrays, [h, 1] and [1, w] or [1, w] and [h, 1]: where the pixels of an upright picture of
            h × w lie in the stored one.
        rgb: [h, w, 3] uint8.
    """
    buffers: list[Any] = list(frame.planes)  # as which they can be read, though PyAV's stubs do not say so
    planes = [np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size) for plane in buffers]
    full_range = frame.format.name == "yuvj420p" or frame.color_range == 2
    conversion = factors(int(frame.colorspace), full_range)
    if rows.shape[0] == 1:
        rgb = rgb.transpose(1, 0, 2)
    rows, columns = rows.ravel(), columns.ravel()
    half_columns = columns >> 1
    for start in range(0, len(rows), _TOGETHER):
        some = rows[start : start + _TOGETHER]
        # Whole rows first, then columns of them: rows are copied at once.
        y, u, v = (
            plane[at].take(along, 1)
            for plane, at, along in zip(planes, (some, some >> 1, some >> 1), (columns, half_columns, half_columns))
        )
        _convert(y, u, v, conversion, rgb[start : start + _TOGETHER])
