"""quick_gelu: values against fp64, and no gradient."""

import fastvid_kernels.quick_gelu as kernel_module
import pytest
import torch
from fastvid_kernels.quick_gelu import quick_gelu, quick_gelu_reference
from harness import DEVICE, DTYPES, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "auto"]  # which is what CPUs compute their own way, where there is no GPU


def inputs(shape, dtype, seed=0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def check(x, impl):
    assert_close_as_eager(quick_gelu(x, impl=impl), quick_gelu_reference(x.double()), quick_gelu_reference(x))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (1,), (5, 33), (2, 3, 700)], ids=str)
def test_equals_reference(impl, dtype, shape):
    check(inputs(shape, dtype), impl)


@given(elements=st.integers(0, 3000), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_size(elements, dtype, seed):
    check(inputs(elements, dtype, seed), "triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_is_the_activation_of_transformers(dtype):
    from transformers.activations import ACT2FN

    x = inputs((40, 50), dtype)
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.float32 else {"rtol": 2**-9, "atol": 2**-12}
    torch.testing.assert_close(quick_gelu(x, impl="reference"), ACT2FN["quick_gelu"](x), **tolerance)


@pytest.mark.parametrize("impl", IMPLS)
def test_large_values_stay_finite(impl):
    assert quick_gelu(torch.tensor([-500.0, 500.0, 0.0], device=DEVICE), impl=impl).tolist() == [0.0, 500.0, 0.0]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_is_left_alone(impl):
    wide = inputs((6, 9), torch.float32)
    before, view = wide.clone(), wide[:, 2:7].T
    assert torch.equal(quick_gelu(view, impl=impl), quick_gelu(view.contiguous(), impl=impl))
    assert torch.equal(wide, before)


def test_auto_takes_the_kernel_on_a_gpu_and_torch_elsewhere(monkeypatch):
    launches = noted_launches(monkeypatch, kernel_module)
    x = inputs((5, 33), torch.float32)
    quick_gelu(x)
    assert bool(launches) == (DEVICE == "cuda")


@pytest.mark.parametrize("impl", IMPLS)
def test_a_gradient_is_refused(impl):
    x = inputs((2, 3), torch.float32).requires_grad_()
    with pytest.raises(ValueError, match=r"quick_gelu has no gradient, .*torch.no_grad\(\)"):
        quick_gelu(x, impl=impl)
    with torch.no_grad():
        quick_gelu(x, impl=impl)


def test_integers_are_refused():
    with pytest.raises(ValueError, match="quick_gelu: x must be floating-point, found torch.int64"):
        quick_gelu(torch.arange(3))


def test_unknown_implementation():
    with pytest.raises(ValueError, match="quick_gelu: impl .* 'fast'"):
        quick_gelu(torch.randn(2), impl="fast")
