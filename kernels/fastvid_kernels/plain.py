"""What the plain-torch references, and the chains for CPUs, have in common.

Dimensions: N rows, h pairs of channels of a head.
"""

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """x in at least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotary_angles(positions_N: Tensor, inv_freq_h: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every row's angles, times `scale`: [N, 1, h] fp32 each."""
    angles_N1h = positions_N.to(inv_freq_h.dtype)[:, None, None] * inv_freq_h
    return angles_N1h.cos() * scale, angles_N1h.sin() * scale


def last_rows(x_ND: Tensor, rows: int) -> Tensor:
    """The last rows in the same memory, which autograd takes for a tensor of its own and not for a view.

    For what a Function returns beside all rows: each of both may be overwritten later.
    """
    return x_ND[len(x_ND) - rows :].data


__all__ = ["last_rows", "rotary_angles", "wide"]
