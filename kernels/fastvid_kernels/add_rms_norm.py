"""Residual addition and RMSNorm in one operation.

Dimensions: N rows, D channels, G groups of consecutive rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import avx512_rows
from .dispatch import choose, launch, use_triton
from .quantize_fp8 import Fp8Rows, divided, magnitude, quantize_fp8_reference, scale_of
from .row_blocks import over_rows, row_blocks


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_rms_norm_reference(residual_ND, branch_ND, weight_D, eps, dtype):
    """`add_rms_norm` in plain differentiable torch."""
    if branch_ND is not None:
        residual_ND = (residual_ND + branch_ND).to(residual_ND.dtype)
    x_ND = _wide(residual_ND)
    y_ND = x_ND * torch.rsqrt(x_ND.square().mean(-1, keepdim=True) + eps) * _wide(weight_D)
    return residual_ND, y_ND.to(dtype)


def add_rms_norm_fp8_reference(residual_ND, branch_ND, weight_D, eps, dtype):
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


@triton.jit(do_not_specialize=["N", "group_rows"])
def _add_rms_norm_bwd_kernel(
    total_ptr,
    rstd_ptr,
    weight_ptr,
    grad_total_ptr,
    grad_y_ptr,
    grad_residual_ptr,
    grad_branch_ptr,
    partial_ptr,
    N,
    D,
    group_rows,
    GRAD_TOTAL: tl.constexpr,
    GRAD_BRANCH: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK_D)
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
        if GRAD_BRANCH:
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


def _backward_by_kernel(total_ND, rstd_N, weight_D, grad_total_ND, grad_y_ND, branch_dtype, trained):
    """Gradients of residual, branch and weight by the kernel; None where none is due."""
    N, D = total_ND.shape
    total_ND = total_ND.contiguous()
    grad_ND = torch.empty_like(total_ND)
    apart = branch_dtype is not None and branch_dtype != total_ND.dtype
    grad_branch_ND = torch.empty_like(total_ND, dtype=branch_dtype) if apart else grad_ND
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
        grad_branch_ND,
        partial_GD,
        N,
        D,
        group_rows,
        grad_total_ND is not None,
        apart,
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
    return grad_ND, None if branch_dtype is None else grad_branch_ND, grad_weight_D


def _forward_on_cpu(residual_ND, branch_ND, weight_D, eps, dtype, implementation):
    """The same in C++ or plain torch; the reciprocal is [N, 1]."""
    N, D = residual_ND.shape
    if implementation == "avx512":
        residual_ND, branch_ND = residual_ND.contiguous(), None if branch_ND is None else branch_ND.contiguous()
    total_ND = residual_ND if branch_ND is None else residual_ND.new_empty(N, D)
    y_ND = residual_ND.new_empty(N, D, dtype=dtype)
    rstd_N1 = residual_ND.new_empty(N, 1, dtype=torch.promote_types(residual_ND.dtype, torch.float32))
    if implementation == "avx512":
        avx512_rows.norm_forward(residual_ND, branch_ND, _wide(weight_D).contiguous(), total_ND, y_ND, rstd_N1, eps)
    else:
        _normalise_rows(y_ND, residual_ND, branch_ND, total_ND, rstd_N1, weight_D=_wide(weight_D), eps=eps)
    return total_ND, y_ND, rstd_N1


@over_rows
def _normalise_rows(y_nD, residual_nD, branch_nD, total_nD, rstd_n1, *, weight_D, eps):
    if branch_nD is not None:
        residual_nD = total_nD.copy_(residual_nD + branch_nD)
    x_nD = _wide(residual_nD)
    inverse_n1 = torch.linalg.vector_norm(x_nD, dim=1, keepdim=True).square_().div_(x_nD.shape[1]).add_(eps).rsqrt_()
    rstd_n1.copy_(inverse_n1)
    y_nD.copy_((x_nD * inverse_n1).mul_(weight_D))


def _backward_on_cpu(total_ND, rstd_N1, weight_D, grad_total_ND, grad_y_ND, branch_dtype, trained, implementation):
    """The same in C++ or plain torch."""
    grad_ND = torch.empty_like(total_ND, memory_format=torch.contiguous_format)
    apart = branch_dtype is not None and branch_dtype != total_ND.dtype
    grad_branch_ND = torch.empty_like(grad_ND, dtype=branch_dtype) if apart else None
    wide_D = _wide(weight_D)
    grad_weight_D = torch.zeros_like(wide_D) if trained else None
    if implementation == "avx512":
        total_ND, grad_y_ND = total_ND.contiguous(), grad_y_ND.contiguous()
        grad_total_ND = None if grad_total_ND is None else grad_total_ND.contiguous()
        avx512_rows.norm_backward(total_ND, rstd_N1, wide_D.contiguous(), grad_total_ND, grad_y_ND, grad_ND)
    else:
        _backward_rows(grad_ND, total_ND, rstd_N1, grad_total_ND, grad_y_ND, grad_branch_ND, weight_D=wide_D)
    for rows in row_blocks(*total_ND.shape) if trained else ():
        grad_weight_D += torch.mv((_wide(grad_y_ND[rows]) * total_ND[rows]).T, rstd_N1[rows, 0])
    return (
        grad_ND,
        None if branch_dtype is None else grad_branch_ND if apart else grad_ND,
        grad_weight_D.to(weight_D.dtype) if trained else None,
    )


@over_rows
def _backward_rows(grad_out_nD, total_nD, rstd_n1, grad_total_nD, grad_y_nD, grad_branch_nD, *, weight_D):
    x_nD = _wide(total_nD)
    grad_nD = _wide(grad_y_nD) * weight_D
    along_n1 = torch.sum(grad_nD * x_nD, 1, keepdim=True).mul_(rstd_n1.pow(3)).div_(x_nD.shape[1])
    grad_nD = grad_nD.mul_(rstd_n1).addcmul_(x_nD, along_n1, value=-1)
    if grad_total_nD is not None:
        grad_nD += grad_total_nD
    grad_out_nD.copy_(grad_nD)
    if grad_branch_nD is not None:
        grad_branch_nD.copy_(grad_nD)


class _AddRMSNorm(torch.autograd.Function):
    """Saves the sum and one fp32 number per row; the weight's gradient is computed only where it is due."""

    @staticmethod
    def forward(ctx, residual_ND, branch_ND, weight_D, eps, dtype, implementation):
        ctx.implementation = implementation
        ctx.branch_dtype = None if branch_ND is None else branch_ND.dtype
        ctx.set_materialize_grads(False)
        if implementation == "triton":
            total_ND, y_ND, rstd = _forward_by_kernel(residual_ND, branch_ND, weight_D, eps, dtype)
        else:
            total_ND, y_ND, rstd = _forward_on_cpu(residual_ND, branch_ND, weight_D, eps, dtype, implementation)
        ctx.save_for_backward(total_ND, rstd, weight_D)
        return total_ND, y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total_ND, grad_y_ND):
        total_ND, rstd, weight_D = ctx.saved_tensors
        if grad_y_ND is None:
            grad_branch_ND = None
            if grad_total_ND is not None and ctx.branch_dtype is not None:
                grad_branch_ND = grad_total_ND.to(ctx.branch_dtype)
            return grad_total_ND, grad_branch_ND, None, None, None, None
        given = total_ND, rstd, weight_D, grad_total_ND, grad_y_ND, ctx.branch_dtype, ctx.needs_input_grad[2]
        if ctx.implementation == "triton":
            return *_backward_by_kernel(*given), None, None, None
        return *_backward_on_cpu(*given, ctx.implementation), None, None, None


