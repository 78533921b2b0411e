"""Which frames of a video, and which pixels of a frame, the features are made of."""

import numpy as np


def frame_indices(total: int, num_frames: int = 100) -> list[int]:
    """Indices of the frames that stand for a video: the middles of equal segments.

    n = min(total, num_frames) segments of (total − 1)/n frames; borders are rounded half to even in float64, so that
    exact rational arithmetic differs for some lengths. Short videos give duplicates, and the last frame may never be
    taken. From PG-Video-LLaVA's and Video-ChatGPT's ``get_seq_frames``.

    Args:
        total: frames of the video, at least 1.
        num_frames: most frames to take.

    Returns:
        n ascending indices in [0, total).

    Raises:
        ValueError: `total` or `num_frames` is below 1.
    """
    if total < 1 or num_frames < 1:
        raise ValueError(f"cannot choose {num_frames} of {total} frames: both must be at least 1")
    n = min(total, num_frames)
    borders = np.round(float(total - 1) / n * np.arange(n + 1)).astype(np.int64)
    return ((borders[:-1] + borders[1:]) // 2).tolist()


def nearest_indices(length: int, size: int) -> np.ndarray:
    """Source pixel of each of `size` pixels when `length` pixels are resized by nearest neighbour.

    min(floor(f32(i)·(f32(length)/f32(size))), length − 1) in float32, as ``torch.nn.functional.interpolate`` computes
    it; integer arithmetic differs for some lengths. The identity when `length` equals `size`.

    Returns:
        [size] int64.
    """
    scale = np.float32(length) / np.float32(size)
    source = np.floor(np.arange(size, dtype=np.float32) * scale).astype(np.int64)
    return np.minimum(source, length - 1)
