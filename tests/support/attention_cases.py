"""Segments, keys that they share, and plain attention to compare with."""

import dataclasses
from itertools import pairwise

import torch

from fastvid.batch import AttentionLayout

# As a part of the largest value: four units in the last place, and half a unit.
FLOORS = {torch.float32: 2**-21, torch.bfloat16: 2**-8}
# queries and keys of each segment: shorter and longer than a block, rectangles, one query, none
SEGMENTS = {
    "squares": ([300, 5, 128, 1], [300, 5, 128, 1]),
    "rectangles": ([150, 7, 1, 129], [330, 90, 40, 130]),
    "empty segment": ([0, 9], [12, 9]),
}
GATHERED = {  # constant rows, rows, and who attends to which of them
    "shared prefix": (
        5,
        20,
        [[*range(5), *range(8)], [*range(13), *range(13, 19)], [*range(13), *range(19, 25)]],
        [8, 6, 6],
    ),
    "across the border": (4, 9, [[2, 3, 4, 5, 6], [*range(4), *range(7, 13)]], [3, 6]),
    "rows apart": (3, 6, [[0, 2, 4, 6, 8], [1, 3, 5, 7]], [2, 4]),
    "no constant rows": (0, 7, [[0, 1, 2], [0, 1, 3, 4, 5, 6]], [3, 4]),
}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def plain(q, k, v, q_bounds, k_bounds):
    """Segment by segment, with the whole matrix of scores."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(q_bounds), pairwise(k_bounds)):
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[k0:k1]) * q.shape[-1] ** -0.5
        hidden = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - q1 + q0) == 0
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[k0:k1]))
    return torch.cat(outs)


def inputs(segments, heads, kv_heads, channels, dtype, seed=0):
    """Queries, keys, values, and the output's gradient, each a part of wider rows."""
    generator = torch.Generator().manual_seed(seed)
    rows = [sum(lengths) for lengths in segments]
    shapes = [(rows[0], heads), (rows[1], kv_heads), (rows[1], kv_heads), (rows[0], heads)]
    return [torch.randn(n, 2 * h, channels, generator=generator).to(dtype)[:, h // 2 : h // 2 + h] for n, h in shapes]


def results(function, q, k, v, grad, segments):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *map(bounds, segments))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def assert_close_to_exact(found, eager, exact):
    """The error against fp64 is at most twice that of plain attention in the same dtype."""
    for ours, plain_one, true in zip(found, eager, exact, strict=True):
        assert ours.dtype == plain_one.dtype
        allowed = 2 * (plain_one.double() - true).abs().max() + FLOORS[ours.dtype] * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed


def branches(lengths, prefix):
    """Layout, packed tokens and positions of one prefix and its branches, and of the samples apart."""
    starts = [prefix + sum(lengths[:i]) for i in range(len(lengths))]
    own = [list(range(start, start + n)) for start, n in zip(starts, lengths)]
    rows = [list(range(prefix))] + [list(range(prefix)) + rows for rows in own]
    queries = AttentionLayout.of_lengths([prefix, *lengths])
    keys = AttentionLayout.of_lengths([len(r) for r in rows])
    layout = dataclasses.replace(
        queries,
        cu_seqlens_k=keys.cu_seqlens_k,
        max_seqlen_k=keys.max_seqlen_k,
        kv_rows=torch.tensor([row for segment in rows for row in segment]),
    )
    positions = list(range(prefix)) + [prefix + i for n in lengths for i in range(n)]
    return layout, torch.tensor(positions, dtype=torch.int32), own


def keys_of(layout):
    """For each query the rows that it attends to, as the layout's definition has it."""
    found, (q, k) = [], (x.tolist() for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    rows = list(range(k[-1])) if layout.kv_rows is None else layout.kv_rows.tolist()
    for segment in range(len(q) - 1):
        found += [
            rows[k[segment] : k[segment + 1] - (q[segment + 1] - 1 - row)] for row in range(*q[segment : segment + 2])
        ]
    assert layout.max_seqlen_q == max([b - a for a, b in pairwise(q)], default=0)
    assert layout.max_seqlen_k == max([b - a for a, b in pairwise(k)], default=0)
    assert layout.cu_seqlens_q.dtype == layout.cu_seqlens_k.dtype == torch.int32
    return found


def keys_in_parts(branches):
    """The same, of attention in two parts."""
    causal, full = branches.causal, branches.full
    own, shared = branches.sizes
    assert (own, shared) == (int(causal.cu_seqlens_k[-1]), int(full.cu_seqlens_k[-1])) and full.kv_rows is None
    rows = torch.arange(own) if causal.kv_rows is None else causal.kv_rows
    assert len(rows) == max(own, branches.first_key + shared), "a key is placed that nobody attends to"
    found, shared_rows = keys_of(causal), rows[branches.first_key : branches.first_key + shared].tolist()
    assert len(found) == branches.first_query + int(full.cu_seqlens_q[-1])
    for (q0, q1), (k0, k1) in zip(*(pairwise(x.tolist()) for x in (full.cu_seqlens_q, full.cu_seqlens_k))):
        assert q0 < q1 and k0 < k1
        for row in range(branches.first_query + q0, branches.first_query + q1):
            found[row] = shared_rows[k0:k1] + found[row]
    return found
