"""Attention as batched products of matrices: values and gradients against plain attention, what is saved."""

from itertools import pairwise

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from fastvid.batch import AttentionLayout
from fastvid.model import attention, blocked_attention
from fastvid.model.decoder import _keep_products, attend

# As a part of the largest value: four units in the last place, and half a unit.
FLOORS = {torch.float32: 2**-21, torch.bfloat16: 2**-8}
# queries and keys of each segment: shorter and longer than a block, rectangles, one query, none
SEGMENTS = {
    "squares": ([300, 5, 128, 1], [300, 5, 128, 1]),
    "rectangles": ([150, 7, 1, 129], [330, 90, 40, 130]),
    "empty segment": ([0, 9], [12, 9]),
}


def bounds(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).tolist()


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
    return [torch.randn(n, 2 * h, channels, generator=generator).to(dtype)[:, h // 2:h // 2 + h] for n, h in shapes]


def results(function, q, k, v, grad, segments):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = function(*leaves, *map(bounds, segments))
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("heads, kv_heads, channels", [(4, 4, 32), (6, 2, 24), (3, 1, 5)])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_equals_plain_attention(segments, heads, kv_heads, channels, dtype):
    """The error against fp64 is at most twice that of plain attention in the same dtype."""
    given = inputs(segments, heads, kv_heads, channels, dtype)
    found = results(blocked_attention.blocked_attention, *given, segments)
    exact = results(plain, *(x.double() for x in given), segments)
    for ours, eager, true in zip(found, results(plain, *given, segments), exact):
        assert ours.dtype == dtype
        allowed = 2 * (eager.double() - true).abs().max() + FLOORS[dtype] * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed


def test_gradient_numerically(monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 3)
    q, k, v, _ = (x.requires_grad_() for x in inputs(([5, 2], [6, 2]), 4, 2, 3, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *x: blocked_attention.blocked_attention(*x, [0, 5, 7], [0, 6, 8]), (q, k, v))


def test_gradients_of_keys_are_summed_in_fp32(monkeypatch):
    """A thousand queries that each add 1 to the one key's value: bf16 alone would stop counting at 256."""
    monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 1)
    q, k, v, grad = (torch.zeros(1000, 1, 4, dtype=torch.bfloat16) for _ in range(4))
    k[0] = q[:] = 40  # the first key takes all
    grad += 1
    found = results(blocked_attention.blocked_attention, q, k, v, grad, ([1000], [1000]))[3]
    assert found[0].unique().tolist() == [1000]


def test_saves_its_inputs_only():
    q, k, v, _ = inputs(([9], [20]), 2, 2, 8, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        blocked_attention.blocked_attention(q.requires_grad_(), k, v, [0, 9], [0, 20])
    assert saved == [x.data_ptr() for x in (q, k, v)]


GATHERED = {  # constant rows, rows, and who attends to which of them
    "shared prefix": (5, 20, [[*range(5), *range(8)], [*range(13), *range(13, 19)], [*range(13), *range(19, 25)]], [8, 6, 6]),
    "across the border": (4, 9, [[2, 3, 4, 5, 6], [*range(4), *range(7, 13)]], [3, 6]),
    "rows apart": (3, 6, [[0, 2, 4, 6, 8], [1, 3, 5, 7]], [2, 4]),
    "no constant rows": (0, 7, [[0, 1, 2], [0, 1, 3, 4, 5, 6]], [3, 4]),
}


@pytest.mark.parametrize("constant_rows, rows, keys, queries", GATHERED.values(), ids=GATHERED)
@pytest.mark.parametrize("heads", [2, 4])
def test_gathers_keys_and_adds_up_their_gradients(monkeypatch, constant_rows, rows, keys, queries, heads):
    monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 3)
    q, k, v, grad = (torch.randn(n, h, 4, dtype=torch.float64, requires_grad=True)
                     for n, h in ((sum(queries), heads), (rows, 2), (rows, 2), (sum(queries), heads)))
    constant = tuple(torch.randn(constant_rows, 2, 4, dtype=torch.float64) for _ in range(2))
    kv_rows = torch.tensor(sum(keys, []))
    given = bounds(queries), bounds(map(len, keys))
    ours = blocked_attention.blocked_attention(q, k, v, *given, kv_rows, constant if constant_rows else None)
    true = plain(q, *(torch.cat([c, x])[kv_rows] for c, x in zip(constant, (k, v))), *given)
    torch.testing.assert_close(ours, true)
    for found, expected in zip(*(torch.autograd.grad(out, (q, k, v), grad) for out in (ours, true))):
        torch.testing.assert_close(found, expected)


def test_same_bits_again_and_inputs_left_alone():
    given = inputs(SEGMENTS["rectangles"], 4, 2, 16, torch.bfloat16)
    before = [x.clone() for x in given]
    first, second = (results(blocked_attention.blocked_attention, *given, SEGMENTS["rectangles"]) for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, given, before))


def test_serves_bf16_on_the_cpu(monkeypatch):
    calls = []
    monkeypatch.setattr(attention, "blocked_attention", lambda q, *others: calls.append(q.dtype) or q)
    for dtype in (torch.bfloat16, torch.float32):
        attend(*(torch.randn(5, 2, 8, dtype=dtype),) * 3, AttentionLayout.of_lengths([5]))
    assert calls == [torch.bfloat16]
    with pytest.raises(ValueError, match="'blocked' is impossible: it is for bfloat16, not torch.float32"):
        attention.choose_implementation("blocked", torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="it is for the CPU, not cuda"):
        attention.choose_implementation("blocked", torch.device("cuda"), torch.bfloat16)


def test_selective_recomputation_keeps_the_result(monkeypatch):
    calls = []
    compute = blocked_attention._probabilities
    monkeypatch.setattr(blocked_attention, "_probabilities", lambda *args: calls.append(1) or compute(*args))
    q, k, v, _ = inputs(([9], [20]), 2, 2, 8, torch.bfloat16)
    checkpoint(lambda x: blocked_attention.blocked_attention(x, k, v, [0, 9], [0, 20]), q.requires_grad_(),
               use_reentrant=False, context_fn=_keep_products).sum().backward()
    assert len(calls) == 2  # forward's, and backward's own
