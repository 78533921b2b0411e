"""Attention: shared and constant keys, every library that a machine may have, which is chosen, what is saved."""

import dataclasses
import itertools

import pytest
import torch
from attention_cases import FLOORS, SEGMENTS, assert_close_to_exact, branches, inputs, plain, results
from model_cases import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from fastvid.batch import AttentionLayout
from fastvid.model import attention, gathered_keys
from fastvid.model.attention import SDPA, choose_attention
from fastvid.training.live_bytes import LiveBytes


@pytest.mark.slow
def test_gathered_keys_are_not_kept_for_backward():
    layout, _, _ = branches((3,) * 20, 50)
    q, k, v = (torch.randn(110, 4, 8, requires_grad=True) for _ in range(3))
    gathered = layout.kv_rows.numel() * 4 * 8 * 4

    def live(**options):
        with LiveBytes() as live:
            out = SDPA(q, k, v, layout, **options)
            return live.now, out

    kept, expected = live(regather=False)
    lean, out = live()
    assert kept - lean == 2 * gathered
    assert torch.equal(out, expected)
    grad = torch.randn_like(out)
    assert all(
        torch.equal(*pair)
        for pair in zip(torch.autograd.grad(out, (q, k, v), grad), torch.autograd.grad(expected, (q, k, v), grad))
    )


@pytest.mark.parametrize("regather", [True, False])
def test_constant_keys_come_before_the_packed_rows(regather):
    layout, _, _ = branches((3,) * 4, 5)
    q, k, v = (torch.randn(17, 4, 8) for _ in range(3))
    layout = dataclasses.replace(
        layout,
        cu_seqlens_q=layout.cu_seqlens_q[1:] - 5,
        cu_seqlens_k=layout.cu_seqlens_k[1:] - 5,
        kv_rows=layout.kv_rows[5:],
    )
    whole = [x.clone().requires_grad_() for x in (q[5:], k, v)]
    own = [x[5:].clone().requires_grad_() for x in (q, k, v)]
    expected = SDPA(*whole, layout)
    found = SDPA(*own, layout, constant=(k[:5], v[:5]), regather=regather)
    assert torch.equal(found, expected)
    grad = torch.randn_like(found)
    for ours, theirs in zip(torch.autograd.grad(found, own, grad), torch.autograd.grad(expected, whole, grad)):
        assert torch.equal(ours, theirs[-12:])


def test_shared_gradients_are_summed_in_fp32():
    """A thousand branches that each add 1: bf16 alone would stop counting at 256."""
    lengths = (1,) * 1000
    layout, _, _ = branches(lengths, 1)
    source = torch.zeros(1001, 1, 4, dtype=torch.bfloat16, requires_grad=True)
    rows = gathered_keys.GatherRows.apply(source, gathered_keys.Gathered(None, source, layout.kv_rows), None, True)
    rows.sum().backward()
    assert source.grad[0].unique().item() == 1000  # 1001, rounded once


def test_attend_aligns_the_last_rows():
    """Two queries over five keys are the last two of five queries, four the last four; one query sees all."""
    q, k, v = (torch.randn(5, 2, 8) for _ in range(3))
    whole = SDPA(q, k, v, AttentionLayout.of_lengths([5]))
    keys = AttentionLayout.of_lengths([5])
    for n in (1, 2, 4):
        queries = AttentionLayout.of_lengths([n])
        layout = dataclasses.replace(queries, cu_seqlens_k=keys.cu_seqlens_k, max_seqlen_k=5)
        assert_close(SDPA(q[-n:], k, v, layout), whole[-n:])


def test_gradients_of_segments_are_put_together_once():
    """A slice's gradient would be a tensor of all rows, for each segment."""
    q, k, v = (torch.randn(320, 2, 8, requires_grad=True) for _ in range(3))
    out = SDPA(q, k, v, AttentionLayout.of_lengths([16] * 20))
    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            made.extend(x.nbytes for x in [result] if isinstance(x, torch.Tensor) and x.nbytes >= q.nbytes)
            return result

    with Sizes():
        out.sum().backward()
    assert len(made) <= 10