class _AddRMSNormFp8(_AddRMSNorm):
    """The same by the kernel, whose rows are quantised; the stand-in's gradient is theirs."""

    @staticmethod
    def forward(ctx, residual_ND, branch_ND, weight_D, eps, dtype):
        ctx.implementation = "triton"
        ctx.branch_dtype = None if branch_ND is None else branch_ND.dtype
        ctx.set_materialize_grads(False)
        total_ND, rows, rstd_N = _forward_by_kernel(residual_ND, branch_ND, weight_D, eps, dtype, fp8=True)
        ctx.save_for_backward(total_ND, rstd_N, weight_D)
        ctx.mark_non_differentiable(rows.bits_ND, rows.scale_N)
        return total_ND, *rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total_ND, grad_y_ND, *_):
        return _AddRMSNorm.backward(ctx, grad_total_ND, grad_y_ND)[:-1]


def _check_shapes(name, residual_ND, branch_ND, weight_D):
    """The tensors among them."""
    tensors = [x for x in (residual_ND, branch_ND, weight_D) if x is not None]
    N, D = residual_ND.shape
    if any(x.shape != (N, D) for x in tensors[:-1]) or weight_D.shape != (D,):
        raise ValueError(
            f"{name}: residual and branch must be [N, D], the weight [D], found {[list(x.shape) for x in tensors]}"
        )
    return tensors


