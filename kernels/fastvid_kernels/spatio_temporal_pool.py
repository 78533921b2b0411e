"""Spatio-temporal pooling: a video's patch states to one row per frame and one row per patch position.

Dimensions: B videos, T frames, P patches per frame, C channels, N temporal rows.

From Video-ChatGPT (Maaz et al., 2023, section 3.1), ``get_spatio_temporal_features`` of its feature script.
"""

import torch


def spatio_temporal_pool_reference(x, *, num_temporal=100, frame_counts=None):
    """Plain torch, differentiable, on any device: see `spatio_temporal_pool`.

    Frame by frame, so that both means come from one read of the input while the frame is in cache.
    """
    if x.dim() == 4:
        counts = [x.shape[1]] * x.shape[0] if frame_counts is None else torch.as_tensor(frame_counts).tolist()
        out_BRC = x.new_empty(x.shape[0], num_temporal + x.shape[2], x.shape[3])
        if not counts:
            return out_BRC
        return torch.stack([_pool(x_TPC[:count], num_temporal) for x_TPC, count in zip(x, counts)])
    return _pool(x, num_temporal)


def _pool(x_TPC, num_temporal):
    T, P, C = x_TPC.shape
    accumulate = torch.float64 if x_TPC.dtype == torch.float64 else torch.float32
    temporal, spatial_PC = [], x_TPC.new_zeros(P, C, dtype=accumulate)
    for frame_PC in x_TPC.unbind(0):
        frame_PC = frame_PC.to(accumulate)
        temporal.append(frame_PC.sum(0) / max(P, 1))
        spatial_PC += frame_PC
    padding_NC = x_TPC.new_zeros(num_temporal - T, C, dtype=accumulate)
    temporal_TC = torch.stack(temporal) if temporal else padding_NC[:0]
    return torch.cat([temporal_TC, padding_NC, spatial_PC / max(T, 1)]).to(x_TPC.dtype)


def spatio_temporal_pool(x, *, num_temporal=100, frame_counts=None, impl="auto"):
    """Mean over the patches of each frame, and over the frames at each patch position.

    Accumulates in fp32 (fp64 for fp64 input) and rounds once. Differentiable. Repeatable: no atomics.

    Args:
        x: [T, P, C] or [B, T, P, C], floating point, any strides (a view without the class token is not copied).
        num_temporal: N; T may not exceed it.
        frame_counts: real frames of each video, [B] integers (4-D `x` only); later frames are never read. None: T.
        impl: "auto", "reference" (plain torch) or "triton".

    Returns:
        [N + P, C] or [B, N + P, C] in x's dtype: frame means, zero rows up to N, position means over the real frames.
        A video without frames, or frames without patches, pool to zeros.

    Raises:
        ValueError: a shape, count or `impl` that does not fit.
        NotImplementedError: ``impl="triton"``.
    """
    if x.dim() not in (3, 4) or not x.is_floating_point():
        raise ValueError(f"x must be a floating-point [T, P, C] or [B, T, P, C], found {x.dtype} {list(x.shape)}")
    T = x.shape[-3]
    if frame_counts is not None:
        if x.dim() == 3:
            raise ValueError("frame_counts goes with [B, T, P, C]; slice a single video instead")
        if len(frame_counts) != x.shape[0] or not all(0 <= int(n) <= T for n in frame_counts):
            raise ValueError(f"frame_counts must be {x.shape[0]} integers in [0, {T}], found {frame_counts}")
    if T > num_temporal:
        raise ValueError(f"{T} frames do not fit into num_temporal={num_temporal} rows")
    if impl == "triton":
        raise NotImplementedError("spatio_temporal_pool has no Triton kernel yet; use impl='auto'")
    if impl not in ("auto", "reference"):
        raise ValueError(f"impl must be 'auto', 'reference' or 'triton', found {impl!r}")
    return spatio_temporal_pool_reference(x, num_temporal=num_temporal, frame_counts=frame_counts)


__all__ = ["spatio_temporal_pool", "spatio_temporal_pool_reference"]
