"""Residual addition and RMSNorm in one operation.

Dimensions: N rows, D channels, G groups of consecutive rows.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .dispatch import launch, use_triton
from .plain import last_rows, wide
from .quantize_fp8 import BackInFp8, Fp8Rows, divided, magnitude, quantize_fp8, quantize_fp8_reference, scale_of


def add_rms_norm_reference(
    residual_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in plain differentiable torch."""
    if branch_ND is not None:
        residual_ND = (residual_ND + branch_ND).to(residual_ND.dtype)
    x_ND = wide(residual_ND)
    y_ND = x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps) * wide(weight_D)
    return residual_ND, y_ND.to(dtype)


def add_rms_norm_fp8_reference(
    residual_ND: Tensor, branch_ND: Tensor | None, weight_D: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Fp8Rows]:
    """`add_rms_norm_fp8` in plain differentiable torch."""
    total_ND, y_ND = add_rms_norm_reference(residual_ND, branch_ND, weight_D, eps, dtype)
    return total_ND, Fp8Rows(y_ND, *quantize_fp8_reference(y_ND.detach()))


def _tiles(D, summed=False):
    """Columns of a tile, which holds a whole row, and warps: 16 columns a thread, 8 where their sums are kept as
    well."""
    BLOCK_D = triton.next_power_of_2(max(D, 32))
    return BLOCK_D, min(max(BLOCK_D // 256, 1), 32) if summed else min(max(BLOCK_D // 512, 1), 16)


def _group_rows(N, warps):
    """Rows whose weight gradients one program adds up, so that all programs run at once.

    32 warps of up to 64 registers a thread fill one of a Hopper GPU's 132 multiprocessors. A second wave would only add
    partial sums, which are written and read again. At least four rows, so that small inputs have few of them too.
    """
    return max(triton.cdiv(N, 132 * max(32 // warps, 1)), 4)


@triton.jit
def _add_rms_norm_fwd_kernel(
    residual_ptr,
    branch_ptr,
    weight_ptr,
    total_ptr,
    y_ptr,
    bits_ptr,
    scale_ptr,
    rstd_ptr,
    D,
    eps,
    ADD: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row a program; with FP8 rows go out in e4m3, and `y_ptr` only says what dtype they are rounded to before."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    if FP8:  # in the layout of 16-bit rows, so that the mean is summed in the same order
        columns = tl.max_contiguous(columns, 8)
    inside = columns < D
    x = tl.load(residual_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        branch = tl.load(branch_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        total = (x + branch).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row * D + columns, total, mask=inside)
        x = total.to(tl.float32)  # the norm is that of the rounded sum, which backward reads
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x) / D + eps)
    tl.store(rstd_ptr + row, rstd)
    y = (x * rstd * weight).to(y_ptr.dtype.element_ty)
    if FP8:
        y = y.to(tl.float32)
        scale = scale_of(tl.max(magnitude(y), 0))
        tl.store(scale_ptr + row, scale)
        tl.store(bits_ptr + row * D + columns, divided(y, scale), mask=inside)
    else:
        tl.store(y_ptr + row * D + columns, y, mask=inside)


@triton.jit(do_not_specialize=["N", "group_rows"], do_not_specialize_on_alignment=["rstd_ptr"])
def _add_rms_norm_bwd_kernel(
    total_ptr,
    rstd_ptr,
    weight_ptr,
    grad_total_ptr,
    grad_y_ptr,
    grad_residual_ptr,
    grad_branch_ptr,
    bits_ptr,
    scale_ptr,
    partial_ptr,
    N,
    D,
    group_rows,
    GRAD_TOTAL: tl.constexpr,
    GRAD_BRANCH: tl.constexpr,
    FP8: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A group of rows a program. With FP8 the branch's gradient goes out in e4m3, as rows do from the kernel above."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
    if FP8:
        columns = tl.max_contiguous(columns, 8)
    inside = columns < D
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if GRAD_WEIGHT:
        grad_weight = tl.zeros([BLOCK_D], tl.float32)
    first, last = group, group + 1
    if GRAD_WEIGHT:
        first = group * group_rows
        last = tl.minimum(first + group_rows, N)
    for row in tl.range(first, last, num_stages=3 if GRAD_WEIGHT else 1):
        unit = tl.load(total_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        grad_y = tl.load(grad_y_ptr + row * D + columns, mask=inside, other=0.0).to(tl.float32)
        if GRAD_TOTAL:  # under way while the row's mean is formed
            grad_total = tl.load(grad_total_ptr + row * D + columns, mask=inside, other=0.0)
        rstd = tl.load(rstd_ptr + row)
        unit *= rstd
        if GRAD_WEIGHT:
            grad_weight += grad_y * unit
        grad = grad_y * weight
        grad = rstd * (grad - unit * (tl.sum(grad * unit) / D))
        if GRAD_TOTAL:
            grad += grad_total.to(tl.float32)
        tl.store(grad_residual_ptr + row * D + columns, grad.to(grad_residual_ptr.dtype.element_ty), mask=inside)
        if FP8:
            branch = grad.to(grad_branch_ptr.dtype.element_ty).to(tl.float32)
            scale = scale_of(tl.max(magnitude(branch), 0))
            tl.store(scale_ptr + row, scale)
            tl.store(bits_ptr + row * D + columns, divided(branch, scale), mask=inside)
        elif GRAD_BRANCH:
            tl.store(grad_branch_ptr + row * D + columns, grad.to(grad_branch_ptr.dtype.element_ty), mask=inside)
    if GRAD_WEIGHT:
        tl.store(partial_ptr + group * D + columns, grad_weight, mask=inside)


@triton.jit(do_not_specialize=["G"])
def _add_rms_norm_finish_kernel(partial_ptr, grad_weight_ptr, G, D, BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr):
    """The groups' sums of a block of channels, added up in a fixed order."""
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    total = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    for first in tl.range(0, G, BLOCK_G, loop_unroll_factor=2):  # loads under way together
        groups = first + tl.arange(0, BLOCK_G)
        total += tl.load(
            partial_ptr + groups[:, None] * D + columns[None, :],
            mask=(groups < G)[:, None] & inside[None, :],
            other=0.0,
        )
    tl.store(grad_weight_ptr + columns, tl.sum(total, 0).to(grad_weight_ptr.dtype.element_ty), mask=inside)


def _forward_by_kernel(residual_ND, branch_ND, weight_D, eps, dtype, fp8=False):
    """Sum, normalised sum (`Fp8Rows` with `fp8`) and reciprocal of the root mean square, [N] fp32, by the kernel."""
    N, D = residual_ND.shape
    residual_ND = residual_ND.contiguous()
    add = branch_ND is not None
    total_ND = torch.empty_like(residual_ND) if add else residual_ND
    rstd_N = residual_ND.new_empty(N, dtype=torch.float32)
    if fp8:
        y = Fp8Rows.empty(residual_ND, N, D, dtype)
        pointers = y.stand_in_ND, y.bits_ND.view(torch.uint8), y.scale_N
    else:
        y = residual_ND.new_empty(N, D, dtype=dtype)
        pointers = y, rstd_N, rstd_N
    BLOCK_D, num_warps = _tiles(D)
    launch(
        _add_rms_norm_fwd_kernel,
        (N,),
        residual_ND,
        branch_ND.contiguous() if add else residual_ND,
        weight_D.contiguous(),
        total_ND,
        *pointers,
        rstd_N,
        D,
        eps,
        add,
        fp8,
        BLOCK_D,
        num_warps=num_warps,
    )
    return total_ND, y, rstd_N


def _backward_by_kernel(total_ND, rstd_N, weight_D, grad_total_ND, grad_y_ND, branch_dtype, trained, fp8=False):
    """Gradients of residual, branch (`Fp8Rows` with `fp8`) and weight by the kernel; None where none is due."""
    N, D = total_ND.shape
    total_ND = total_ND.contiguous()
    grad_ND = torch.empty_like(total_ND)
    apart = branch_dtype is not None and branch_dtype != total_ND.dtype
    if fp8:
        assert branch_dtype is not None, "the gradient is a branch's"
        grad_branch = Fp8Rows.empty(total_ND, N, D, branch_dtype)
        pointers = grad_branch.stand_in_ND, grad_branch.bits_ND.view(torch.uint8), grad_branch.scale_N
    else:
        grad_branch = torch.empty_like(total_ND, dtype=branch_dtype) if apart else grad_ND
        pointers = grad_branch, grad_ND, grad_ND  # of which nothing is read or written
    BLOCK_D, num_warps = _tiles(D, trained)
    group_rows = _group_rows(N, num_warps) if trained else 1
    groups = triton.cdiv(N, group_rows)
    partial_GD = total_ND.new_empty(groups, D, dtype=torch.float32) if trained else grad_ND
    launch(
        _add_rms_norm_bwd_kernel,
        (groups,),
        total_ND,
        rstd_N,
        weight_D.contiguous(),
        grad_ND if grad_total_ND is None else grad_total_ND.contiguous(),
        grad_y_ND.contiguous(),
        grad_ND,
        *pointers,
        partial_GD,
        N,
        D,
        group_rows,
        grad_total_ND is not None,
        apart,
        fp8,
        trained,
        BLOCK_D,
        num_warps=num_warps,
    )
    grad_weight_D = None
    if trained:  # a cache line of channels a program, so that one multiprocessor each has work
        grad_weight_D = torch.empty_like(weight_D, memory_format=torch.contiguous_format)
        launch(
            _add_rms_norm_finish_kernel,
            (triton.cdiv(D, 32),),
            partial_GD,
            grad_weight_D,
            groups,
            D,
            BLOCK_G=128,
            BLOCK_D=32,
            num_warps=8,
        )
    return grad_ND, None if branch_dtype is None else grad_branch, grad_weight_D


_KERNELS = _forward_by_kernel, _backward_by_kernel
_FP8_KERNELS = partial(_forward_by_kernel, fp8=True), _backward_by_kernel


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum and one fp32 number per row; the weight's gradient is computed only where it is due.

    Of rows in e4m3 the stand-in's gradient is theirs. Of a branch whose gradient goes back so, its stand-ins get it.
    """

    @staticmethod
    def forward(ctx, residual_ND, branch_ND, weight_D, eps, dtype, passes, every, *stand_ins):
        forward, ctx.backward_pass = passes
        ctx.branch_dtype = None if branch_ND is None else branch_ND.dtype
        ctx.back_in_fp8 = bool(stand_ins)
        ctx.set_materialize_grads(False)
        live = len(residual_ND)
        total_ND, y, rstd = forward(*(every or (residual_ND, branch_ND)), weight_D, eps, dtype)
        first = len(total_ND) - live
        ctx.save_for_backward(total_ND[first:], rstd[first:], weight_D)
        if isinstance(y, Fp8Rows):
            ctx.mark_non_differentiable(y.bits_ND, y.scale_N, *([] if every is None else [total_ND]))
            if every is None:
                return total_ND, *y
            stand_in_LD = Fp8Rows.stand_in(residual_ND, (live, y.bits_ND.shape[1]), dtype)
            return last_rows(total_ND, live), stand_in_LD, *y[1:], total_ND
        if every is None:
            return total_ND, y
        ctx.mark_non_differentiable(total_ND, y)
        return last_rows(total_ND, live), last_rows(y, live), total_ND, y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total_ND, grad_y_ND, *_):
        total_ND, rstd, weight_D = ctx.saved_tensors
        settings, options = (None,) * 4, {"fp8": True} if ctx.back_in_fp8 else {}
        if grad_y_ND is not None:
            given = total_ND, rstd, weight_D, grad_total_ND, grad_y_ND, ctx.branch_dtype, ctx.needs_input_grad[2]
            grad_ND, grad_branch, grad_weight_D = ctx.backward_pass(*given, **options)
        else:
            grad_ND, grad_branch, grad_weight_D = grad_total_ND, None, None
            if grad_ND is not None and ctx.branch_dtype is not None:
                grad_branch = grad_ND.to(ctx.branch_dtype)
                if ctx.back_in_fp8:
                    grad_branch = Fp8Rows(grad_branch, *quantize_fp8(grad_branch))
        if not ctx.back_in_fp8:
            return grad_ND, grad_branch, grad_weight_D, *settings
        return grad_ND, None, grad_weight_D, *settings, *((None, None) if grad_branch is None else grad_branch[1:])


def _given(branch):
    """(The branch's rows or None; the stand-ins of a branch whose gradient goes back in e4m3.)"""
    return (branch.rows_ND, tuple(branch[1:])) if isinstance(branch, BackInFp8) else (branch, ())


def _plain(branch):
    return branch.plain() if isinstance(branch, BackInFp8) else branch


def _check_shapes(name, residual_ND, branch_ND, weight_D):
    """The tensors among them, which have values."""
    tensors = [x for x in (residual_ND, branch_ND, weight_D) if x is not None]
    N, D = residual_ND.shape
    if any(x.shape != (N, D) for x in tensors[:-1]) or weight_D.shape != (D,):
        raise ValueError(
            f"{name}: residual and branch must be [N, D], the weight [D], found {[list(x.shape) for x in tensors]}"
        )
    return tensors


def add_rms_norm(
    residual_ND: Tensor,
    branch_ND: Tensor | BackInFp8 | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    every: tuple[Tensor, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Add a branch to the residual stream and normalise the sum (RMSNorm, arXiv:1910.07467).

    Args:
        residual_ND: [N, D] residual stream, fp32, bf16 or fp16.
        branch_ND: what a block adds to it, in any of these dtypes; None adds nothing. The gradient of `BackInFp8`,
            rounded to the rows' dtype, is quantised as `quantize_fp8` does before it leaves the kernel.
        weight_D: gain, in any of these dtypes. Its gradient is computed only if it requires one.
        eps: added to the mean square.
        dtype: of the normalised rows.
        every: residual and branch with rows before those given, which get no gradient. One pass takes all.
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`add_rms_norm_reference`).

    Returns:
        (sum in the residual's dtype, normalised sum in `dtype`), and, with `every`, both of all its rows without
        gradient. Sums of squares and products are fp32, rounded once. Saved for backward: the sum, and [N] fp32.
        Repeatable: the weight's gradient is the sum of one partial sum for every group of rows, in a fixed order.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown or cannot run here.
    """
    rows_ND, stand_ins = _given(branch_ND)
    tensors = _check_shapes("add_rms_norm", residual_ND, rows_ND, weight_D)
    in_triton = use_triton(impl, *tensors, name="add_rms_norm")
    if impl == "reference":
        found = add_rms_norm_reference(residual_ND, _plain(branch_ND), weight_D, eps, dtype)
        if every is None:
            return found
        return *found, *_without_gradient(add_rms_norm_reference, every, weight_D, eps, dtype)
    if in_triton:
        return _AddRMSNorm.apply(residual_ND, rows_ND, weight_D, eps, dtype, _KERNELS, every, *stand_ins)
    return _AddRMSNorm.apply(residual_ND, _plain(branch_ND), weight_D, eps, dtype, cpu.ADD_RMS_NORM, every)


@torch.no_grad()
def _without_gradient(reference, every, *others):
    return reference(*every, *others)


def add_rms_norm_fp8(
    residual_ND: Tensor,
    branch_ND: Tensor | BackInFp8 | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    every: tuple[Tensor, Tensor | None] | None = None,
    impl: str = "auto",
) -> tuple[Any, ...]:
    """`add_rms_norm` whose normalised rows, rounded to `dtype`, are quantised as `quantize_fp8` does before they leave.

    Args:
        impl: "auto" (Triton on CUDA tensors, else torch), "triton" or "reference" (plain torch).
        (others: as for `add_rms_norm`.)

    Returns:
        (sum, `Fp8Rows` of the normalised sum); with `every`, also the sum of all its rows without gradient: bits and
        scales are those of all rows, the stand-in is that of the given ones. Bits, scales, what is saved, and gradients
        are those of the two operations one after the other; the gradient of the rows is what reaches their stand-in, in
        `dtype`.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown or cannot run here.
    """
    rows_ND, stand_ins = _given(branch_ND)
    tensors = _check_shapes("add_rms_norm_fp8", residual_ND, rows_ND, weight_D)
    if not use_triton(impl, *tensors, name="add_rms_norm_fp8"):
        found = add_rms_norm_fp8_reference(residual_ND, _plain(branch_ND), weight_D, eps, dtype)
        if every is None:
            return found
        total_ND, rows = found
        every_ND, more = _without_gradient(add_rms_norm_fp8_reference, every, weight_D, eps, dtype)
        return total_ND, Fp8Rows(rows.stand_in_ND, *more[1:]), every_ND
    total_ND, *rows = _AddRMSNorm.apply(residual_ND, rows_ND, weight_D, eps, dtype, _FP8_KERNELS, every, *stand_ins)
    return total_ND, Fp8Rows(*rows[:3]), *rows[3:]


__all__ = ["add_rms_norm", "add_rms_norm_fp8", "add_rms_norm_fp8_reference", "add_rms_norm_reference"]
