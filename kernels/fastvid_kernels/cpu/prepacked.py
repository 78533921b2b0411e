"""Products with frozen matrices that lie in oneDNN's layouts.

A plain bf16 product brings its weight into that layout in every call; on CPUs with AVX512-BF16 the bits are the same. A
plain fp32 product is MKL's, whose sums round in another order.

Dimensions: N rows, I channels in, O channels out.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from ..plain import last_rows


def can_prepack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN multiplies `dtype` on `device`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class PrepackedWeight:
    """Copies of a frozen weight in those layouts, one for each direction, made when they are first needed.

    They are made anew after the weight was replaced or written to (by all but `.data.copy_` and its like, which
    autograd does not see either).
    """

    def __init__(self):
        self.parts = {}  # {(first, last) output channel: their `_Part`}

    def multiply(
        self,
        x_NI: Tensor,
        weight_OI: Tensor,
        outputs: slice | None = None,
        bias_O: Tensor | None = None,
        every_NI: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x·Wᵀ (+ b) of the channels `outputs`, consecutive ones; None: all. Saves nothing for backward.

        `bias_O` is frozen, and of those channels alone. `every_NI` is x with rows before it, which get no
        gradient: then (the product of x, that of all rows without gradient).
        """
        return _Product.apply(x_NI, self._part(weight_OI, outputs), bias_O, every_NI)

    def gradient(self, grad_NO: Tensor, weight_OI: Tensor, outputs: slice | None = None) -> Tensor:
        """g·W of the channels `outputs`."""
        return self._part(weight_OI, outputs).backward(grad_NO)

    def _part(self, weight_OI, outputs):
        first, last, step = (outputs or slice(None)).indices(weight_OI.shape[0])
        assert step == 1
        found = self.parts.get((first, last))
        if found is None or not found.holds(weight_OI):
            found = self.parts[first, last] = _Part(weight_OI, first, last)
        return found

    def __getstate__(self) -> dict[str, dict]:
        """Without the copies, which nothing can copy or pickle; they are made anew."""
        return {"parts": {}}


class PrepackedProduct:
    """x·Wᵀ + b of a frozen matrix, without gradients: of the weight only that layout is kept.

    Args:
        weight_OI, bias_O: of a dtype that `can_prepack`, on the CPU.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor):
        self._prepacked, self._bias_O = torch.ops.mkldnn._reorder_linear_weight(weight_OI), bias_O

    def __call__(self, x_NI: Tensor) -> Tensor:
        """[N, O] in x's dtype, the weight's."""
        return _product(x_NI, self._prepacked, self._bias_O)


class _Part:
    """Rows of a weight in oneDNN's layouts, which no other operation reads: for forward and for the gradient of x.

    On the meta device, where there are no such layouts, the rows themselves.
    """

    def __init__(self, weight, first, last):
        self._weight, self._state = weight, self._state_of(weight)
        self._rows_OI = weight.detach()[first:last]  # while it lives, no other weight has its address
        self._forward = self._backward = None

    @staticmethod
    def _state_of(weight):
        return weight.data_ptr(), weight.dtype, weight._version

    def holds(self, weight):
        """Whether these are rows of `weight` as it is."""
        return self._state_of(weight) == self._state

    def forward(self, x_NI, bias_O):
        if x_NI.is_meta:
            return linear(x_NI, self._rows_OI, bias_O)
        if self._forward is None:
            self._forward = torch.ops.mkldnn._reorder_linear_weight(self._rows_OI)
        return _product(x_NI, self._forward, bias_O)

    def backward(self, grad_NO):
        if not self.holds(self._weight):
            raise RuntimeError("a frozen weight was modified between forward and backward")
        if grad_NO.is_meta:
            return linear(grad_NO, self._rows_OI.T)
        if self._backward is None:
            self._backward = torch.ops.mkldnn._reorder_linear_weight(self._rows_OI.T.contiguous())
        return _product(grad_NO, self._backward)


def _product(x_NI, prepacked, bias_O=None):
    return torch.ops.mkldnn._linear_pointwise(x_NI, prepacked, bias_O, "none", [], "")


class _Product(torch.autograd.Function):
    """Saves nothing."""

    @staticmethod
    def forward(ctx, x_NI, part, bias_O, every_NI):
        ctx.part = part
        if every_NI is None:
            return part.forward(x_NI, bias_O)
        ctx.set_materialize_grads(False)
        y_NO = part.forward(every_NI, bias_O)
        ctx.mark_non_differentiable(y_NO)
        return last_rows(y_NO, len(x_NI)), y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO, *_):
        return None if grad_NO is None else ctx.part.backward(grad_NO), None, None, None


__all__ = ["PrepackedProduct", "PrepackedWeight", "can_prepack"]
