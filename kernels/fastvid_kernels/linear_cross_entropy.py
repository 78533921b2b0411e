"""Head and cross-entropy in one operation, on supervised rows only.

Dimensions: L supervised rows, l rows of a chunk, D channels, V tokens of the vocabulary, W of a padded row of logits.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .dispatch import launch, on_gpu, use_triton
from .plain import wide

# Logits that exist at once: 64 MiB in bf16.
CHUNK_LOGITS = 2**25
ROW = 64  # rows of logits are multiples of this many


def linear_cross_entropy_reference(h_LD: Tensor, weight_VD: Tensor, targets_L: Tensor) -> tuple[Tensor, Tensor]:
    """`linear_cross_entropy` in plain differentiable torch: holds [L, V]."""
    logits_LV = wide(h_LD @ weight_VD.to(h_LD.dtype).T)
    lse_L = logits_LV.logsumexp(-1)
    return (lse_L - logits_LV.gather(1, targets_L[:, None])[:, 0]).sum(), lse_L.detach()


def chunk_rows(vocab_size: int) -> int:
    """Rows whose logits exist at once: whole tiles of a matrix product, where there is more than one."""
    rows = max(1, CHUNK_LOGITS // vocab_size)
    return rows if rows < 128 else rows // 128 * 128


def _tiles(vocab_size):
    """(tokens of a tile, warps): 16 values per thread, and several rows in flight on a multiprocessor."""
    block = min(triton.next_power_of_2(vocab_size), 4096)
    return block, max(1, block // 512)


@triton.jit(do_not_specialize_on_alignment=["targets_ptr", "lse_ptr", "losses_ptr"])
def _softmax_gradient_kernel(
    logits_ptr, targets_ptr, lse_ptr, losses_ptr, vocab_size, row_stride, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of logits a program: log-sum-exp and loss out, the logits replaced by their gradient.

    The second reading of a row hits the caches, so that memory sees one read and one write.
    """
    row = tl.program_id(0).to(tl.int64)
    wide = lse_ptr.dtype.element_ty
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row)
    target_logit = tl.load(logits_ptr + target).to(wide)
    top = tl.full((), float("-inf"), wide)
    total = tl.zeros((), wide)
    # Masks end with the padded row: constant over 16 bytes, as wide loads and stores need it.
    for start in range(0, vocab_size, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = tl.load(logits_ptr + tokens, mask=tokens < row_stride, other=0.0).to(wide)
        x = tl.where(tokens < vocab_size, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, 0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
        top = higher
    lse = tl.log(total) + top
    tl.store(lse_ptr + row, lse)
    tl.store(losses_ptr + row, lse - target_logit)
    if GRADIENT:
        scale = 1 / total
        for start in range(0, vocab_size, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + tokens, mask=tokens < row_stride, other=0.0).to(wide)
            p = tl.exp(x - top) * scale
            p = tl.where(tokens == target, p - 1, p)
            p = tl.where(tokens < vocab_size, p, 0.0)
            tl.store(logits_ptr + tokens, p.to(logits_ptr.dtype.element_ty), mask=tokens < row_stride)


def _softmax_gradient_triton(logits_lV, targets_l, lse_l, losses_l, gradient):
    block, warps = _tiles(logits_lV.shape[1])
    launch(
        _softmax_gradient_kernel,
        (logits_lV.shape[0],),
        logits_lV,
        targets_l,
        lse_l,
        losses_l,
        logits_lV.shape[1],
        logits_lV.stride(0),
        GRADIENT=gradient,
        BLOCK=block,
        num_warps=warps,
    )


def _padded(weight_VD, width, dtype):
    """The head in `dtype` with rows of zeros up to `width`: on a GPU, products of an odd number of tokens take several
    times as long as those of the next multiple of 64."""
    vocab_size = len(weight_VD)
    if vocab_size == width:
        return weight_VD.to(dtype)
    matrix_WD = weight_VD.new_empty(width, weight_VD.shape[1], dtype=dtype)
    matrix_WD[:vocab_size] = weight_VD
    matrix_WD[vocab_size:] = 0
    return matrix_WD


def _add_product(total_vD, grad_lv, h_lD):
    """total += gradᵀ·h in the total's dtype: the product of bf16 factors has fp32 sums, and they are not rounded to
    bf16."""
    if on_gpu(total_vD) and total_vD.dtype != h_lD.dtype:
        torch.addmm(total_vD, grad_lv.T, h_lD, out_dtype=total_vD.dtype, out=total_vD)
    else:  # torch's products on a CPU return their factors' dtype
        torch.addmm(total_vD, wide(grad_lv).T, wide(h_lD), out=total_vD)


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the logits at hand, chunk by chunk, and saved instead of them."""

    @staticmethod
    def forward(ctx, h_LD, weight_VD, targets_L, in_triton):
        rows_due, weight_due = ctx.needs_input_grad[:2]
        (rows, channels), vocab_size = h_LD.shape, weight_VD.shape[0]
        wide_dtype = torch.promote_types(h_LD.dtype, torch.float32)
        # Rows of logits begin on cache lines, whatever V: matrix products and wide loads need aligned rows.
        width = triton.cdiv(vocab_size, ROW) * ROW
        buffer_lW = h_LD.new_empty(min(rows, chunk_rows(vocab_size)), width)
        if in_triton:
            matrix_UD, softmax_gradient = _padded(weight_VD, width, h_LD.dtype), _softmax_gradient_triton
        else:
            matrix_UD, softmax_gradient = weight_VD.to(h_LD.dtype), cpu.softmax_gradient
            buffer_lW[:, vocab_size:] = 0  # oneDNN's products for AMX multiply it by 0, and NaN · 0 is NaN
        used = matrix_UD.shape[0]
        grad_h_LD = h_LD.new_empty(rows, channels) if rows_due else None
        grad_weight_UD = torch.zeros_like(matrix_UD, dtype=wide_dtype) if weight_due else None
        lse_L, losses_L = (h_LD.new_empty(rows, dtype=wide_dtype) for _ in range(2))
        size = len(buffer_lW)
        for start in range(0, rows, max(1, size)):
            chunk = slice(start, start + size)
            h_lD = h_LD[chunk]
            logits_lU = buffer_lW[: h_lD.shape[0], :used]
            torch.mm(h_lD, matrix_UD.T, out=logits_lU)
            softmax_gradient(
                logits_lU[:, :vocab_size], targets_L[chunk], lse_L[chunk], losses_L[chunk], rows_due or weight_due
            )
            if grad_h_LD is not None:
                torch.mm(logits_lU, matrix_UD, out=grad_h_LD[chunk])
            if grad_weight_UD is not None:
                for part_uD, grad_lu in zip(grad_weight_UD.split(2**13), logits_lU.split(2**13, dim=1)):
                    _add_product(part_uD, grad_lu, h_lD)
        grad_weight_VD = None if grad_weight_UD is None else grad_weight_UD[:vocab_size]
        ctx.save_for_backward(grad_h_LD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(lse_L)
        return losses_L.sum(), lse_L

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_h_LD, grad_weight_VD = ctx.saved_tensors
        if grad_h_LD is not None:  # in fp32: a scale rounded to bf16 would shift every gradient alike
            grad_h_LD = (wide(grad_h_LD) * grad).to(grad_h_LD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_h_LD, grad_weight_VD, None, None


def linear_cross_entropy(
    h_LD: Tensor, weight_VD: Tensor, targets_L: Tensor, *, impl: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the head's logits, summed over rows; [L, V] never exists at once.

    Args:
        h_LD: supervised rows after the final norm, in the compute dtype.
        weight_VD: head, in any dtype; cast to the rows' for the product. Its gradient is computed only if due.
        targets_L: [L] int64, each in 0…V−1. That is not checked, since the host would have to wait for the GPU; a
            target outside (-100 too: leave such rows out) reads memory that is not the logits'.
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`linear_cross_entropy_reference`).
            Matrix products are torch's everywhere; the kernel is what lies between them: one read of a chunk's logits
            and one write, over them, of their gradient.

    Returns:
        (sum of -log p(target), fp32 scalar; log-sum-exp of each row's logits, [L] fp32, without gradient). Logits are
        rounded to the compute dtype as a linear layer rounds them; all after that is fp32. For L = 0 the sum is 0 and
        gradients are zeros. Saved for backward: the gradients due, of the rows and of the head (fp32); with a frozen
        head in bf16, what exists besides is a chunk of logits, 64 MiB, and by the kernel a padded copy of the head
        where V is no multiple of 64. Repeatable.

    Raises:
        ValueError: shapes or the targets' dtype do not fit, or `impl` is not available here.

    The idea of computing the gradient in the forward pass, over the logits, is Liger-Kernel's (arXiv:2410.10989).
    """
    L, D = h_LD.shape
    if weight_VD.shape[1:] != (D,) or targets_L.shape != (L,) or targets_L.dtype != torch.int64:
        raise ValueError(
            f"linear_cross_entropy: rows {list(h_LD.shape)}, head {list(weight_VD.shape)} and targets "
            f"{list(targets_L.shape)} {targets_L.dtype} must be [L, D], [V, D] and [L] torch.int64"
        )
    in_triton = use_triton(impl, h_LD, weight_VD, targets_L, name="linear_cross_entropy")
    if impl == "reference":
        return linear_cross_entropy_reference(h_LD, weight_VD, targets_L)
    if not torch.is_grad_enabled():  # autograd functions are not told, and would compute a trained head's gradient
        h_LD, weight_VD = h_LD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(h_LD, weight_VD, targets_L.contiguous(), in_triton)


__all__ = ["chunk_rows", "linear_cross_entropy", "linear_cross_entropy_reference"]
