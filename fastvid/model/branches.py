"""Attention in two parts, merged by their log-sum-exps: branches do not copy the keys of what they go on from.

A branch's queries attend to their own rows, and to those of their beginning. Each part gives its output, and the
logarithm of what its softmax divides by; from these follow those of both. Backward, each part is given the output and
log-sum-exp of both: then its gradients are those of the whole (as in ring attention, arXiv:2310.01889). So a library
sums the gradients of a beginning's keys over all its branches. Those of both parts are added where they go, in fp32 by
the kernel that rotates them back, or else here in the tensors' dtype.

Dimensions: N query rows, B branches' ones, which are the last, L that get gradients, also the last, M key/value rows,
P of them with gradients, T of beginnings, H query heads, K key/value heads, d channels per head.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from fastvid_kernels.merge_parts import merge_parts
from fastvid_kernels.plain import last_rows
from fastvid_kernels.way_back import Twice
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


class _InParts(torch.autograd.Function):
    """Saves queries, keys, values, output and log-sum-exp of both parts, of the rows that get gradients.

    Given rows for the second part too, each part's gradients go back apart, for whoever made them to add.
    """

    @staticmethod
    def forward(ctx, q_LHd, k_PKd, v_PKd, q_BHd, k_TKd, v_TKd, every, layouts, parts, inplace):
        rows, second = (q_LHd, k_PKd, v_PKd), (q_BHd, k_TKd, v_TKd)
        ctx.layout, ctx.parts, ctx.apart = layouts[1], parts, [x is not None for x in second]
        pair = (
            _both(rows, second, layouts[1].branches)
            if every is None
            else _both(every, (None,) * 3, layouts[0].branches)
        )
        out_NHd, lse_HN, lse_HB = _forward(*pair, layouts[0], parts, inplace)
        first = len(out_NHd) - len(q_LHd)
        # A library reads log-sum-exps of dense rows.
        lse_HL = lse_HN[:, first:].contiguous() if first else lse_HN
        ctx.save_for_backward(*rows, *second, out_NHd[first:], lse_HL, lse_HB)
        if every is None:
            return out_NHd
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(out_NHd)
        return last_rows(out_NHd, len(q_LHd)), out_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_LHd, *_):
        grads = (None,) * 6 if grad_LHd is None else _backward(grad_LHd, ctx)
        return *grads, None, None, None, None


def _both(rows, second, branches):
    """Queries, keys and values of either part; of the second what is given, else rows of the first's tensors.

    Without branches there is no second part.
    """
    if branches is None:
        return rows, None
    q_NHd, k_MKd, v_MKd = rows
    own, shared = branches.sizes
    places = slice(branches.first_key, branches.first_key + shared)
    of_second = q_NHd[branches.first_query :], k_MKd[places], v_MKd[places]
    return (q_NHd, k_MKd[:own], v_MKd[:own]), tuple(
        x if given is None else given for x, given in zip(of_second, second)
    )


def read_twice(branches: Branches) -> Twice:
    """Which queries and keys either part reads, as `rope_keys` takes it."""
    own, shared = branches.sizes
    return Twice(branches.first_query, own, branches.first_key, shared)


def _forward(rows, second, layout, parts, inplace):
    """(Output, log-sum-exp) of both parts, and the latter of the second's queries alone; None without branches."""
    branches = layout.branches
    if branches is None:
        return *parts.forward(*rows, layout, True), None
    out_NHd, lse_HN = parts.forward(*rows, branches.causal, True)
    out_BHd, lse_HB = parts.forward(*second, branches.full, False)
    if not inplace:
        out_NHd, lse_HN, lse_HB = out_NHd.clone(), lse_HN.clone(), lse_HB.clone()
    first = branches.first_query
    merge_parts(out_NHd[first:], lse_HN[:, first:], out_BHd, lse_HB, inplace=True)
    return out_NHd, lse_HN, lse_HB


def _backward(grad_NHd, ctx):
    """Gradients of queries, keys and values, and of those of the second part that were given."""
    *rows, out_NHd, lse_HN, lse_HB = ctx.saved_tensors
    branches, backward = ctx.layout.branches, ctx.parts.backward
    if branches is None:
        return *backward(grad_NHd, *rows[:3], out_NHd, lse_HN, ctx.layout, True), None, None, None
    own, second = _both(rows[:3], rows[3:], branches)
    assert second is not None
    grads = backward(grad_NHd, *own, out_NHd, lse_HN, branches.causal, True)
    at = branches.first_query
    more = backward(grad_NHd[at:], *second, out_NHd[at:], lse_HB, branches.full, False)
    firsts = at, branches.first_key, branches.first_key
    joined = [x if apart else _added(x, other, first) for apart, x, other, first in zip(ctx.apart, grads, more, firsts)]
    return *joined, *(other if apart else None for apart, other in zip(ctx.apart, more))


def _added(grad_NAd, more_BAd, first):
    """The second added to rows of the first from `first` on; or behind it."""
    if first == len(grad_NAd):
        return torch.cat([grad_NAd, more_BAd])
    grad_NAd[first : first + len(more_BAd)].add_(more_BAd)
    return grad_NAd


def attend_in_parts(
    q_NHd: Tensor,
    k_MKd: Tensor,
    v_MKd: Tensor,
    *second: Tensor | None,
    layout: AttentionLayout,
    parts: Parts,
    inplace: bool = True,
) -> Tensor:
    """Attention of all segments, branches among them.

    Args:
        q_NHd: all queries.
        k_MKd, v_MKd: as `layout.placed` places them, or as `layout` does without branches.
        second: queries, keys and values of the second part, in the same memory, as `rope_keys` returns them for
            `twice`. Keys and values before them are the first part's alone then. What is None lies in the first ones.
        layout: which queries are whose, and which keys.
        parts: what computes each part.
        inplace: overwrite what `parts` gives. Not where recomputation keeps it ("selective").

    Returns:
        [N, H, d]. Gradients repeat to the bit where the library's do. Those of keys do in FlashAttention 2; in 3 and 4
        with H above K, and those of queries in all, only where torch is told to be deterministic.
    """
    every, layouts = None, (layout, layout)
    out_NHd: Any = _InParts.apply(q_NHd, k_MKd, v_MKd, *(second or (None,) * 3), every, layouts, parts, inplace)
    return out_NHd


def attend_behind(
    live: tuple[Tensor | None, ...],
    every: tuple[Tensor, ...],
    layouts: tuple[AttentionLayout, AttentionLayout],
    parts: Parts,
    *,
    inplace: bool = True,
) -> tuple[Tensor, Tensor]:
    """The same where only the last queries and keys get gradients.

    Args:
        live: queries [L, H, d], keys and values [P, K, d] with gradients; and `second`, as of `attend_in_parts`.
        every: those of all rows without gradients, of which `live` are the last.
        layouts: of every query, and of the live ones alone; the first keys of `every` are no keys of the latter's.
        parts, inplace: as of `attend_in_parts`.

    Returns:
        (output [L, H, d], that of every query without gradients, whose last rows are the same memory).
    """
    found: Any = _InParts.apply(*live[:3], *(live[3:] or (None,) * 3), every, layouts, parts, inplace)
    return found