def add_rms_norm(
    residual_ND: Tensor,
    branch_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum (RMSNorm, arXiv:1910.07467).

    Args:
        residual_ND: [N, D] residual stream, fp32, bf16 or fp16.
        branch_ND: what a block adds to it, in any of these dtypes; None adds nothing.
        weight_D: gain, in any of these dtypes. Its gradient is computed only if it requires one.
        eps: added to the mean square.
        dtype: of the normalised rows.
        impl: "auto" (Triton on CUDA tensors, C++ for bf16 on CPUs with AVX512-BF16, else torch), "triton", "avx512" or
            "reference" (plain torch).

    Returns:
        (sum in the residual's dtype, normalised sum in `dtype`). Sums of squares and products are fp32, rounded once.
        Saved for backward: the sum, and [N] fp32. Repeatable: the weight's gradient is the sum of one partial sum for
        every group of rows, in a fixed order.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown or cannot run here.
    """
    tensors = _check_shapes("add_rms_norm", residual_ND, branch_ND, weight_D)
    implementation = choose(impl, *tensors, name="add_rms_norm", dtypes=[dtype, *(x.dtype for x in tensors[:-1])])
    return _AddRMSNorm.apply(residual_ND, branch_ND, weight_D, eps, dtype, implementation)


def add_rms_norm_fp8(
    residual_ND: Tensor,
    branch_ND: Tensor | None,
    weight_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> tuple[Tensor, Fp8Rows]:
    """`add_rms_norm` whose normalised rows, rounded to `dtype`, are quantised as `quantize_fp8` does before they leave.

    Args:
        impl: "auto" (Triton on CUDA tensors, else torch), "triton" or "reference" (plain torch).
        (others: as for `add_rms_norm`.)

    Returns:
        (sum, `Fp8Rows` of the normalised sum). Bits, scales, what is saved, and gradients are those of the two
        operations one after the other; the gradient of the rows is what reaches their stand-in, in `dtype`.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown or cannot run here.
    """
    tensors = _check_shapes("add_rms_norm_fp8", residual_ND, branch_ND, weight_D)
    if not use_triton(impl, *tensors, name="add_rms_norm_fp8"):
        return add_rms_norm_fp8_reference(residual_ND, branch_ND, weight_D, eps, dtype)
    total_ND, *rows = _AddRMSNormFp8.apply(residual_ND, branch_ND, weight_D, eps, dtype)
    return total_ND, Fp8Rows(*rows)


__all__ = ["add_rms_norm", "add_rms_norm_fp8", "add_rms_norm_fp8_reference", "add_rms_norm_reference"]
