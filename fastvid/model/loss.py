"""Head and cross-entropy in one operation, on supervised rows only.

Dimensions: L supervised rows, l rows of a chunk, D channels, V tokens of the vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits that exist at once: with a copy in the compute dtype at most 192 MiB.
CHUNK_LOGITS = 2**25


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_cross_entropy_reference(h_LD, weight_VD, targets_L):
    """`linear_cross_entropy` in plain differentiable torch: holds [L, V]."""
    logits_LV = _wide(h_LD @ weight_VD.to(h_LD.dtype).T)
    lse_L = logits_LV.logsumexp(-1)
    return (lse_L - logits_LV.gather(1, targets_L[:, None])[:, 0]).sum(), lse_L.detach()


class _LinearCrossEntropy(torch.autograd.Function):
    """The gradient is computed with the logits at hand, chunk by chunk, and saved instead of them."""

    @staticmethod
    def forward(ctx, h_LD, weight_VD, targets_L):
        rows_due, weight_due = ctx.needs_input_grad[:2]
        matrix_VD = weight_VD.to(h_LD.dtype)
        grad_h_LD = torch.empty_like(h_LD) if rows_due else None
        wide = torch.promote_types(h_LD.dtype, torch.float32)
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=wide) if weight_due else None
        lse_L = h_LD.new_empty(h_LD.shape[0], dtype=wide)
        loss = h_LD.new_zeros((), dtype=wide)
        size = chunk_rows(weight_VD.shape[0])
        for start in range(0, h_LD.shape[0], size):
            chunk = slice(start, start + size)
            h_lD, targets_l1 = h_LD[chunk], targets_L[chunk, None]
            products_lV = h_lD @ matrix_VD.T
            logits_lV = _wide(products_lV)
            target_logits_l = logits_lV.gather(1, targets_l1)[:, 0]
            top_l1 = logits_lV.amax(-1, keepdim=True)
            p_lV = logits_lV.sub_(top_l1).exp_()
            sum_l1 = p_lV.sum(-1, keepdim=True)
            lse_L[chunk] = (sum_l1.log() + top_l1)[:, 0]
            loss += (lse_L[chunk] - target_logits_l).sum()
            if not (rows_due or weight_due):
                continue
            p_lV.div_(sum_l1).scatter_add_(1, targets_l1, torch.full_like(sum_l1, -1.0))
            grad_logits_lV = products_lV.copy_(p_lV)
            if rows_due:
                grad_h_LD[chunk] = grad_logits_lV @ matrix_VD
            if weight_due:
                grad_weight_VD += grad_logits_lV.T @ h_lD
        ctx.save_for_backward(grad_h_LD, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        ctx.mark_non_differentiable(lse_L)
        return loss, lse_L

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        grad_h_LD, grad_weight_VD = ctx.saved_tensors
        if grad_h_LD is not None:  # in fp32: a scale rounded to bf16 would shift every gradient alike
            grad_h_LD = (_wide(grad_h_LD) * grad).to(grad_h_LD.dtype)
        if grad_weight_VD is not None:
            grad_weight_VD = (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_h_LD, grad_weight_VD, None


def chunk_rows(vocab_size: int) -> int:
    """Rows whose logits exist at once."""
    return max(1, CHUNK_LOGITS // vocab_size)


def linear_cross_entropy(h_LD: Tensor, weight_VD: Tensor, targets_L: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the head's logits, summed over rows; [L, V] never exists at once.

    Args:
        h_LD: supervised rows after the final norm, in the compute dtype.
        weight_VD: head, in any dtype; cast to the rows' for the product. Its gradient is computed only if due.
        targets_L: [L] int64.

    Returns:
        (sum of -log p(target), fp32 scalar; log-sum-exp of each row's logits, [L] fp32, without gradient). Logits are
        rounded to the compute dtype as a linear layer rounds them; all after that is fp32. For L = 0 the sum is 0 and
        gradients are zeros.
    """
    if not torch.is_grad_enabled():  # autograd functions are not told, and would compute a trained head's gradient
        h_LD, weight_VD = h_LD.detach(), weight_VD.detach()
    return _LinearCrossEntropy.apply(h_LD, weight_VD, targets_L)
