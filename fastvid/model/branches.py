"""Attention in two parts, merged by their log-sum-exps: branches do not copy the keys of what they go on from.

A branch's queries attend to their own rows, and to those of their beginning. Each part gives its output, and the
logarithm of what its softmax divides by; from these follow those of both. Backward, each part is given the output and
log-sum-exp of both: then its gradients are those of the whole (as in ring attention, arXiv:2310.01889). So a library
sums the gradients of a beginning's keys over all its branches. Those of both parts are added in the tensors' dtype.

Dimensions: N query rows, B branches' ones, which are the last, M key/value rows, H query heads, K key/value heads,
d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvid.batch import AttentionLayout, Branches


@dataclass(frozen=True)
class Parts:
    """A library's attention with log-sum-exps, without autograd. Scale is d**-0.5.

    Attributes:
        forward: (queries [N, H, d], keys, values [M, K, d], layout, whether it is causal, aligned at the last row) →
            (output [N, H, d], log-sum-exp [H, N] fp32). Key rows are the segments' own, `kv_rows` is not read.
        backward: (gradient of the output, queries, keys, values, output, log-sum-exp, layout, causal) → gradients of
            queries, keys and values.
    """

    forward: Callable[[Tensor, Tensor, Tensor, AttentionLayout, bool], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


class _Merged(torch.autograd.Function):
    """Saves queries, keys, values, output and log-sum-exp of both parts."""

    @staticmethod
    def forward(ctx, q_NHd, k_MKd, v_MKd, branches, parts, inplace):
        first, own, shared = _places(branches)
        out_NHd, lse_HN = parts.forward(q_NHd, k_MKd[own], v_MKd[own], branches.causal, True)
        out_BHd, lse_HB = parts.forward(q_NHd[first:], k_MKd[shared], v_MKd[shared], branches.full, False)
        both_HB = torch.logaddexp(lse_HN[:, first:], lse_HB)
        share_BH1 = (lse_HB - both_HB).exp_().T[:, :, None]
        if not inplace:
            out_NHd, lse_HN = out_NHd.clone(), lse_HN.clone()
        out_NHd[first:] = torch.lerp(out_NHd[first:].float(), out_BHd.float(), share_BH1)
        lse_HN[:, first:] = both_HB
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd, out_NHd, lse_HN)
        ctx.branches, ctx.parts = branches, parts
        return out_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        q_NHd, k_MKd, v_MKd, out_NHd, lse_HN = ctx.saved_tensors
        branches, backward = ctx.branches, ctx.parts.backward
        first, own, shared = _places(branches)
        grad_q_NHd, *grads = backward(grad_NHd, q_NHd, k_MKd[own], v_MKd[own], out_NHd, lse_HN, branches.causal, True)
        grad_q_BHd, *more = backward(
            grad_NHd[first:],
            q_NHd[first:],
            k_MKd[shared],
            v_MKd[shared],
            out_NHd[first:],
            lse_HN[:, first:].contiguous(),
            branches.full,
            False,
        )
        grad_q_NHd[first:] += grad_q_BHd
        if own.stop == shared.start:
            grads = [torch.cat(pair) for pair in zip(grads, more)]
        else:
            for grad_MKd, grad_TKd in zip(grads, more):
                grad_MKd[shared] += grad_TKd
        return grad_q_NHd, *grads, None, None, None


def _places(branches):
    """(First query of a branch, keys of the causal part, keys of beginnings)."""
    own, shared = branches.sizes
    return branches.first_query, slice(0, own), slice(branches.first_key, branches.first_key + shared)


def attend_in_parts(
    q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, branches: Branches, parts: Parts, *, inplace: bool = True
) -> Tensor:
    """Attention of all segments, branches among them.

    Args:
        q_NHd: all queries.
        k_MKd, v_MKd: as `branches.causal` places them.
        branches: which queries are whose, and which keys.
        parts: what computes each part.
        inplace: overwrite what `parts` gives. Not where recomputation keeps it ("selective").

    Returns:
        [N, H, d]. Gradients repeat to the bit where the library's do. Those of keys do in FlashAttention 2; in 3 and 4
        with H above K, and those of queries in all, only where torch is told to be deterministic.
    """
    out_NHd: Any = _Merged.apply(q_NHd, k_MKd, v_MKd, branches, parts, inplace)
    return out_NHd
