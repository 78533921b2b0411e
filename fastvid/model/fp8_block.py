"""Pieces of a frozen layer whose rows and gradients go from the kernel that makes them to an FP8 product in e4m3.

Dimensions: N rows, I inputs and O outputs of a matrix, M key rows, D channels, F channels of the feed-forward block,
E = (H + 2K)·d columns of queries, keys and values, H query heads, K key/value heads, d channels per head.
"""

from typing import Any, NamedTuple

import torch
from fastvid_kernels.plain import last_rows
from fastvid_kernels.quantize_fp8 import BackInFp8, Fp8Rows
from fastvid_kernels.rope_keys import rope_keys
from fastvid_kernels.rope_keys_backward import made_for, second_part
from fastvid_kernels.rope_keys_fp8 import rope_keys_backward_fp8
from fastvid_kernels.swiglu import swiglu_backward_fp8, swiglu_fp8
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvid.model.quantize import Fp8Linear


class _ProductBackInFp8(torch.autograd.Function):
    """Saves nothing: all that it needs is the matrix."""

    @staticmethod
    def forward(ctx, x_NI, bits_NI, scale_N, matrix, every_NI):
        ctx.matrix, ctx.dtype = matrix, x_NI.dtype
        if bits_NI is None:
            y_NO = matrix.product(x_NI if every_NI is None else every_NI, slice(None))
        else:
            y_NO = matrix.product_of_fp8(bits_NI, scale_N, slice(None), x_NI.dtype)
        ctx.set_materialize_grads(False)  # of the product, which has none
        if len(y_NO) == len(x_NI):
            ctx.mark_non_differentiable(y_NO)
            return tuple(BackInFp8.of(y_NO))
        y_LO = last_rows(y_NO, len(x_NI))
        ctx.mark_non_differentiable(y_LO, y_NO)
        return *BackInFp8.of(y_LO), y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx, _, bits_NO, scale_N, *others):
        if bits_NO is None:
            return None, None, None, None, None
        return ctx.matrix.gradient_of_fp8(bits_NO, scale_N, slice(None), ctx.dtype), None, None, None, None


def product_back_in_fp8(
    x_NI: Tensor | Fp8Rows, matrix: Fp8Linear, every_NI: Tensor | None = None
) -> tuple[BackInFp8, Tensor | None]:
    """`matrix(x)`, to the bit, for a norm whose kernel quantises the product's gradient; so is the gradient of x.

    Args:
        x_NI: rows [N, I], in e4m3 or not.
        matrix: [O, I].
        every_NI: as of `fastvid.model.linear.Linear`; in e4m3 all rows' bits are those of x.

    Returns:
        (rows [N, O] in the dtype of x, or of its stand-in; those of all rows where some stand before). Nothing is saved
        for backward.
    """
    rows = x_NI if isinstance(x_NI, Fp8Rows) else (x_NI, None, None)
    found = _ProductBackInFp8.apply(*rows, matrix, every_NI)
    return BackInFp8(*found[:3]), found[3] if len(found) > 3 else None


class _GateUpSwiGLU(torch.autograd.Function):
    """Saves the product."""

    @staticmethod
    def forward(ctx, stand_in_ND, bits_ND, scale_N, gate_up):
        ctx.gate_up = gate_up
        ctx.set_materialize_grads(False)  # of bits and scales, which have none
        gate_up_NF = gate_up.product_of_fp8(bits_ND, scale_N, slice(None), stand_in_ND.dtype)
        rows = len(stand_in_ND)
        ctx.save_for_backward(gate_up_NF[len(gate_up_NF) - rows :])
        bits_NF, scale_N = swiglu_fp8(gate_up_NF)
        ctx.mark_non_differentiable(bits_NF, scale_N)
        return Fp8Rows.stand_in(gate_up_NF, (rows, bits_NF.shape[1])), bits_NF, scale_N

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NF, *_):
        (gate_up_NF,) = ctx.saved_tensors
        rows = swiglu_backward_fp8(gate_up_NF, grad_NF)
        return ctx.gate_up.gradient_of_fp8(*rows, slice(None), grad_NF.dtype), None, None, None


def gate_up_swiglu(x_ND: Fp8Rows, gate_up: Fp8Linear) -> Fp8Rows:
    """`swiglu(gate_up(x))`, to the bit, whose rows and gradient leave SwiGLU's kernels in e4m3.

    Args:
        x_ND: rows [N, D].
        gate_up: the matrix of gate and up, [2F, D].

    Returns:
        Rows [N, F]; the stand-in has as many as that of x, which are the last. Saved for backward: their product of
        `gate_up`.
    """
    return Fp8Rows(*_GateUpSwiGLU.apply(*x_ND, gate_up))


class _RotatedProduct(torch.autograd.Function):
    """Saves what `rope_keys` does: positions, frequencies and the way back to packed rows."""

    @staticmethod
    def forward(ctx, stand_in_ND, bits_ND, scale_N, qkv, outputs, positions_N, inv_freq_h, heads, scale, options):
        ctx.set_materialize_grads(False)
        qkv_NE = qkv.product_of_fp8(bits_ND, scale_N, outputs, stand_in_ND.dtype)
        before, live_keys = len(qkv_NE) - len(stand_in_ND), options.pop("live_keys", None)
        every = (qkv_NE, live_keys) if before else None
        found = rope_keys(qkv_NE[before:], positions_N, inv_freq_h, *heads, scale=scale, every=every, **options)
        ctx.twice, shapes = options.get("twice"), [x.shape for x in found]
        ctx.settings = qkv, outputs, scale, shapes
        way_back = options["way_back"]
        ctx.save_for_backward(
            positions_N[before:], inv_freq_h, *((way_back.starts_N1, way_back.places) if way_back else ())
        )
        ctx.mark_non_differentiable(qkv_NE, *found[3 if ctx.twice is None else 6 :])
        return qkv_NE, *found

    @staticmethod
    @once_differentiable
    def backward(ctx, _, *grads):
        positions_N, inv_freq_h, *way_back = ctx.saved_tensors
        qkv, outputs, scale, shapes = ctx.settings
        grad_k_MKd = grads[1]  # nobody may have wanted the queries, of which there may be none
        grads = made_for(shapes, grads[: 3 if ctx.twice is None else 6], grad_k_MKd)
        options = {"scale": scale, "way_back": tuple(way_back) or None, "more": second_part(grads, ctx.twice)}
        rows = rope_keys_backward_fp8(*grads[:3], positions_N, inv_freq_h, **options)
        return qkv.gradient_of_fp8(*rows, outputs, grad_k_MKd.dtype), *[None] * 9


class Fp8Product(NamedTuple):
    """The product of `qkv` that is yet to be made, by the operation that also rotates it.

    Attributes:
        x_ND: rows [N, D].
        qkv: the matrix of queries, keys and values.
        outputs: the product's columns.
    """

    x_ND: Fp8Rows
    qkv: Fp8Linear
    outputs: slice = slice(None)

    def rope_keys(
        self, positions_N: Tensor, inv_freq_h: Tensor, *heads: int, scale: float, **options: Any
    ) -> tuple[Tensor, ...]:
        """(product [N, E] without gradient, and, to the bit, `rope_keys` of it), whose gradient goes back in e4m3.

        If the stand-in of x has fewer rows, others stand before: then `options` say "live_keys", as `rope_keys` does.
        """
        return _RotatedProduct.apply(*self.x_ND, self.qkv, self.outputs, positions_N, inv_freq_h, heads, scale, options)
