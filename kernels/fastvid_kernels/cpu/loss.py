"""What lies between the products of `linear_cross_entropy` on CPUs.

Dimensions: l rows of a chunk, n of a block, V tokens of the vocabulary.
"""

import torch
from torch import Tensor

from ..plain import wide
from .row_blocks import row_blocks


def softmax_gradient(logits_lV: Tensor, targets_l: Tensor, lse_l: Tensor, losses_l: Tensor, gradient: bool) -> None:
    """Log-sum-exp and loss of each row of logits out; with `gradient`, the logits are replaced by their gradient."""
    for rows in row_blocks(logits_lV):
        targets_n1, x_nV = targets_l[rows, None], wide(logits_lV[rows])
        top_n1 = x_nV.amax(-1, keepdim=True)
        p_nV = (x_nV - top_n1).exp_()
        sum_n1 = p_nV.sum(-1, keepdim=True)
        lse_n1 = sum_n1.log().add_(top_n1)
        losses_l[rows] = (lse_n1 - x_nV.gather(1, targets_n1))[:, 0]
        lse_l[rows] = lse_n1[:, 0]
        if gradient:
            logits_lV[rows] = p_nV.div_(sum_n1).scatter_add_(1, targets_n1, torch.full_like(sum_n1, -1.0))


__all__ = ["softmax_gradient"]
