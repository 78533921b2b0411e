"""Pictures of a page, as text that stands in it: frames and heat maps as data URIs, norms over time as SVG.

Dimensions: N side of a square picture, H × W cells of a heat map, T rows.
"""

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

FRAME, MAP = 176, 420  # pixels of the longer side of a frame, and of a heat map
_STRIP = (1000, 90)  # units of the strip of norms
_MOST_BARS, _LOWEST = 500, 0.12  # the lowest bar's share of the strip
# From little to much: dark blue, teal, yellow. Light grows with the value, so that the order shows in grey as well.
_COLOURS = np.array([(38, 24, 74), (46, 77, 131), (38, 130, 142), (83, 182, 110), (178, 214, 62), (253, 231, 37)])
INK, PADDING = "#1f6feb", "#e4e7eb"


def frame_uri(pixels: np.ndarray, aspect: float, longer: int = FRAME) -> str:
    """A JPEG of a frame that the tower sees.

    Args:
        pixels: [N, N, 3] uint8 RGB, which is the whole frame made square.
        aspect: width ÷ height of the frame, which the picture has again.
        longer: pixels of its longer side.
    """
    return _uri(Image.fromarray(np.asarray(pixels)).resize(_size(aspect, longer), Image.Resampling.BILINEAR), "jpeg")


def heat_map_uri(values_HW: np.ndarray, aspect: float) -> str:
    """A PNG of a grid of values, from its least to its largest, in the shape of a frame of that `aspect`."""
    values = np.asarray(values_HW, np.float64)
    span = values.max() - values.min()
    at = (values - values.min()) / (span or 1) * (len(_COLOURS) - 1)
    low = np.minimum(at.astype(int), len(_COLOURS) - 2)
    share = (at - low)[..., None]
    colours = np.round(_COLOURS[low] * (1 - share) + _COLOURS[low + 1] * share).astype(np.uint8)
    return _uri(Image.fromarray(colours).resize(_size(aspect, MAP), Image.Resampling.NEAREST), "png")


def scale_uri() -> str:
    """The colours of `heat_map_uri` from least to largest."""
    return heat_map_uri(np.arange(120)[None], 12)


def strip_svg(norms: np.ndarray, labels: Sequence[str]) -> str:
    """Bars of norms over time, from the least, a low bar, to the largest: rows mostly differ by a few per cent.

    Args:
        norms: [T], of which zeros are padding. Of more than 500 the largest of each stretch is shown.
        labels: what each bar says when it is pointed at; SVG-safe text.
    """
    norms = np.asarray(norms, np.float64)
    width, height = _STRIP
    groups = np.array_split(np.arange(len(norms)), min(len(norms), _MOST_BARS))
    step, filled = width / len(groups), norms[norms > 0]
    least, span = (filled.min(), filled.max() - filled.min() or 1) if len(filled) else (0, 1)
    bars = []
    for number, group in enumerate(groups):
        shown = group[norms[group].argmax()]
        share = _LOWEST + (1 - _LOWEST) * (norms[shown] - least) / span
        fill, tall = (INK, share * height) if norms[shown] else (PADDING, height)
        bars.append(
            f'<rect x="{number * step:.2f}" y="{height - tall:.2f}" width="{max(step * 0.86, 0.5):.2f}" '
            f'height="{tall:.2f}" fill="{fill}"><title>{labels[shown]}</title></rect>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" class="strip" role="img" '
        f'aria-label="norms over time">{"".join(bars)}</svg>'
    )


def _size(aspect, longer):
    width, height = (longer, longer / aspect) if aspect >= 1 else (longer * aspect, longer)
    return max(1, round(width)), max(1, round(height))


def _uri(image, kind):
    file = io.BytesIO()
    image.save(file, kind, **({"quality": 82} if kind == "jpeg" else {"optimize": True}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
