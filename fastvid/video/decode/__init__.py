"""Video files to frames: exact frame numbers, upright RGB, bounded memory, nothing damaged taken for whole."""

from fastvid.video.decode.info import MAX_PIXELS, DecodeError, VideoInfo
from fastvid.video.decode.pyav import decode

__all__ = ["MAX_PIXELS", "DecodeError", "VideoInfo", "decode"]
