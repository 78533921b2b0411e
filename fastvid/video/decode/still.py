"""Pictures that stand for the frames of a video: files of JPEG, PNG, WebP, GIF or BMP, one frame each."""

import warnings
from collections.abc import Sequence

import numpy as np

from fastvid.files import StrPath
from fastvid.video.decode.info import MAX_PIXELS, DecodeError
from fastvid.video.sampling import nearest_indices

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


def pictures(paths: Sequence[StrPath], *, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Pictures as `fastvid.video.decode.decode` gives the frames of a video: upright, made square by nearest neighbour.

    What is transparent becomes the colour that the file holds there. Of an animation the first picture is taken.

    Args:
        paths: a file for each frame.
        size: pixels of each side.
        max_pixels: refuse larger pictures.

    Returns:
        [T, size, size, 3] uint8 RGB.

    Raises:
        DecodeError: a file that is no such picture, is damaged or too large.
    """
    return np.stack([_picture(path, size, max_pixels) for path in paths])


def _picture(path, size, max_pixels):
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is this function's own
            with Image.open(path, formats=_FORMATS) as image:
                width, height = image.size
                if width * height > max_pixels:
                    raise DecodeError(path, f"its {width}×{height} pixels are over the limit of {max_pixels:,}")
                pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except DecodeError:
        raise
    except Image.DecompressionBombError as error:
        raise DecodeError(path, "is too large a picture") from error
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError) as error:
        raise DecodeError(path, f"is no picture of {', '.join(_FORMATS)}, or is damaged") from error
    height, width = pixels.shape[:2]
    return pixels[nearest_indices(height, size)[:, None], nearest_indices(width, size)[None, :]]
