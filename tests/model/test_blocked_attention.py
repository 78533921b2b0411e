"""Attention as batched products of matrices: values and gradients against plain attention, what is saved."""

import pytest
import torch
from attention_cases import FLOORS, GATHERED, SEGMENTS, assert_close_to_exact, bounds, inputs, plain, results
from torch.utils.checkpoint import checkpoint

from fastvid.batch import AttentionLayout
from fastvid.model import attention, blocked_attention
from fastvid.model.attention import attend
from fastvid.model.decoder import _keep_products


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("heads, kv_heads, channels", [(4, 4, 32), (6, 2, 24), (3, 1, 5)])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_equals_plain_attention(segments, heads, kv_heads, channels, dtype):
    given = inputs(segments, heads, kv_heads, channels, dtype)
    found = results(blocked_attention.blocked_attention, *given, segments)
    exact = results(plain, *(x.double() for x in given), segments)
    assert_close_to_exact(found, results(plain, *given, segments), exact)


@pytest.mark.slow
def test_gradient_numerically(monkeypatch):
    monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 3)
    q, k, v, _ = (x.requires_grad_() for x in inputs(([5, 2], [6, 2]), 4, 2, 3, torch.float64))
    assert torch.autograd.gradcheck(
        lambda *x: blocked_attention.blocked_attention(*x, bounds([5, 2]), bounds([6, 2])), (q, k, v)
    )


@pytest.mark.slow
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
        blocked_attention.blocked_attention(q.requires_grad_(), k, v, bounds([9]), bounds([20]))
    assert saved == [x.data_ptr() for x in (q, k, v)]


@pytest.mark.parametrize("constant_rows, rows, keys, queries", GATHERED.values(), ids=GATHERED)
@pytest.mark.parametrize("heads", [2, 4])
def test_gathers_keys_and_adds_up_their_gradients(monkeypatch, constant_rows, rows, keys, queries, heads):
    monkeypatch.setattr(blocked_attention, "BLOCK_QUERIES", 3)
    q, k, v, grad = (
        torch.randn(n, h, 4, dtype=torch.float64, requires_grad=True)
        for n, h in ((sum(queries), heads), (rows, 2), (rows, 2), (sum(queries), heads))
    )
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
    monkeypatch.setitem(attention._GATHERING, "blocked", lambda q, *others: calls.append(q.dtype) or q)
    for dtype in (torch.bfloat16, torch.float32):
        attend(*(torch.randn(5, 2, 8, dtype=dtype),) * 3, AttentionLayout.of_lengths([5]))
    assert calls == [torch.bfloat16]
    with pytest.raises(ValueError, match="'blocked' is impossible: it is for bfloat16, not torch.float32"):
        attention.choose_implementation("blocked", torch.device("cpu"), torch.float32, 8)
    with pytest.raises(ValueError, match="it is for the CPU, not cuda"):
        attention.choose_implementation("blocked", torch.device("cuda"), torch.bfloat16, 8)


def test_selective_recomputation_keeps_the_result(monkeypatch):
    calls = []
    compute = blocked_attention._probabilities
    monkeypatch.setattr(blocked_attention, "_probabilities", lambda *args: calls.append(1) or compute(*args))
    q, k, v, _ = inputs(([9], [20]), 2, 2, 8, torch.bfloat16)
    checkpoint(
        lambda x: blocked_attention.blocked_attention(x, k, v, bounds([9]), bounds([20])),
        q.requires_grad_(),
        use_reentrant=False,
        context_fn=_keep_products,
    ).sum().backward()
    assert len(calls) == 2  # forward's, and backward's own
