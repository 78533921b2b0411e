"""swiglu: values and gradients against fp64, what it saves."""

import fastvid_kernels.swiglu as kernel_module
import pytest
import torch
from fastvid_kernels.quantize_fp8 import quantize_fp8
from fastvid_kernels.swiglu import swiglu, swiglu_backward_fp8, swiglu_fp8, swiglu_reference
from harness import DEVICE, DTYPES, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "auto"]  # which is what CPUs compute their own way, where there is no GPU


def inputs(rows, channels, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, grad = 3 * torch.randn(rows, 2 * channels, generator=generator), torch.randn(rows, channels, generator=generator)
    return x.to(DEVICE, dtype).requires_grad_(), grad.to(DEVICE, dtype)


def run(function, x, grad):
    out = function(x)
    return out.detach(), *torch.autograd.grad(out, x, grad)


def check(x, grad, impl):
    found = run(lambda x: swiglu(x, impl=impl), x, grad)
    eager = run(swiglu_reference, x, grad)
    exact = run(swiglu_reference, x.detach().double().requires_grad_(), grad.double())
    for values in zip(found, exact, eager):
        assert_close_as_eager(*values)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (0, 16), (4, 0), (64, 128), (2, 2500)])
def test_equals_reference(impl, dtype, shape):
    check(*inputs(*shape, dtype), impl)


@pytest.mark.slow
@given(rows=st.integers(0, 5), channels=st.integers(1, 2100), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, channels, dtype, seed):
    check(*inputs(rows, channels, dtype, seed), "triton")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "strided",
    [
        lambda x: torch.nn.functional.pad(x, (3, 9))[:, 3:-9],
        lambda x: x.T.contiguous().T,
        lambda x: x[:1].expand(6, -1),
    ],
    ids=["columns", "transposed", "expanded"],
)
def test_strided_input_and_gradient(impl, strided):
    x, grad = inputs(6, 4, torch.float32)
    view = strided(x.detach()).requires_grad_()
    found = run(lambda x: swiglu(x, impl=impl), view, strided(grad))
    expected = run(
        lambda x: swiglu(x, impl=impl), view.detach().contiguous().requires_grad_(), strided(grad).contiguous()
    )
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected))


@pytest.mark.parametrize("function", [swiglu, swiglu_reference])
def test_gradient_numerically(function):
    assert torch.autograd.gradcheck(function, inputs(3, 4, torch.float64)[:1])


@pytest.mark.parametrize("impl", IMPLS)
def test_large_values_stay_finite(impl):
    x = torch.tensor([[-500.0, 500.0, 2.0, 2.0]], device=DEVICE, requires_grad=True)
    y = swiglu(x, impl=impl)
    assert y.tolist() == [[0.0, 1000.0]]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [[0.0, 2.0, 0.0, 500.0]]


@pytest.mark.parametrize("impl", IMPLS)
def test_saves_its_input_only(impl):
    x, _ = inputs(5, 8, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x, impl=impl)
    assert saved == [x.data_ptr()]


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_again_and_inputs_left_alone(impl):
    x, grad = inputs(7, 70, torch.bfloat16)
    before = x.detach().clone(), grad.clone()
    first, second = (run(lambda x: swiglu(x, impl=impl), x, grad) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


def test_auto_is_triton_on_cuda_only(monkeypatch):
    launches = noted_launches(monkeypatch, kernel_module)
    run(swiglu, *inputs(3, 50, torch.float32))
    assert bool(launches) == (DEVICE == "cuda")


def check_fp8(x, grad, impl="triton"):
    """Rows and gradients in e4m3 equal, to the bit, those of the kernels that are quantised afterwards."""
    before = x.detach().clone(), grad.clone()
    plain = run(lambda x: swiglu(x, impl=impl), x, grad)
    for found, rows in zip((swiglu_fp8(x, impl=impl), swiglu_backward_fp8(x, grad, impl=impl)), plain):
        bits, scale = quantize_fp8(rows, impl=impl)
        assert found[0].dtype == torch.float8_e4m3fn and found[0].is_contiguous() and not found[0].requires_grad
        assert torch.equal(found[0].view(torch.uint8), bits.view(torch.uint8)) and torch.equal(found[1], scale)
    assert torch.equal(x, before[0]) and torch.equal(grad, before[1])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (0, 16), (64, 128), (2, 2500), (2, 11008)])
