"""Images, as videos of one frame: the home of Pillow in decoding."""

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastvid.features.names import medium
from fastvid.files import StrPath
from fastvid.video.decode.info import MAX_PIXELS, STILL, DecodeError, VideoInfo
from fastvid.video.sampling import nearest_indices

if TYPE_CHECKING:
    from PIL.Image import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # no other reader of Pillow's ever sees a file
_TURNED = {
    3: 180,
    4: 180,
    5: 90,
    6: 270,
    7: 270,
    8: 90,
}  # EXIF's orientation: degrees counterclockwise to stand upright


def is_still(path: StrPath) -> bool:
    """Whether a file is an image by its name's ending."""
    return medium(path) == "image"


def decode_still(
    path: StrPath, *, size: int | None = None, max_pixels: int = MAX_PIXELS, into: np.ndarray | None = None
) -> tuple[np.ndarray, VideoInfo]:
    """Decode an image as the one frame of a video, upright and in RGB; of an animated one the first picture.

    Args:
        size: resize it to size × size by nearest neighbour, as frames are; None keeps the image's size.
        max_pixels: refuse a larger image, before it is decoded.
        into: flat uint8 array to put the frame into. It takes a `size`.

    Returns:
        frames [1, H, W, 3] uint8 RGB, and the image's `VideoInfo`.

    Raises:
        DecodeError: it is no image of a format that is read, is too large, damaged or cut short.
    """
    import PIL
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=_FORMATS)
        with image:
            if image.width * image.height > max_pixels:
                raise DecodeError(
                    path, f"its picture of {image.width}×{image.height} is over the limit of {max_pixels:,} pixels"
                )
            codec, turned = (image.format or "").lower(), _TURNED.get(image.getexif().get(274, 1), 0)
            pixels = np.asarray(_rgb(ImageOps.exif_transpose(image)))
    except PIL.UnidentifiedImageError as error:
        raise DecodeError(path, "is no image of a format that is read (JPEG, PNG, WebP, BMP, TIFF, GIF)") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(path, f"its picture is over the limit of {max_pixels:,} pixels") from error
    except Exception as error:  # Pillow's readers raise of many kinds, struct.error among them
        if isinstance(error, (DecodeError, MemoryError)) or (isinstance(error, OSError) and error.errno is not None):
            raise
        raise DecodeError(path, f"is damaged: {' '.join(str(error).split())}") from error
    info = VideoInfo(
        codec=codec,
        width=pixels.shape[1],
        height=pixels.shape[0],
        frames=1,
        fps=0.0,
        rotation=turned,
        duration=0.0,
        decoder=f"pillow {PIL.__version__}",
        conversion=STILL,
    )
    if size is not None:
        pixels = pixels[nearest_indices(info.height, size)[:, None], nearest_indices(info.width, size)[None, :]]
    if into is None:
        return pixels[None].copy(), info
    frames = into[: pixels.size].reshape(1, *pixels.shape)
    frames[0] = pixels
    return frames, info


def pictures(paths: Sequence[StrPath], *, size: int, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Images that stand for the frames of a video, as `decode_still` gives each.

    Args:
        paths: a file for each frame.
        size, max_pixels: as of `decode_still`.

    Returns:
        [T, size, size, 3] uint8 RGB.

    Raises:
        DecodeError: as `decode_still`.
    """
    return np.concatenate([decode_still(path, size=size, max_pixels=max_pixels)[0] for path in paths])


def _rgb(image: "Image") -> "Image":
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):  # Pillow would cut off what is above 255
        values = np.asarray(image)
        if image.mode == "F" or values.min(initial=0) < 0 or values.max(initial=0) > 65535:
            raise ValueError(f"its values, of the mode {image.mode}, are no picture's")
        from PIL import Image

        image = Image.fromarray((values >> 8).astype(np.uint8))
    return image.convert("RGB")
