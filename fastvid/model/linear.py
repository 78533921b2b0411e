"""Linear layers: of trained parts, and of a frozen backbone.

Dimensions: N rows, I channels in, O channels out.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastvid.model.quantize import FORMATS


class Linear(nn.Module):
    """y = x·Wᵀ (+ b) in x's dtype, whatever the parameters' dtype. Without weight gradient it saves no input."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, dtype: torch.dtype, trained: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=trained)
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype), requires_grad=trained) if bias else None

    def forward(self, x_NI: Tensor, *, outputs: slice | None = None) -> Tensor:
        """[N, O] in x's dtype.

        Args:
            x_NI: rows.
            outputs: compute these channels only, consecutive ones: rows of the weight. None: all.
        """
        weight, bias = self.weight, self.bias
        if outputs is not None:  # before the cast, so that no more than these is cast
            weight, bias = weight[outputs], None if bias is None else bias[outputs]
        return functional.linear(x_NI, weight.to(x_NI.dtype), None if bias is None else bias.to(x_NI.dtype))


def make_linear(inputs: int, outputs: int, *, bias: bool = False, trained: bool, dtype: torch.dtype,
                frozen_dtype: str | None = None) -> nn.Module:
    """The linear layer that a part of the model is made of.

    Args:
        trained: parameters require gradients.
        dtype: of the parameters.
        frozen_dtype: how a frozen weight is stored instead, one of `quantize.FORMATS`; None: in `dtype`.
    """
    if frozen_dtype is not None:
        assert not (trained or bias)
        return FORMATS[frozen_dtype](inputs, outputs)
    return Linear(inputs, outputs, bias=bias, dtype=dtype, trained=trained)