def test_rows_in_e4m3(dtype, shape):
    check_fp8(*inputs(*shape, dtype))


@pytest.mark.slow
@given(rows=st.integers(0, 5), channels=st.integers(1, 2100), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_rows_in_e4m3_of_any_shape(rows, channels, dtype, seed):
    check_fp8(*inputs(rows, channels, dtype, seed))


def test_rows_in_e4m3_of_the_reference():
    check_fp8(*inputs(5, 33, torch.bfloat16), "reference")


def test_rows_that_registers_cannot_hold_are_quantised_afterwards(monkeypatch):
    monkeypatch.setattr(kernel_module, "LONGEST_FP8_ROW", 512)
    for name in ("_swiglu_fp8_fwd_kernel", "_swiglu_fp8_bwd_kernel"):
        monkeypatch.setattr(kernel_module, name, None)
    check_fp8(*inputs(3, 700, torch.bfloat16))


@pytest.mark.parametrize("channels", [11008, 13824])
def test_rows_of_a_layer_lie_in_registers(channels):
    for backward, most in ((False, 32), (True, 16)):
        block, warps = kernel_module._fp8_tiles(channels, backward)
        assert block >= channels and block // (32 * warps) <= most


@pytest.mark.slow
def test_rows_in_e4m3_of_strided_input_and_gradient():
    x, grad = inputs(6, 4, torch.float32)
    check_fp8(x.detach().T.contiguous().T.requires_grad_(), grad[:1].expand(6, -1))


@pytest.mark.parametrize("where", ["gate", "up", "gradient"])
def test_rows_in_e4m3_show_nan(where):
    x, grad = inputs(4, 40, torch.bfloat16)
    x = x.detach()
    {"gate": x[:, :40], "up": x[:, 40:], "gradient": grad}[where][2, 7] = torch.nan
    rows = [swiglu_backward_fp8(x, grad, impl="triton")]
    rows += [swiglu_fp8(x, impl="triton")] if where != "gradient" else []
    for bits, scale in rows:
        assert scale.isnan().tolist() == [False, False, True, False] and bits.float()[2].isnan().all()


def test_unknown_implementation_of_rows_in_e4m3_is_refused():
    with pytest.raises(ValueError, match="swiglu_fp8: impl .* 'fast'"):
        swiglu_fp8(torch.randn(2, 4), impl="fast")
    with pytest.raises(ValueError, match="swiglu_backward_fp8: impl .* 'fast'"):
        swiglu_backward_fp8(torch.randn(2, 4), torch.randn(2, 2), impl="fast")


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="swiglu: impl .* 'fast'"):
        swiglu(torch.randn(2, 4), impl="fast")


@pytest.mark.parametrize("shape", [(2, 3), (4,), (1, 2, 4)], ids=str)
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"\[N, 2F\]"):
        swiglu(torch.randn(shape))


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("first", [1, 3])
def test_rows_behind_others_have_the_bits_of_rows_alone(impl, first):
    """In one pass over all of them, of which the first get no gradient."""
    every, grad = inputs(5, 33, torch.bfloat16)
    every = every.detach()
    live = every[first:].clone().requires_grad_()
    alone = run(lambda x: swiglu(x, impl=impl), live, grad[first:])
    out, of_every = swiglu(live, every_NF=every, impl=impl)
    assert torch.equal(out, alone[0]) and torch.equal(of_every, swiglu(every, impl=impl))
    assert not of_every.requires_grad
    assert torch.equal(torch.autograd.grad(out, live, grad[first:])[0], alone[1])
