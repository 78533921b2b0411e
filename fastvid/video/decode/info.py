"""What decoders say of a video, and why one cannot be decoded."""

from dataclasses import dataclass

from fastvid.files import StrPath

MAX_PIXELS = 8192 * 4320  # of a picture
STILL = "pillow"  # the `VideoInfo.conversion` of images


class DecodeError(ValueError):
    """A video that cannot be decoded.

    Attributes:
        path: the file.
        reason: what is wrong with it.
    """

    def __init__(self, path: StrPath, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = str(path), reason


@dataclass(frozen=True)
class VideoInfo:
    """What a video file holds.

    Attributes:
        codec: FFmpeg's name of the codec.
        width, height: pixels of the upright picture.
        frames: frames that the video has; the container's own count may differ.
        fps: average frames per second as the container says; 0 if it does not.
        rotation: degrees counterclockwise by which the stored picture was turned to stand upright: 0, 90, 180, 270.
        duration: seconds as the container says; 0 if it does not.
        decoder: name and versions of what decoded it.
        conversion: what turned its samples into RGB. "swscale": PyAV's default, byte for byte; `STILL`: Pillow's.
        damaged: frames that were decoded with errors, or are missing, and were put up with.
    """

    codec: str
    width: int
    height: int
    frames: int
    fps: float
    rotation: int
    duration: float
    decoder: str
    conversion: str = "swscale"
    damaged: int = 0

    @property
    def still(self) -> bool:
        """Whether it is an image, which is a video of one frame."""
        return self.conversion == STILL
