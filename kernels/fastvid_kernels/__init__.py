"""fastvid's kernels. Each lives in a file of its own beside its plain-torch reference."""

from .frame_patchify import frame_patchify
from .grid_pool import grid_pool
from .spatio_temporal_pool import spatio_temporal_pool
from .yuv_patchify import yuv_patchify

__all__ = ["frame_patchify", "grid_pool", "spatio_temporal_pool", "yuv_patchify"]