@pytest.mark.parametrize("shared", [False, True])
def test_segments_are_known_without_waiting_for_the_device(shared):
    """Of tensors without values nothing can be read; and what was read on the CPU is what the tensors say."""
    layout = branches((6, 1, 29), 7)[0] if shared else AttentionLayout.of_lengths([7, 1, 35])
    for part in (layout, layout.of_rows(torch.tensor([0, 3, 4, 20, 42])), *layout.split(1)):
        far = part.map(lambda x: x.to("meta")).map(torch.Tensor.long)
        assert far.lengths == tuple(bounds.diff().tolist() for bounds in (part.cu_seqlens_q, part.cu_seqlens_k))
        q, k, v = (
            torch.empty(rows, heads, 8, device="meta", requires_grad=True)
            for rows, heads in ((int(part.cu_seqlens_q[-1]), 4), (43, 2), (43, 2))
        )
        SDPA(q, k, v, far).sum().backward()
        assert q.grad.shape == q.shape


def test_attend_without_rows():
    q, k = torch.randn(0, 2, 8, requires_grad=True), torch.randn(0, 2, 8)
    assert SDPA(q, k, k, AttentionLayout.of_lengths([])).shape == (0, 2, 8)


@pytest.mark.parametrize("implementation", ["flash", "varlen"])
def test_impossible_attention_is_refused(implementation):
    with pytest.raises(ValueError, match=f"{implementation}.*needs a CUDA device, not cpu.*choose auto or sdpa"):
        choose_attention(implementation, torch.device("cpu"), torch.float32, 8)


def test_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="'sdqa': choose one of auto, flash, varlen, avx512, sdpa"):
        choose_attention("sdqa", torch.device("cpu"), torch.float32, 8)


def plain_attention(q, k, v, layout):
    """Segment by segment, with the whole matrix of scores."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    outs = []
    for (q0, q1), (k0, k1) in zip(
        *(itertools.pairwise(x.tolist()) for x in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    ):
        rows = torch.arange(k0, k1) if layout.kv_rows is None else layout.kv_rows[k0:k1]
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], k[rows]) * q.shape[-1] ** -0.5
        hidden = torch.ones(q1 - q0, k1 - k0, device=q.device).tril(k1 - k0 - q1 + q0) == 0
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v[rows]))
    return torch.cat(outs)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("implementation", attention.IMPLEMENTATIONS)
def test_all_attention_that_this_machine_has_agrees(implementation, kv_heads, shared):
    """The error against fp32 is at most twice that of plain attention in the same dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() and implementation != "avx512" else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" or implementation == "avx512" else torch.float32
    try:
        chosen = choose_attention(implementation, device, dtype, 32)
    except ValueError as error:
        assert implementation != "sdpa"
        pytest.skip(str(error))
    layout = branches((6, 1, 290), 70)[0] if shared else AttentionLayout.of_lengths([70, 1, 296])
    layout = layout.map(lambda x: x.to(device))
    exact = [torch.randn(367, n, 32, device=device) for n in (4, kv_heads, kv_heads)]
    exact = [x.to(dtype).double().requires_grad_() for x in exact]
    grad = torch.randn(367, 4, 32, device=device).to(dtype)

    def outcome(function, tensors):
        out = function(*tensors, layout)
        return [out, *torch.autograd.grad(out, tensors, grad.to(out.dtype))]

    expected = outcome(plain_attention, exact)
    given = [x.detach().to(dtype).requires_grad_() for x in exact]
    found = outcome(chosen, given)
    for ours, eager, true in zip(found, outcome(plain_attention, given), expected):
        allowed = 2 * (eager.double() - true).abs().max() + 1e-6 * true.abs().max()
        assert (ours.double() - true).abs().max() <= allowed


@pytest.mark.parametrize("segments", SEGMENTS.values(), ids=SEGMENTS)
@pytest.mark.parametrize("heads, kv_heads, channels", [(4, 4, 32), (6, 2, 24), (3, 1, 5)])
@pytest.mark.parametrize("dtype", FLOORS, ids=str)
def test_sdpa_equals_plain_attention(segments, heads, kv_heads, channels, dtype):
    """It serves bf16 too, on a CPU that multiplies none, or that no compiler builds kernels for."""

    def sdpa(q, k, v, q_bounds, k_bounds):
        return SDPA(q, k, v, AttentionLayout(q_bounds, 0, k_bounds, 0))

    given = inputs(segments, heads, kv_heads, channels, dtype)
    found = results(sdpa, *given, segments)
    exact = results(plain, *(x.double() for x in given), segments)
    assert_close_to_exact(found, results(plain, *given, segments), exact)
