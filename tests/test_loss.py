"""linear_cross_entropy: values and gradients against plain torch, chunks, what exists at once."""

import pytest
import torch
from model_cases import LiveBytes, assert_close

import fastvid.model.loss as loss_module
from fastvid.model.loss import chunk_rows, linear_cross_entropy, linear_cross_entropy_reference


def inputs(rows=37, channels=16, vocabulary=50, dtype=torch.float32, weight_dtype=None, trained=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, channels, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, channels, generator=generator).to(weight_dtype or dtype).requires_grad_(trained)
    return h, weight, torch.randint(0, vocabulary, (rows,), generator=generator)


def run(function, h, weight, targets, scale=0.37):
    loss, lse = function(h, weight, targets)
    sources = [x for x in (h, weight) if x.requires_grad]
    return loss, lse, torch.autograd.grad(loss * scale, sources)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 500)  # 10 rows of 50


@pytest.mark.parametrize("rows", [1, 9, 10, 11, 37])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_plain_torch(rows, trained, small_chunks):
    case = inputs(rows, trained=trained)
    loss, lse, found = run(linear_cross_entropy, *case)
    expected_loss, expected_lse, expected = run(linear_cross_entropy_reference, *case)
    assert loss.dtype == lse.dtype == torch.float32 and not lse.requires_grad
    assert_close(loss, expected_loss)
    assert_close(lse, expected_lse)
    assert len(found) == 1 + trained
    for ours, theirs in zip(found, expected):
        assert_close(ours, theirs)


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_reference])
def test_gradient_numerically(function, small_chunks):
    h, weight, targets = inputs(12, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, weight: function(h, weight, targets)[0], (h, weight))


def test_bf16_rows_and_fp32_head():
    """The head is rounded to the rows' dtype; its gradient is fp32. At most twice as far from fp64 as plain torch."""
    h, weight, targets = inputs(64, 32, 80, torch.bfloat16, torch.float32)
    exact = run(linear_cross_entropy_reference, h.detach().double().requires_grad_(),
                weight.detach().bfloat16().double().requires_grad_(), targets)
    ours, plain = (run(f, h, weight, targets) for f in (linear_cross_entropy, linear_cross_entropy_reference))
    assert ours[2][0].dtype == torch.bfloat16 and ours[2][1].dtype == torch.float32
    for found, eager, truth in zip((ours[0], *ours[2]), (plain[0], *plain[2]), (exact[0], *exact[2])):
        error, allowed = ((x.double() - truth).abs().max() for x in (found, eager))
        assert error <= 2 * allowed + 1e-6


def test_large_logits_do_not_overflow():
    h, weight, targets = inputs()
    case = (h.detach() * 1000).requires_grad_(), weight, targets
    found, expected = run(linear_cross_entropy, *case), run(linear_cross_entropy_reference, *case)
    assert_close(found[0], expected[0])
    assert all(torch.isfinite(gradient).all() for gradient in found[2])


def test_no_rows_give_zero_and_zero_gradients():
    h, weight, targets = inputs(0)
    loss, lse, found = run(linear_cross_entropy, h, weight, targets)
    assert loss.item() == 0 and lse.shape == (0,)
    assert found[0].shape == (0, 16) and not found[1].any()


def test_inputs_are_left_alone_and_backward_repeats(small_chunks):
    h, weight, targets = inputs()
    before = h.detach().clone(), weight.detach().clone()
    loss, _ = linear_cross_entropy(h, weight, targets)
    first = torch.autograd.grad(loss, (h, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (h, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert torch.equal(h, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("trained", [True, False])
def test_saves_gradients_and_not_logits(trained):
    h, weight, targets = inputs(4000, 8, 100, trained=trained)
    with LiveBytes() as live:
        results = linear_cross_entropy(h, weight, targets)
        assert live.total() == sum(x.nbytes for x in results) + 4 * (4000 * 8 + trained * 100 * 8)


def test_the_largest_tensor_is_a_chunk(small_chunks):
    h, weight, targets = inputs(200, trained=False)
    with LiveBytes() as live:
        linear_cross_entropy(h, weight, targets)
    assert max(size for _, size in live.storages.values()) == max(4 * 500, h.nbytes)
    assert live.peak < h.nbytes + 4 * 200 + 3 * 4 * 500


def test_without_gradients_a_trained_head_costs_what_a_frozen_one_does(small_chunks):
    peaks = []
    for trained in (True, False):
        case = inputs(200, trained=trained)
        with torch.no_grad(), LiveBytes() as live:
            linear_cross_entropy(*case)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] < case[0].nbytes


def test_chunks_stay_within_their_bytes():
    assert chunk_rows(32003) * 32003 * (4 + 2) <= 192 * 2**20
    assert chunk_rows(10**9) == 1
