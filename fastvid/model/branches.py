"""Attention in two parts, merged by their log-sum-exps: branches do not copy the keys of what they go on from.

A branch's queries attend to their own rows, and to those of their beginning. Each part gives its output, and the
logarithm of what its softmax divides by; from these follow those of both. Backward, each part is given the output and
log-sum-exp of both: then its gradients are those of the whole (as in ring attention, arXiv:2310.01889). So a library
sums the gradients of a beginning's keys over all its branches. Those of both parts are added in the tensors' dtype.

Dimensions: N query rows, B branches' ones, which are the last, L that get gradients, also the last, M key/value rows,
P of them with gradients, H query heads, K key/value heads, d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastvid_kernels.merge_parts import merge_parts
from fastvid_kernels.plain import last_rows
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastvid.batch import AttentionLayout


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


class _InParts(torch.autograd.Function):
    """Saves queries, keys, values, output and log-sum-exp of both parts, of the rows that get gradients."""

    @staticmethod
    def forward(ctx, q_LHd, k_PKd, v_PKd, every, layouts, parts, inplace):
        out_NHd, lse_HN = _forward(every or (q_LHd, k_PKd, v_PKd), layouts[0], parts, inplace)
        first = len(out_NHd) - len(q_LHd)
        # A library reads log-sum-exps of dense rows.
        lse_HL = lse_HN[:, first:].contiguous() if first else lse_HN
        ctx.save_for_backward(q_LHd, k_PKd, v_PKd, out_NHd[first:], lse_HL)
        ctx.layout, ctx.parts = layouts[1], parts
        if every is None:
            return out_NHd
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out_NHd)
        return last_rows(out_NHd, len(q_LHd)), out_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LHd, *_):
        grads = (None,) * 3 if grad_LHd is None else _backward(grad_LHd, ctx.saved_tensors, ctx.layout, ctx.parts)
        return *grads, None, None, None, None


def _forward(rows, layout, parts, inplace):
    """(Output, log-sum-exp) of both parts; of the only one without branches."""
    q_NHd, k_MKd, v_MKd = rows
    branches = layout.branches
    if branches is None:
        return parts.forward(q_NHd, k_MKd, v_MKd, layout, True)
    first, own, shared = _places(branches)
    out_NHd, lse_HN = parts.forward(q_NHd, k_MKd[own], v_MKd[own], branches.causal, True)
    out_BHd, lse_HB = parts.forward(q_NHd[first:], k_MKd[shared], v_MKd[shared], branches.full, False)
    if not inplace:
        out_NHd, lse_HN = out_NHd.clone(), lse_HN.clone()
    merge_parts(out_NHd[first:], lse_HN[:, first:], out_BHd, lse_HB, inplace=True)
    return out_NHd, lse_HN


def _backward(grad_NHd, saved, layout, parts):
    """Gradients of queries, keys and values."""
    q_NHd, k_MKd, v_MKd, out_NHd, lse_HN = saved
    branches, backward = layout.branches, parts.backward
    if branches is None:
        return backward(grad_NHd, q_NHd, k_MKd, v_MKd, out_NHd, lse_HN, layout, True)
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
    grad_q_NHd[first:].add_(grad_q_BHd)
    if own.stop == shared.start:
        grads = [torch.cat(pair) for pair in zip(grads, more)]
    else:
        for grad_MKd, grad_TKd in zip(grads, more):
            grad_MKd[shared].add_(grad_TKd)
    return grad_q_NHd, *grads


def _places(branches):
    """(First query of a branch, keys of the causal part, keys of beginnings)."""
    own, shared = branches.sizes
    return branches.first_query, slice(0, own), slice(branches.first_key, branches.first_key + shared)


def attend_in_parts(
    q_NHd: Tensor, k_MKd: Tensor, v_MKd: Tensor, layout: AttentionLayout, parts: Parts, *, inplace: bool = True
) -> Tensor:
    """Attention of all segments, branches among them.

    Args:
        q_NHd: all queries.
        k_MKd, v_MKd: as `layout.placed` places them, or as `layout` does without branches.
        layout: which queries are whose, and which keys.
        parts: what computes each part.
        inplace: overwrite what `parts` gives. Not where recomputation keeps it ("selective").

    Returns:
        [N, H, d]. Gradients repeat to the bit where the library's do. Those of keys do in FlashAttention 2; in 3 and 4
        with H above K, and those of queries in all, only where torch is told to be deterministic.
    """
    out_NHd: Any = _InParts.apply(q_NHd, k_MKd, v_MKd, None, (layout, layout), parts, inplace)
    return out_NHd


def attend_behind(
    live: tuple[Tensor, ...],
    every: tuple[Tensor, ...],
    layouts: tuple[AttentionLayout, AttentionLayout],
    parts: Parts,
    *,
    inplace: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same where only the last queries and keys get gradients.

    Args:
        live: queries [L, H, d], keys and values [P, K, d] with gradients.
        every: those of all rows without gradients, of which `live` are the last.
        layouts: of every query, and of the live ones alone; the first keys of `every` are no keys of the latter's.
        parts, inplace: as of `attend_in_parts`.

    Returns:
        (output [L, H, d], that of every query without gradients, whose last rows are the same memory).
    """
    found: Any = _InParts.apply(*live, every, layouts, parts, inplace)
    return found
