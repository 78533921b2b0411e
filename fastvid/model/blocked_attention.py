"""Causal attention on the CPU as batched matrix products, block of queries by block of queries.

PyTorch's SDPA kernel for the CPU computes bf16 at a third of the rate of its matrix products. Here a block's products
go through them whole, keys that no query of the block may see are left out, and backward computes a block's
probabilities again, so that nothing but queries, keys and values is saved (as in arXiv:2205.14135; a block here sees
all its keys).

Dimensions: N query rows, R rows that are keys and values, C constant rows before those, H query heads, K key/value
heads, G = H / K, d channels per head; n query rows of a block, m key rows that they see.
"""

from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Scores of a dozen heads fit the cache; a fifth more pairs are computed than the triangle has.
BLOCK_QUERIES = 192


def blocked_attention(
    q_NHd: Tensor,
    k_RKd: Tensor,
    v_RKd: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    kv_rows: Tensor | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention, causal and aligned at each segment's last row.

    Args:
        q_NHd, k_RKd, v_RKd: rows of all segments, any row stride; H a multiple of K. Scale is d**-0.5.
        q_bounds, k_bounds: [S+1], cumulative rows of the segments, from 0; no segment has more queries than keys.
        kv_rows: for each key of each segment the row that it is, of the constant rows and those of k; None: the rows
            of k in order.
        constant: keys and values [C, K, d] without gradient, which `kv_rows` counts before those of k.

    Returns:
        [N, H, d]. Scores and probabilities are rounded to the inputs' dtype, as plain products of matrices round them;
        the softmax between them is fp32, and so are the sums of the keys' and values' gradients. Repeatable.
    """
    return _BlockedAttention.apply(
        q_NHd, k_RKd, v_RKd, q_bounds.tolist(), k_bounds.tolist(), kv_rows, *(constant or (None, None))
    )


def segments(q_bounds, k_bounds, kv_rows=None):
    """(rows of the queries, runs of consecutive rows that are its keys) of every segment that has queries."""
    for (q0, q1), (k0, k1) in zip(pairwise(q_bounds), pairwise(k_bounds), strict=True):
        if q1 > q0:
            yield slice(q0, q1), [slice(k0, k1)] if kv_rows is None else _runs(kv_rows[k0:k1])


def _runs(rows_m):
    """Slices whose rows, end to end, are `rows_m`."""
    rows_m = rows_m.numpy()
    breaks = [0, *(np.flatnonzero(np.diff(rows_m) != 1) + 1).tolist(), len(rows_m)]
    return [slice(start, start + j - i) for start, (i, j) in zip(rows_m[breaks[:-1]].tolist(), pairwise(breaks))]


def blocks(queries, keys):
    """(rows of the queries, how many of the segment's `keys` keys the last of them sees) of every block, longest
    first."""
    for start in reversed(range(queries.start, queries.stop, BLOCK_QUERIES)):
        stop = min(start + BLOCK_QUERIES, queries.stop)
        yield slice(start, stop), keys - queries.stop + stop


def _heads(x_nHd, kv_heads):
    """View [n, H, d] as [K, G, n, d]."""
    return x_nHd.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)


def _by_head(x_nHd, kv_heads):
    """[n, H, d] → [K, G·n, d], dense, as products of matrices want it: they would copy each operand themselves."""
    return _heads(x_nHd, kv_heads).reshape(kv_heads, -1, x_nHd.shape[2]).contiguous()


def _gather(constant_CKd, x_RKd, runs):
    """[K, m, d]: the rows of `runs`, of the constant ones and those of x."""
    first = 0 if constant_CKd is None else len(constant_CKd)
    out_Kmd = x_RKd.new_empty(x_RKd.shape[1], sum(run.stop - run.start for run in runs), x_RKd.shape[2])
    at = 0
    for run in runs:
        for source, start, stop in (
            (constant_CKd, run.start, min(run.stop, first)),
            (x_RKd, max(run.start, first) - first, run.stop - first),
        ):
            if start < stop:
                out_Kmd[:, at : at + stop - start] = source[start:stop].transpose(0, 1)
                at += stop - start
    return out_Kmd


def _scatter(total_RKd, first, runs, x_Kmd):
    """Add what belongs to the rows of `runs`, which count from `first` rows before those of the total."""
    at = 0
    for run in runs:
        own = slice(max(run.start - first, 0), run.stop - first)
        at += run.stop - run.start
        if own.start < own.stop:
            total_RKd[own] += x_Kmd[:, at - own.stop + own.start : at].transpose(0, 1)


def _mask(x, size):
    """[size, size]: what hides from each query the keys behind its own row."""
    return x.new_full((size, size), float("-inf")).triu_(1)


def _probabilities(q_Kxd, k_Kmd, mask_nn):
    """[K, G·n, m]: each query's over the keys up to its own row."""
    m, d = k_Kmd.shape[1:]
    n = len(mask_nn)
    s_Kxm = q_Kxd.new_empty(*q_Kxd.shape[:2], m)
    torch.baddbmm(s_Kxm, q_Kxd, k_Kmd.transpose(1, 2), beta=0, alpha=d**-0.5, out=s_Kxm)
    s_Kxm.unflatten(1, (-1, n))[..., m - n :].add_(mask_nn)
    return torch.softmax(s_Kxm, -1)


def _forward(q_NHd, k_RKd, v_RKd, q_bounds, k_bounds, kv_rows, constant_k, constant_v):
    kv_heads = k_RKd.shape[1]
    out_NHd, mask_nn = q_NHd.new_empty(q_NHd.shape), _mask(q_NHd, BLOCK_QUERIES)
    for segment, runs in segments(q_bounds, k_bounds, kv_rows):
        k_Kmd, v_Kmd = _gather(constant_k, k_RKd, runs), _gather(constant_v, v_RKd, runs)
        for queries, m in blocks(segment, k_Kmd.shape[1]):
            n = queries.stop - queries.start
            p_Kxm = _probabilities(_by_head(q_NHd[queries], kv_heads), k_Kmd[:, :m].contiguous(), mask_nn[:n, :n])
            out_Kxd = torch.bmm(p_Kxm, v_Kmd[:, :m].contiguous())
            _heads(out_NHd[queries], kv_heads).copy_(out_Kxd.unflatten(1, (-1, n)))
    return out_NHd


def _backward(grad_NHd, q_NHd, k_RKd, v_RKd, q_bounds, k_bounds, kv_rows, constant_k, constant_v):
    """Gradients of queries, keys and values."""
    (_, kv_heads, d), dtype = k_RKd.shape, q_NHd.dtype
    first = 0 if constant_k is None else len(constant_k)
    mask_nn, grad_q_NHd = _mask(q_NHd, BLOCK_QUERIES), q_NHd.new_empty(q_NHd.shape)
    wide = torch.promote_types(dtype, torch.float32)
    grad_k_RKd, grad_v_RKd = (k_RKd.new_zeros(k_RKd.shape, dtype=wide) for _ in range(2))
    for segment, runs in segments(q_bounds, k_bounds, kv_rows):
        all_k_Kmd, all_v_Kmd = _gather(constant_k, k_RKd, runs), _gather(constant_v, v_RKd, runs)
        grad_k_Kmd, grad_v_Kmd = (torch.zeros_like(all_k_Kmd, dtype=wide) for _ in range(2))
        for queries, m in blocks(segment, all_k_Kmd.shape[1]):
            n = queries.stop - queries.start
            q_Kxd, grad_Kxd = _by_head(q_NHd[queries], kv_heads), _by_head(grad_NHd[queries], kv_heads)
            k_Kmd, v_Kmd = all_k_Kmd[:, :m].contiguous(), all_v_Kmd[:, :m].contiguous()
            p_Kxm = _probabilities(q_Kxd, k_Kmd, mask_nn[:n, :n])
            grad_v_Kmd[:, :m] += torch.bmm(p_Kxm.transpose(1, 2), grad_Kxd)
            grad_p_Kxm = torch.bmm(grad_Kxd, v_Kmd.transpose(1, 2))
            grad_s_Kxm = torch.ops.aten._softmax_backward_data(grad_p_Kxm, p_Kxm, -1, dtype)
            grad_k_Kmd[:, :m].add_(torch.bmm(grad_s_Kxm.transpose(1, 2), q_Kxd), alpha=d**-0.5)
            grad_q_Kxd = torch.empty_like(q_Kxd)
            torch.baddbmm(grad_q_Kxd, grad_s_Kxm, k_Kmd, beta=0, alpha=d**-0.5, out=grad_q_Kxd)
            _heads(grad_q_NHd[queries], kv_heads).copy_(grad_q_Kxd.unflatten(1, (-1, n)))
        _scatter(grad_k_RKd, first, runs, grad_k_Kmd)
        _scatter(grad_v_RKd, first, runs, grad_v_Kmd)
    return grad_q_NHd, grad_k_RKd.to(dtype), grad_v_RKd.to(dtype)


# One operation, by whose name selective recomputation keeps its result.
_LIBRARY = torch.library.Library("fastvid", "DEF")
_LIBRARY.define(
    "blocked_attention(Tensor q, Tensor k, Tensor v, SymInt[] q_bounds, SymInt[] k_bounds, Tensor? "
    "kv_rows, Tensor? constant_k, Tensor? constant_v) -> Tensor"
)
_LIBRARY.impl("blocked_attention", _forward, "CPU")


class _BlockedAttention(torch.autograd.Function):
    """Saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx, q_NHd, k_RKd, v_RKd, q_bounds, k_bounds, kv_rows, constant_k, constant_v):
        ctx.save_for_backward(q_NHd, k_RKd, v_RKd, kv_rows, constant_k, constant_v)
        ctx.bounds = q_bounds, k_bounds
        return torch.ops.fastvid.blocked_attention(
            q_NHd, k_RKd, v_RKd, q_bounds, k_bounds, kv_rows, constant_k, constant_v
        )

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        q_NHd, k_RKd, v_RKd, *others = ctx.saved_tensors
        return *_backward(grad_NHd, q_NHd, k_RKd, v_RKd, *ctx.bounds, *others), *[None] * 5
