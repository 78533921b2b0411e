"""RMSNorm of the residual stream (arXiv:1910.07467).

Dimensions: N rows, L live ones, D channels.
"""

import torch
from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_fp8
from fastvid_kernels.dispatch import use_triton
from torch import nn

from fastvid.model.config import Precision
from fastvid.model.rows import Rows


class RMSNorm(nn.Module):
    """Adds a branch to the residual stream, and normalises the sum into the compute dtype.

    `for_fp8`: the rows' only readers are FP8 products, so that they are `Fp8Rows` where kernels run.
    """

    def __init__(
        self,
        channels: int,
        eps: float,
        *,
        trained: bool,
        precision: Precision,
        for_fp8: bool = False,
    ):
        super().__init__()
        dtype = torch.float32 if trained else precision.residual
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype), requires_grad=trained)
        self.eps = eps
        self.compute_dtype = precision.compute
        self.for_fp8 = for_fp8

    def forward(self, residual: Rows, branch: Rows | None) -> tuple[Rows, Rows]:
        """(sum, normalised sum) in one pass; of `Fp8Rows` the bits are those of all rows."""
        given = residual.live, None if branch is None else branch.live, self.weight, self.eps, self.compute_dtype
        every = None if residual.every is None else (residual.every, None if branch is None else branch.every)
        if self.for_fp8 and use_triton("auto", residual.live, name="add_rms_norm_fp8"):
            total_LD, rows, *more = add_rms_norm_fp8(*given, every=every)
            return Rows(total_LD, *more), Rows(rows)
        total_LD, y_LD, *more = add_rms_norm(*given, every=every)
        return Rows(total_LD, *more[:1]), Rows(y_LD, *more[1:])
