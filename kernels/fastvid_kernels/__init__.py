"""fastvid's kernels. Each lives in a file of its own beside its plain-torch reference."""

from .frame_patchify import frame_patchify
from .spatio_temporal_pool import spatio_temporal_pool
from .yuv_patchify import yuv_patchify

__all__ = ["frame_patchify", "spatio_temporal_pool", "yuv_patchify"]
