"""Rotary position embedding on CPUs.

Dimensions: N rows, n of a block, E = (H + 2K)·d columns of a row, A heads of a row, d channels per head, h = d / 2.
"""

import torch
from torch import Tensor

from ..plain import rotary_angles, wide
from . import rows
from .row_blocks import over_rows


def rotate(
    qkv_NE: Tensor,
    out_NE: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    inverse: bool,
) -> Tensor:
    """`qkv_NE` rotated into `out_NE`, which may be the same; None: into a new tensor."""
    in_cpp = rows.serve(qkv_NE)
    if out_NE is None:
        qkv_NE = qkv_NE.contiguous() if in_cpp else qkv_NE
        out_NE = torch.empty_like(qkv_NE, memory_format=torch.contiguous_format)
    cos_N1h, sin_N1h = rotary_angles(positions_N, inv_freq_h, scale)
    sin_N1h = sin_N1h.neg_() if inverse else sin_N1h
    heads = {"rotated": num_heads + num_kv_heads, "heads": num_heads + 2 * num_kv_heads}
    if in_cpp:
        rows.rotate(qkv_NE, out_NE, cos_N1h, sin_N1h, **heads)
    else:
        _chain(out_NE, None if out_NE is qkv_NE else qkv_NE, cos_N1h, sin_N1h, **heads)
    return out_NE


@over_rows
def _chain(out_nE, source_nE, cos_n1h, sin_n1h, *, rotated, heads):
    """Rotate the first `rotated` of a row's `heads` heads, of `out_nE` itself where there is no other source."""
    out_nA2h = out_nE.unflatten(1, (heads, 2, -1))
    rows_nA2h = out_nA2h if source_nE is None else source_nE.unflatten(1, (heads, 2, -1))
    first_nAh, second_nAh = wide(rows_nA2h[:, :rotated]).unbind(2)
    # Both before either is written: the halves may be views of what is written to. Products are rounded, as in
    # Hugging Face's LLaMA: a fused multiply-add would differ from it in fp32's last bits.
    turned_first_nAh = (first_nAh * cos_n1h).sub_(second_nAh * sin_n1h)
    out_nA2h[:, :rotated, 1] = (second_nAh * cos_n1h).add_(first_nAh * sin_n1h)
    out_nA2h[:, :rotated, 0] = turned_first_nAh
    if source_nE is not None:
        out_nA2h[:, rotated:] = rows_nA2h[:, rotated:]


__all__ = ["rotate"]
