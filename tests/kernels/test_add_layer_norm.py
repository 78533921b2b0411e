"""add_layer_norm: values against fp64, and no gradient."""

import pytest
import torch
from fastvid_kernels.add_layer_norm import add_layer_norm, add_layer_norm_reference
from harness import DEVICE, DTYPES, assert_close_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "reference"]


def inputs(rows, channels, dtype, *, add=True, seed=0, offset=0.0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    values = (
        offset + normal(rows, channels),
        normal(rows, channels) if add else None,
        1 + normal(channels) / 10,
        normal(channels),
    )
    return tuple(None if x is None else x.to(DEVICE, dtype) for x in values)


def check(given, impl, eps=1e-5):
    found, eager = add_layer_norm(*given, eps, impl=impl), add_layer_norm_reference(*given, eps)
    assert torch.equal(found[0], eager[0])
    # The norm is that of the rounded sum.
    exact = add_layer_norm_reference(found[0].double(), None, *(x.double() for x in given[2:]), eps)[1]
    assert_close_as_eager(found[1], exact, eager[1])


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("add", [True, False], ids=["add", "no branch"])
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (0, 16), (64, 128), (2, 1408)], ids=str)
def test_equals_reference(impl, dtype, add, shape):
    check(inputs(*shape, dtype, add=add), impl)


@pytest.mark.slow
@given(
    rows=st.integers(0, 5),
    channels=st.integers(1, 1500),
    dtype=st.sampled_from(DTYPES),
    add=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, channels, dtype, add, seed):
    check(inputs(rows, channels, dtype, add=add, seed=seed), "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_far_from_zero(impl):
    """The variance is that of the centred row: of squares less the mean's square, nothing would be left."""
    check(inputs(4, 200, torch.float32, add=False, offset=3000.0), impl)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_constant_row_is_the_offset(impl):
    bias = torch.arange(6.0, device=DEVICE)
    y = add_layer_norm(torch.full((2, 6), 7.0, device=DEVICE), None, torch.ones_like(bias), bias, 1e-5, impl=impl)[1]
    assert torch.equal(y, bias.expand(2, 6))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_norm_is_that_of_the_rounded_sum(impl):
    x = torch.full((2, 6), 300.0, device=DEVICE, dtype=torch.bfloat16)
    branch = torch.linspace(-0.9, 0.9, 6, device=DEVICE, dtype=torch.bfloat16).expand(2, 6)  # less than half a step
    total, y = add_layer_norm(x, branch, x[0], x[0], 1e-5, impl=impl)
    assert torch.equal(total, x) and torch.equal(y, x)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_variance_counts(impl):
    given = inputs(3, 40, torch.float32)
    found, other = (add_layer_norm(*given, eps, impl=impl)[1] for eps in (1e-5, 1.0))
    assert not torch.allclose(found, other, rtol=0.1)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_are_left_alone(impl):
    dense = inputs(6, 40, torch.float32)
    apart = [torch.nn.functional.pad(x, (3, 9))[..., 3:-9] for x in dense]
    copies = [x.clone() for x in apart]
    found = add_layer_norm(*apart, 1e-5, impl=impl)
    assert all(map(torch.equal, found, add_layer_norm(*dense, 1e-5, impl=impl)))
    assert all(map(torch.equal, apart, copies))


@pytest.mark.parametrize("impl", IMPLS)
def test_what_is_not_a_number_stays_in_its_row(impl):
    x, b, *rest = inputs(5, 33, torch.float32)
    x[2, 7] = float("nan")
    total, y = add_layer_norm(x, b, *rest, 1e-5, impl=impl)
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all() and total.isnan().sum() == 1


def test_auto_takes_the_kernel_on_a_gpu_and_torch_elsewhere():
    given = inputs(5, 33, torch.float32)
    expected = add_layer_norm(*given, 1e-5, impl="triton" if DEVICE == "cuda" else "reference")
    assert all(map(torch.equal, add_layer_norm(*given, 1e-5), expected))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("which", range(4))
def test_a_gradient_is_refused(impl, which):
    given = inputs(2, 8, torch.float32)
    given[which].requires_grad_()
    with pytest.raises(ValueError, match=r"add_layer_norm has no gradient, .*torch.no_grad\(\)"):
        add_layer_norm(*given, 1e-5, impl=impl)
    with torch.no_grad():
        add_layer_norm(*given, 1e-5, impl=impl)


def test_shapes_and_dtypes_that_do_not_fit():
    x, b, weight, bias = inputs(2, 8, torch.float32)
    for misfit in (
        (x, b[:1], weight, bias),
        (x, b, weight[:4], bias),
        (x, b, weight, bias[:4]),
        (x[None], b[None], weight, bias),
    ):
        with pytest.raises(ValueError, match=r"add_layer_norm: residual and branch must be \[N, D\]"):
            add_layer_norm(*misfit, 1e-5)
    with pytest.raises(ValueError, match="add_layer_norm: all must have one dtype, found .*torch.float16"):
        add_layer_norm(x, b.half(), weight, bias, 1e-5)
    with pytest.raises(ValueError, match="add_layer_norm: impl .* 'fast'"):
        add_layer_norm(x, b, weight, bias, 1e-5, impl="fast")
