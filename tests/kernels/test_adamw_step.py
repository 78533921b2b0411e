"""adamw_step: against its reference, torch's AdamW, the mean of random rounding, and sharding."""

import pytest
import torch
from fastvid_kernels.adamw8bit_step import adamw8bit_step
from fastvid_kernels.adamw_step import adamw_step, adamw_step_reference, round_to_bf16
from harness import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st

OPTIONS = {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-2, "weight_decay": 0.1, "step": 3, "seed": 2**40 + 7}
IMPLEMENTATIONS = ("triton", "reference")


def inputs(count=1000, grad_dtype=torch.bfloat16, seed=0):
    """[param, grad, exp_avg, exp_avg_sq]"""
    generator = torch.Generator().manual_seed(seed)
    param, grad, m, v = (torch.randn(count, generator=generator) for _ in range(4))
    return [x.to(DEVICE) for x in (param.bfloat16(), grad.to(grad_dtype), m * 1e-1, v.square() * 1e-2)]


def run(function, tensors, **options):
    """Copies of param and moments after a step."""
    param, grad, *moments = [x.clone() for x in tensors]
    function(param, grad, *moments, **OPTIONS | options)
    assert torch.equal(grad.view(torch.uint8), tensors[1].view(torch.uint8))
    return param, *moments


def assert_same(found, expected):
    """The same bits interpreted; on a GPU up to roundings of any product."""
    if DEVICE == "cpu":
        assert all(map(torch.equal, found, expected))
        return
    near = torch.isclose(found[0].float(), expected[0].float(), rtol=2**-7, atol=1e-6)
    assert near.all() and (found[0] != expected[0]).sum() <= 2 + 1e-3 * found[0].numel()
    for ours, theirs in zip(found[1:], expected[1:]):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-12)


@pytest.mark.parametrize("first", [0, 5, 2**35 + 3])
@pytest.mark.parametrize("count", [0, 1, 7, 256, 1019, 1020, 1024, 5000])
def test_equals_reference(count, first):
    tensors = inputs(count)
    assert_same(run(adamw_step, tensors, impl="triton", first=first), run(adamw_step_reference, tensors, first=first))


@pytest.mark.slow
@given(
    st.integers(1, 3000),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.integers(1, 10**6),
    st.integers(0, 99),
)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_shape_and_step(count, grad_dtype, step, seed):
    tensors = inputs(count, grad_dtype, seed)
    options = {"step": step, "seed": seed, "clip": torch.tensor(0.3, device=DEVICE), "first": 3 * seed}
    assert_same(run(adamw_step, tensors, impl="triton", **options), run(adamw_step_reference, tensors, **options))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_follows_torch(impl):
    """Three steps of torch's AdamW from the same state: the same moments, and weights that round its."""
    param, grad, *moments = inputs(3000, torch.float32)
    weight = torch.nn.Parameter(param.float())
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1, eps=1e-2)
    optimizer.state[weight] = {
        "step": torch.tensor(2.0),
        "exp_avg": moments[0].clone(),
        "exp_avg_sq": moments[1].clone(),
    }
    for step in range(3, 6):
        weight.grad = grad / step
        with torch.no_grad():
            weight.copy_(param)
        optimizer.step()
        param, *moments = run(adamw_step, [param, grad / step, *moments], impl=impl, step=step)
        state = optimizer.state[weight]
        torch.testing.assert_close(moments, [state["exp_avg"], state["exp_avg_sq"]], rtol=1e-5, atol=1e-8)
        assert ((param.float() - weight).abs() <= 2**-7 * weight.abs() + 1e-6).all()


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_skip_leaves_everything(impl):
    tensors = inputs()
    tensors[1][3] = torch.nan
    kept = run(adamw_step, tensors, impl=impl, skip=torch.ones((), device=DEVICE))
    assert all(map(torch.equal, kept, (tensors[0], *tensors[2:])))
    tensors[1][3] = 0
    off = run(adamw_step, tensors, impl=impl, skip=torch.zeros((), device=DEVICE))
    assert all(map(torch.equal, off, run(adamw_step, tensors, impl=impl))) and not torch.equal(off[0], tensors[0])


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_nothing_around_a_shard_is_touched(impl, first):
    """What lies before and behind the tensors is not written."""
    tensors = inputs(1000)
    longer = [torch.nn.functional.pad(x, (1024, 1024), value=7.0) for x in tensors]
    param, grad, *moments = [x[1024:-1024] for x in longer]
    adamw_step(param, grad, *moments, **OPTIONS, impl=impl, first=first)
    assert all(map(torch.equal, (param, *moments), run(adamw_step, tensors, impl=impl, first=first)))
    assert all((x[:1024] == 7).all() and (x[-1024:] == 7).all() for x in longer)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_sharding_changes_nothing(impl):
    tensors, start = inputs(6000), 2**33 + 6
    whole = run(adamw_step, tensors, impl=impl, first=start)
    parts = [
        run(adamw_step, [x[begin:end] for x in tensors], impl=impl, first=start + begin)
        for begin, end in ((0, 101), (101, 2568), (2568, 6000))
    ]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(whole, zip(*parts)))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_random_bits_are_those_of_the_8_bit_step(impl):
    """Weights of 1 that both steps move by the same lr: they round the same ones up."""
    count, lr = 2**12, 0.3 * 2**-7
    options = OPTIONS | {"lr": lr, "step": 1, "weight_decay": 0.0, "eps": 1e-8, "first": 2**34}
    ours, theirs = (torch.ones(count, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
    grad = torch.full((count,), -1.0, device=DEVICE)
    adamw_step(ours, grad, *(torch.zeros(count, device=DEVICE) for _ in range(2)), **options, impl=impl)
    codes = [torch.zeros(count, dtype=torch.uint8, device=DEVICE) for _ in range(2)]
    scales = [torch.zeros(count // 256, device=DEVICE) for _ in range(2)]
    adamw8bit_step(theirs, grad, *codes, *scales, **options, impl=impl)
    assert (ours != theirs).sum() <= 2 and set(ours.tolist()) == {1.0, 1 + 2**-7}
    assert (ours > 1).double().mean().item() == pytest.approx(0.3, abs=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_random_bits_depend_on_seed_step_and_index(impl):
    tensors = inputs(4096)

    def rounded(**options):
        return run(adamw_step, tensors, impl=impl, weight_decay=0.0, **options)[0]

    usual = rounded()
    for options in ({"seed": 1}, {"seed": OPTIONS["seed"] + 2**32}, {"first": 1}, {"first": 8}, {"first": 2**35}):
        assert 0.1 < (usual != rounded(**options)).float().mean()


def test_any_shape_of_parameter():
    tensors = inputs(768)
    shaped = run(adamw_step, [x.view(3, 256) for x in tensors], impl="triton")
    assert all(torch.equal(a.flatten(), b) for a, b in zip(shaped, run(adamw_step, tensors, impl="triton")))
    assert shaped[0].shape == (3, 256)


def test_rounding_keeps_what_bf16_holds():
    exact = torch.randn(999, device=DEVICE).bfloat16().float()
    assert torch.equal(round_to_bf16(exact, seed=7, step=1, first=5), exact)
