"""Linear layers: of trained parts, and of a frozen backbone.

Dimensions: N rows, I channels in, O channels out.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.nn import functional

from fastvid.model.quantize import FORMATS


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
        self._tiled = None  # {(first, last) output channel: their `_Tiled`}, or None

    def forward(self, x_NI: Tensor, *, outputs: slice | None = None) -> Tensor:
        """[N, O] in x's dtype.

        Args:
            x_NI: rows.
            outputs: compute these channels only, consecutive ones: rows of the weight. None: all.
        """
        if self._tiled is not None and x_NI.dtype == self.weight.dtype:
            return _TiledProduct.apply(x_NI, self._tiled_weight(outputs))
        bias = self.bias
        if bias is not None:
            bias = (bias if outputs is None else bias[outputs]).to(x_NI.dtype)
        return functional.linear(x_NI, self._cast_weight(outputs, x_NI.dtype), bias)

    def keep_casts(self, keep: bool) -> None:
        """Whether to cast the weight once from now on, at its first use, instead of at every use.

        It must not change meanwhile. Gradients reach it as before: those of each backward are widened, then added. A
        weight that FSDP2 shards is cast by FSDP2.
        """
        self._kept = {} if keep and self.weight.requires_grad and not isinstance(self.weight, DTensor) else None

    def _cast_weight(self, outputs, dtype):
        def cast():
            return (self.weight if outputs is None else self.weight[outputs]).to(dtype)  # no more than these is cast

        if self._kept is None or self.weight.dtype == dtype or not torch.is_grad_enabled():
            return cast()
        first, last, _ = (outputs or slice(None)).indices(self.weight.shape[0])
        if (first, last, dtype) not in self._kept:
            self._kept[first, last, dtype] = cast()
        return self._kept[first, last, dtype]

    def tile(self) -> None:
        """From now on, multiply by copies of the weight in the layout that oneDNN's products want (`can_tile`).

        A plain bf16 product brings its weight into that layout in every call; on CPUs with AVX512-BF16 the bits are the
        same. A plain fp32 product is MKL's, whose sums round in another order. Copies are made when they are first
        needed, one for each direction, and again after the weight was replaced or written to (by all but `.data.copy_`
        and its like, which autograd does not see either).
        """
        assert not self.weight.requires_grad and self.bias is None and not isinstance(self.weight, DTensor)
        self._tiled = {}

    def _tiled_weight(self, outputs):
        first, last, step = (outputs or slice(None)).indices(self.weight.shape[0])
        assert step == 1
        found = self._tiled.get((first, last))
        if found is None or not found.holds(self.weight):
            found = self._tiled[first, last] = _Tiled(self.weight, first, last)
        return found

    def __getstate__(self):
        """Without the copies, which nothing can copy or pickle; they are made anew."""
        return {**super().__getstate__(), "_kept": None, "_tiled": None if self._tiled is None else {}}


def can_tile(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether oneDNN, whose products take weights in tiles, multiplies `dtype` on `device`."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available() or not torch.backends.mkldnn.enabled:
        return False
    return dtype == torch.float32 or dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()


class _Tiled:
    """Rows of a weight in oneDNN's tiles, which no other operation reads: for forward and for the gradient of x."""

    def __init__(self, weight, first, last):
        self._weight, self._state = weight, self._state_of(weight)
        self._rows_OI = weight.detach()[first:last]  # while it lives, no other weight has its address
        self._forward = self._backward = None

    @staticmethod
    def _state_of(weight):
        return weight.data_ptr(), weight.dtype, weight._version

    def holds(self, weight):
        """Whether these are tiles of `weight` as it is."""
        return self._state_of(weight) == self._state

    def forward(self, x_NI):
        if self._forward is None:
            self._forward = torch.ops.mkldnn._reorder_linear_weight(self._rows_OI)
        return _product(x_NI, self._forward)

    def backward(self, grad_NO):
        if not self.holds(self._weight):
            raise RuntimeError("a frozen weight was modified between forward and backward")
        if self._backward is None:
            self._backward = torch.ops.mkldnn._reorder_linear_weight(self._rows_OI.T.contiguous())
        return _product(grad_NO, self._backward)


def _product(x_NI, tiled):
    return torch.ops.mkldnn._linear_pointwise(x_NI, tiled, None, "none", [], "")


class _TiledProduct(torch.autograd.Function):
    """x·Wᵀ; saves nothing."""

    @staticmethod
    def forward(ctx, x_NI, tiled):
        ctx.tiled = tiled
        return tiled.forward(x_NI)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NO):
        return ctx.tiled.backward(grad_NO), None


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
        assert not (trained or bias)
        return FORMATS[frozen_dtype](inputs, outputs)
    return Linear(inputs, outputs, bias=bias, dtype=dtype, trained=trained)
