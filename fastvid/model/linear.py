"""Linear layers: of trained parts, and of a frozen backbone.

Dimensions: N rows, I channels in, O channels out.
"""

from typing import Any

import torch
from fastvid_kernels import cpu
from fastvid_kernels.plain import last_rows
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional

from fastvid.model.quantize import FORMATS


class _LastRows(torch.autograd.Function):
    """The product of all rows with a frozen weight, of which only the last rows get gradients. Saves the weight."""

    @staticmethod
    def forward(ctx, x_NI, every_NI, weight_OI, bias_O):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight_OI)
        y_NO = functional.linear(every_NI, weight_OI, bias_O)
        ctx.mark_non_differentiable(y_NO)
        return last_rows(y_NO, len(x_NI)), y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO, *_):
        (weight_OI,) = ctx.saved_tensors
        return None if grad_NO is None else grad_NO @ weight_OI, None, None, None


class Linear(nn.Module):
    """y = x·Wᵀ (+ b) in x's dtype, whatever the parameters' dtype. Without weight gradient it saves no input.

    A trained bias is fp32.
    """

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, dtype: torch.dtype, trained: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype), requires_grad=trained)
        bias_dtype = torch.float32 if trained else dtype
        self.bias = nn.Parameter(torch.empty(outputs, dtype=bias_dtype), requires_grad=trained) if bias else None
        self._kept = None  # {(first, last) output channel, dtype: cast weight}, or None: cast at every use
        self._prepacked = None  # `cpu.PrepackedWeight`, or None

    def forward(
        self, x_NI: Tensor, *, outputs: slice | None = None, every: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """[N, O] in x's dtype.

        Args:
            x_NI: rows.
            outputs: compute these channels only, consecutive ones: rows of the weight. None: all.
            every: x with rows before it, which get no gradient: then (the product of x, that of all rows without
                gradient), in one call. The weight is frozen.
        """
        bias = self._cast_bias(outputs, x_NI.dtype)
        if self._prepacked is not None and x_NI.dtype == self.weight.dtype:
            return self._prepacked.multiply(x_NI, self.weight, outputs, bias, every)
        weight = self.cast_weight(outputs, x_NI.dtype)
        if every is None:
            return functional.linear(x_NI, weight, bias)
        assert not weight.requires_grad, "no row is frozen where the matrix is trained"
        return _LastRows.apply(x_NI, every, weight, bias)

    def product(self, x_NI: Tensor, outputs: slice) -> Tensor:
        """x·W[outputs]ᵀ (+ b[outputs]) in x's dtype, of a frozen matrix: as `QuantizedLinear.product`."""
        return self(x_NI, outputs=outputs)

    def gradient(self, g_NO: Tensor, outputs: slice) -> Tensor:
        """g·W[outputs] in g's dtype, of a frozen matrix."""
        if self._prepacked is not None and g_NO.dtype == self.weight.dtype:
            return self._prepacked.gradient(g_NO, self.weight, outputs)
        return g_NO @ self.cast_weight(outputs, g_NO.dtype)

    def keep_casts(self, keep: bool) -> None:
        """Whether to cast the weight once from now on, at its first use, instead of at every use.

        It must not change meanwhile. Gradients reach it as before: those of each backward are widened, then added. A
        weight that FSDP2 shards is cast by FSDP2.
        """
        self._kept = {} if keep and self.weight.requires_grad and not isinstance(self.weight, DTensor) else None

    def _cast_bias(self, outputs, dtype):
        if self.bias is None:
            return None
        return (self.bias if outputs is None else self.bias[outputs]).to(dtype)

    def cast_weight(self, outputs: slice | None, dtype: torch.dtype) -> Tensor:
        """The weight of these output channels in `dtype`; gradients reach it."""

        def cast():
            return (self.weight if outputs is None else self.weight[outputs]).to(dtype)  # no more than these is cast

        if self._kept is None or self.weight.dtype == dtype or not torch.is_grad_enabled():
            return cast()
        first, last, _ = (outputs or slice(None)).indices(self.weight.shape[0])
        if (first, last, dtype) not in self._kept:
            self._kept[first, last, dtype] = cast()
        return self._kept[first, last, dtype]

    def prepack(self) -> None:
        """From now on, multiply by copies of the weight in the layouts that this CPU multiplies (`cpu.can_prepack`)."""
        assert not self.weight.requires_grad and not isinstance(self.weight, DTensor)
        self._prepacked = cpu.PrepackedWeight()

    def __getstate__(self) -> dict[str, Any]:
        """Without the cast weights, which are made anew."""
        return {**super().__getstate__(), "_kept": None}


def make_linear(
    inputs: int, outputs: int, *, bias: bool = False, trained: bool, dtype: torch.dtype, frozen_dtype: str | None = None
) -> nn.Module:
    """The linear layer that a part of the model is made of.

    Args:
        trained: parameters require gradients.
        dtype: of the parameters.
        frozen_dtype: how a frozen weight is stored instead, one of `quantize.FORMATS`; None: in `dtype`.
    """
    if frozen_dtype is not None:
        assert not trained
        return FORMATS[frozen_dtype](inputs, outputs, bias_dtype=dtype if bias else None)
    return Linear(inputs, outputs, bias=bias, dtype=dtype, trained=trained)
