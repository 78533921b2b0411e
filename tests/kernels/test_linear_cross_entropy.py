"""linear_cross_entropy: values and gradients against plain torch, chunks, what exists at once."""

import fastvid_kernels.linear_cross_entropy as kernel_module
import pytest
import torch
from fastvid_kernels import cpu
from fastvid_kernels.linear_cross_entropy import chunk_rows, linear_cross_entropy, linear_cross_entropy_reference
from harness import DEVICE, DTYPES, assert_close_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from model_cases import assert_close

from fastvid.training.live_bytes import LiveBytes

IMPLEMENTATIONS = ("triton", "auto")  # which is what CPUs compute their own way, where there is no GPU


@pytest.fixture(autouse=True)
def poison(poisoned):
    pass


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(kernel_module, "CHUNK_LOGITS", 500)  # 10 rows of 50


def inputs(rows=37, channels=16, vocabulary=50, dtype=torch.float32, weight_dtype=None, trained=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(rows, channels, generator=generator).to(dtype)
    weight = torch.randn(vocabulary, channels, generator=generator).to(weight_dtype or dtype)
    targets = torch.randint(0, vocabulary, (rows,), generator=generator)
    if rows > 1:
        targets[0], targets[-1] = vocabulary - 1, 0
    return h.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(trained), targets.to(DEVICE)


def run(function, h, weight, targets, scale=0.37, **options):
    loss, lse = function(h, weight, targets, **options)
    sources = [x for x in (h, weight) if x.requires_grad]
    return loss, lse, *torch.autograd.grad(loss * scale, sources)


def check(h, weight, targets, **options):
    """Against fp64 on the same logits, which a linear layer rounds: no further away than twice eager torch."""
    found, eager = (
        run(linear_cross_entropy, h, weight, targets, **options),
        run(linear_cross_entropy_reference, h, weight, targets),
    )
    exact = run(
        linear_cross_entropy_reference,
        h.detach().double().requires_grad_(),
        weight.detach().to(h.dtype).double().requires_grad_(weight.requires_grad),
        targets,
    )
    assert found[0].dtype == found[1].dtype == torch.float32 and not found[1].requires_grad
    assert len(found) == 3 + weight.requires_grad
    for ours, truth, theirs in zip(found, exact, eager):
        assert_close_as_eager(ours, truth, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [1, 10, 37])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_eager(rows, trained, dtype, small_chunks):
    check(*inputs(rows, dtype=dtype, trained=trained), impl="triton")


@pytest.mark.parametrize("rows", [1, 9, 10, 11, 37])
@pytest.mark.parametrize("trained", [True, False])
def test_chunks_on_a_cpu_equal_eager(rows, trained, small_chunks):
    check(*inputs(rows, trained=trained), impl="auto")


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_bf16_rows_and_fp32_head(impl):
    """The head is rounded to the rows' dtype; its gradient is fp32."""
    case = inputs(64, 32, 80, torch.bfloat16, torch.float32)
    check(*case, impl=impl)
    gradients = run(linear_cross_entropy, *case, impl=impl)[2:]
    assert [gradient.dtype for gradient in gradients] == [torch.bfloat16, torch.float32]


@pytest.mark.slow
@given(st.integers(0, 5), st.integers(1, 9), st.integers(1, 300), st.sampled_from(DTYPES), st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, channels, vocabulary, dtype, seed):
    check(*inputs(rows, channels, vocabulary, dtype, seed=seed), impl="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_longer_than_a_tile(dtype, monkeypatch):
    """Three tiles, the largest logits in the second."""
    monkeypatch.setattr(kernel_module, "_tiles", lambda vocabulary: (64, 1))
    h, weight, targets = inputs(8, 16, 150, dtype)
    with torch.no_grad():
        weight[100] *= 4
    targets[1:4] = torch.tensor([63, 64, 128])
    check(h, weight, targets, impl="triton")


@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_reference])
def test_gradient_numerically(function, small_chunks):
    h, weight, targets = inputs(12, 4, 7, torch.float64)
    assert torch.autograd.gradcheck(lambda h, weight: function(h, weight, targets)[0], (h, weight))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_large_logits_do_not_overflow(impl):
    h, weight, targets = inputs()
    case = (h.detach() * 1000).requires_grad_(), weight, targets
    found, expected = run(linear_cross_entropy, *case, impl=impl), run(linear_cross_entropy_reference, *case)
    assert_close(found[0], expected[0])
    assert all(torch.isfinite(gradient).all() for gradient in found[2:])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_rows_give_zero_and_zero_gradients(impl):
    loss, lse, grad_h, grad_weight = run(linear_cross_entropy, *inputs(0), impl=impl)
    assert loss.item() == 0 and lse.shape == (0,)
    assert grad_h.shape == (0, 16) and not grad_weight.any()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_rows(impl):
    h, weight, targets = inputs(6)
    wide = torch.full((12, 40), torch.nan, device=DEVICE)
    view = wide[::2, 3:19]
    view.copy_(h.detach())
    found = run(linear_cross_entropy, view.detach().requires_grad_(), weight, targets, impl=impl)
    for ours, theirs in zip(found, run(linear_cross_entropy, h, weight, targets, impl=impl)):
        assert_close(ours, theirs, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_targets(impl):
    h, weight, targets = inputs()
    strided = torch.stack([targets, targets.flip(0)], 1)[:, 0]
    assert not strided.is_contiguous()
    for ours, theirs in zip(
        run(linear_cross_entropy, h, weight, strided, impl=impl),
        run(linear_cross_entropy, h, weight, targets, impl=impl),
    ):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("change", [lambda t: t[1:], lambda t: t.int(), lambda t: t[:, None]])
def test_unfit_targets_are_refused(change):
    h, weight, targets = inputs()
    with pytest.raises(ValueError, match=r"linear_cross_entropy: rows \[37, 16\].* \[L\] torch.int64"):
        linear_cross_entropy(h, weight, change(targets))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_a_trained_heads_gradient_is_summed_in_fp32(impl, dtype, small_chunks, monkeypatch):
    """Of the chunks' logit gradients as they are, the sum of products is exact to fp32, though each factor is bf16."""
    chunks = []
    where = (kernel_module, "_softmax_gradient_triton") if impl == "triton" else (cpu, "softmax_gradient")
    softmax_gradient = getattr(*where)

    def recording(logits_lV, *rest):
        softmax_gradient(logits_lV, *rest)
        chunks.append(logits_lV.double())

    monkeypatch.setattr(*where, recording)
    h, weight, targets = inputs(200, dtype=dtype, weight_dtype=torch.float32)
    found = run(linear_cross_entropy, h, weight, targets, scale=1.0, impl=impl)[-1]
    exact = torch.cat(chunks).T @ h.detach().double()
    assert len(chunks) == 20 and found.dtype == torch.float32
    assert (found - exact).abs().max() <= 2**-21 * exact.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_inputs_are_left_alone_and_runs_repeat(impl, small_chunks):
    h, weight, targets = inputs()
    before = h.detach().clone(), weight.detach().clone()
    loss, lse = linear_cross_entropy(h, weight, targets, impl=impl)
    first = loss, lse, *torch.autograd.grad(loss, (h, weight), retain_graph=True)
    second = loss, lse, *torch.autograd.grad(loss, (h, weight))
    third = run(linear_cross_entropy, h, weight, targets, scale=1.0, impl=impl)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(first, second, third))
    assert torch.equal(h, before[0]) and torch.equal(weight, before[1])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_without_gradients(impl):
    h, weight, targets = inputs(5, 8, 300)
    with torch.no_grad():
        found = linear_cross_entropy(h, weight, targets, impl=impl)
    for ours, theirs in zip(found, linear_cross_entropy_reference(h, weight, targets)):
        assert_close(ours, theirs, 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("trained", [True, False])
def test_saves_gradients_and_not_logits(trained):
    h, weight, targets = inputs(4000, 8, 100, trained=trained)
    with LiveBytes() as live:
        results = linear_cross_entropy(h, weight, targets)
        assert live.now == sum(x.nbytes for x in results) + 4 * (4000 * 8 + trained * 100 * 8)


def test_without_gradients_a_trained_head_costs_what_a_frozen_one_does(small_chunks):
    peaks = []
    for trained in (True, False):
        h, weight, targets = inputs(200, trained=trained)
        with torch.no_grad(), LiveBytes() as live:
            linear_cross_entropy(h, weight, targets)
        peaks.append(live.peak)
    assert peaks[0] == peaks[1] < h.nbytes


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_the_largest_tensor_is_a_chunk(impl, small_chunks):
    h, weight, targets = inputs(200, dtype=torch.bfloat16, trained=False)
    chunk = 10 * 64  # rows of 50 logits begin on cache lines
    with LiveBytes() as live:
        linear_cross_entropy(h, weight, targets, impl=impl)
    assert max(size for _, size in live.storages.values()) == max(2 * chunk, h.nbytes)
    # The kernel works in place (a chunk more is the interpreter's) on a padded head; a CPU's chain holds fp32 copies.
    more = 12 * chunk if impl == "auto" else 2 * 64 * weight.shape[1]
    assert live.peak <= h.nbytes + 3 * 4 * 200 + 2 * 2 * chunk + more


def test_chunks_stay_within_their_bytes():
    assert chunk_rows(32003) * 32064 * (4 + 2) <= 192 * 2**20
    assert chunk_rows(32003) % 128 == 0
    assert chunk_rows(10**9) == 1
