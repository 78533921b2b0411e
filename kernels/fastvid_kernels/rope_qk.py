"""Rotary position embedding of queries and keys where they lie: in the packed rows of the fused QKV projection.

Dimensions: N rows, E = (H + 2K)·d columns of a row, H query heads, K key/value heads, d channels per head, h = d / 2.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rope_qk_reference(qkv_NE, positions_N, inv_freq_h, num_heads, num_kv_heads, scale=1.0):
    """`rope_qk` in plain differentiable torch."""
    cos_N1h, sin_N1h = _angles(positions_N, inv_freq_h, scale)
    rows_NAd = qkv_NE.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))
    first_NAh, second_NAh = _wide(rows_NAd[:, :num_heads + num_kv_heads]).chunk(2, dim=-1)
    rotated_NAd = torch.cat([first_NAh * cos_N1h - second_NAh * sin_N1h,
                             second_NAh * cos_N1h + first_NAh * sin_N1h], dim=-1)
    return torch.cat([rotated_NAd.to(qkv_NE.dtype), rows_NAd[:, num_heads + num_kv_heads:]], dim=1).flatten(1)


def _angles(positions_N, inv_freq_h, scale):
    """Cosine and sine of every row's angles, times `scale`: [N, 1, h] fp32 each."""
    angles_N1h = positions_N.to(inv_freq_h.dtype)[:, None, None] * inv_freq_h
    return angles_N1h.cos() * scale, angles_N1h.sin() * scale


def _rotate_(qkv_NE, cos_N1h, sin_N1h, num_heads, num_kv_heads):
    """Rotate queries and keys of contiguous packed rows in place."""
    rows_NAd = qkv_NE.unflatten(-1, (num_heads + 2 * num_kv_heads, -1))[:, :num_heads + num_kv_heads]
    first_NAh, second_NAh = _wide(rows_NAd).chunk(2, dim=-1)
    half = first_NAh.shape[-1]
    # Both before either is written: in fp32 the halves are views of the rows.
    rotated = first_NAh * cos_N1h - second_NAh * sin_N1h, second_NAh * cos_N1h + first_NAh * sin_N1h
    rows_NAd[..., :half], rows_NAd[..., half:] = rotated


class _RopeQK(torch.autograd.Function):
    """Saves positions and frequencies; backward rotates the other way."""

    @staticmethod
    def forward(ctx, qkv_NE, positions_N, inv_freq_h, num_heads, num_kv_heads, scale, inplace):
        if inplace:
            ctx.mark_dirty(qkv_NE)
        else:
            qkv_NE = qkv_NE.clone(memory_format=torch.contiguous_format)
        _rotate_(qkv_NE, *_angles(positions_N, inv_freq_h, scale), num_heads, num_kv_heads)
        ctx.save_for_backward(positions_N, inv_freq_h)
        ctx.settings = num_heads, num_kv_heads, scale
        return qkv_NE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NE):
        positions_N, inv_freq_h = ctx.saved_tensors
        num_heads, num_kv_heads, scale = ctx.settings
        cos_N1h, sin_N1h = _angles(positions_N, inv_freq_h, scale)
        grad_NE = grad_NE.clone(memory_format=torch.contiguous_format)
        _rotate_(grad_NE, cos_N1h, -sin_N1h, num_heads, num_kv_heads)
        return grad_NE, None, None, None, None, None, None


def rope_qk(qkv_NE: Tensor, positions_N: Tensor, inv_freq_h: Tensor, num_heads: int, num_kv_heads: int,
            *, scale: float = 1.0, inplace: bool = False, impl: str = "auto") -> Tensor:
    """Rotate queries and keys by their rows' positions (arXiv:2104.09864; halves paired as in Hugging Face's LLaMA).

    Args:
        qkv_NE: [N, (H+2K)·d] queries, keys, values of each row; fp32, bf16 or fp16. Contiguous if `inplace`.
        positions_N: [N] int32 or int64.
        inv_freq_h: [d/2] fp32, radians per position.
        num_heads, num_kv_heads: H, K.
        scale: factor on cosine and sine (YaRN's attention factor).
        inplace: write into `qkv_NE`, which must be nobody's saved tensor (a frozen linear's output is not).
        impl: "auto" or "reference": plain torch.

    Returns:
        [N, (H+2K)·d] with queries and keys rotated, values as they were; computed in fp32, rounded once.
        Saved for backward: positions and frequencies. Repeatable.

    Raises:
        ValueError: `impl` is not available here.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"rope_qk has no implementation {impl!r} here; use 'auto' or 'reference'")
    return _RopeQK.apply(qkv_NE, positions_N, inv_freq_h, num_heads, num_kv_heads, scale, inplace)


__all__ = ["rope_qk", "rope_qk_reference"]
