"""Causal attention on the CPU as batched matrix products, block of queries by block of queries.

PyTorch's SDPA kernel for the CPU computes bf16 at a third of the rate of its matrix products. Here a block's products go
through them whole, keys that no query of the block may see are left out, and backward computes a block's probabilities
again, so that nothing but queries, keys and values is saved (as in arXiv:2205.14135; a block here sees all its keys).

Dimensions: N query rows, M key/value rows, H query heads, K key/value heads, G = H / K, d channels per head; n query rows
of a block, m key rows that they see.
"""

from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of a dozen heads fit the cache; a tenth more pairs are computed than the triangle has.
BLOCK_QUERIES = 128


def blocked_attention(q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, q_bounds: list[int], k_bounds: list[int]) -> Tensor:
    """Scaled dot-product attention, causal and aligned at each segment's last row.

    Args:
        q_NHd, k_MKd, v_MKd: rows of all segments, any row stride; H a multiple of K. Scale is d**-0.5.
        q_bounds, k_bounds: cumulative rows of the segments, from 0; no segment has more queries than keys.

    Returns:
        [N, H, d]. Scores and probabilities are rounded to the inputs' dtype, as plain products of matrices round them;
        the softmax between them is fp32, and so are the sums of the keys' and values' gradients. Repeatable.
    """
    return _BlockedAttention.apply(q_NHd, k_MKd, v_MKd, q_bounds, k_bounds)


def blocks(q_bounds, k_bounds):
    """(rows of the queries, rows of the keys that the last of them sees) of every block."""
    for (q0, q1), (k0, k1) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        for start in range(q0, q1, BLOCK_QUERIES):
            stop = min(start + BLOCK_QUERIES, q1)
            yield slice(start, stop), slice(k0, k1 - q1 + stop)


def _heads(x_nHd, kv_heads):
    """View [n, H, d] as [K, G, n, d]."""
    return x_nHd.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _by_head(x_nHd, kv_heads):
    """[n, H, d] → [K, G·n, d], dense, as products of matrices want it: they would copy each operand themselves."""
    return _heads(x_nHd, kv_heads).reshape(kv_heads, -1, x_nHd.shape[2]).contiguous()


def _probabilities(q_Kxd, k_Kmd, n):
    """[K, G·n, m]: each query's over the keys up to its own row."""
    m, d = k_Kmd.shape[1:]
    s_Kxm = q_Kxd.new_empty(*q_Kxd.shape[:2], m)
    torch.baddbmm(s_Kxm, q_Kxd, k_Kmd.transpose(1, 2), beta=0, alpha=d**-0.5, out=s_Kxm)
    s_Kxm.unflatten(1, (-1, n))[..., m - n:].add_(s_Kxm.new_full((n, n), float("-inf")).triu_(1))  # hides what follows
    return torch.softmax(s_Kxm, -1)


def _forward(q_NHd, k_MKd, v_MKd, q_bounds, k_bounds):
    kv_heads = k_MKd.shape[1]
    out_NHd = q_NHd.new_empty(q_NHd.shape)
    for queries, keys in blocks(q_bounds, k_bounds):
        n = queries.stop - queries.start
        p_Kxm = _probabilities(_by_head(q_NHd[queries], kv_heads), _by_head(k_MKd[keys], kv_heads), n)
        out_Kxd = torch.bmm(p_Kxm, _by_head(v_MKd[keys], kv_heads))
        _heads(out_NHd[queries], kv_heads).copy_(out_Kxd.unflatten(1, (-1, n)))
    return out_NHd


# One operation, by whose name selective recomputation keeps its result.
_LIBRARY = torch.library.Library("fastvid", "DEF")
_LIBRARY.define("blocked_attention(Tensor q, Tensor k, Tensor v, SymInt[] q_bounds, SymInt[] k_bounds) -> Tensor")
_LIBRARY.impl("blocked_attention", _forward, "CPU")


class _BlockedAttention(torch.autograd.Function):
    """Saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx, q_NHd, k_MKd, v_MKd, q_bounds, k_bounds):
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd)
        ctx.bounds = q_bounds, k_bounds
        return torch.ops.fastvid.blocked_attention(q_NHd, k_MKd, v_MKd, q_bounds, k_bounds)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        q_NHd, k_MKd, v_MKd = ctx.saved_tensors
        (M, kv_heads, d), dtype = k_MKd.shape, q_NHd.dtype
        grad_q_NHd = q_NHd.new_empty(q_NHd.shape)
        wide = torch.promote_types(dtype, torch.float32)
        grad_k_KMd, grad_v_KMd = (k_MKd.new_zeros(kv_heads, M, d, dtype=wide) for _ in range(2))
        for queries, keys in blocks(*ctx.bounds):
            n = queries.stop - queries.start
            q_Kxd, grad_Kxd = _by_head(q_NHd[queries], kv_heads), _by_head(grad_NHd[queries], kv_heads)
            k_Kmd, v_Kmd = _by_head(k_MKd[keys], kv_heads), _by_head(v_MKd[keys], kv_heads)
            p_Kxm = _probabilities(q_Kxd, k_Kmd, n)
            grad_v_KMd[:, keys] += torch.bmm(p_Kxm.transpose(1, 2), grad_Kxd)
            grad_p_Kxm = torch.bmm(grad_Kxd, v_Kmd.transpose(1, 2))
            grad_s_Kxm = torch.ops.aten._softmax_backward_data(grad_p_Kxm, p_Kxm, -1, dtype)
            grad_k_KMd[:, keys].add_(torch.bmm(grad_s_Kxm.transpose(1, 2), q_Kxd), alpha=d**-0.5)
            grad_q_Kxd = torch.empty_like(q_Kxd)
            torch.baddbmm(grad_q_Kxd, grad_s_Kxm, k_Kmd, beta=0, alpha=d**-0.5, out=grad_q_Kxd)
            _heads(grad_q_NHd[queries], kv_heads).copy_(grad_q_Kxd.unflatten(1, (-1, n)))
        return grad_q_NHd, *(x.transpose(0, 1).to(dtype) for x in (grad_k_KMd, grad_v_KMd)), None, None
