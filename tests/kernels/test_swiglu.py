"""swiglu: values and gradients against its reference, what it saves."""

import pytest
import torch
from fastvid_kernels.swiglu import swiglu, swiglu_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def inputs(rows, channels, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (3 * torch.randn(rows, 2 * channels, generator=generator)).to(dtype).requires_grad_()
    return x, torch.randn(rows, channels, generator=generator).to(dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (5, 33), (0, 16), (64, 128)])
def test_equals_reference(dtype, shape):
    x, grad = inputs(*shape, dtype)
    found, expected = swiglu(x), swiglu_reference(x)
    assert found.dtype == dtype and torch.equal(found, expected)
    (ours,), (theirs,) = torch.autograd.grad(found, x, grad), torch.autograd.grad(expected, x, grad)
    assert ours.dtype == dtype
    if ours.numel():
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def test_strided_input():
    x, grad = inputs(6, 4, torch.float32)
    wide = torch.randn(6, 20)
    wide[:, 3:11] = x.detach()
    view = wide[:, 3:11].requires_grad_()
    assert torch.equal(swiglu(view), swiglu(x))
    assert torch.equal(torch.autograd.grad(swiglu(view), view, grad)[0], torch.autograd.grad(swiglu(x), x, grad)[0])


@pytest.mark.parametrize("function", [swiglu, swiglu_reference])
def test_gradient_numerically(function):
    assert torch.autograd.gradcheck(function, inputs(3, 4, torch.float64)[:1])


def test_large_values_stay_finite():
    x = torch.tensor([[-500.0, 500.0, 2.0, 2.0]], requires_grad=True)
    y = swiglu(x)
    assert y.tolist() == [[0.0, 1000.0]]
    assert torch.isfinite(torch.autograd.grad(y.sum(), x)[0]).all()


def test_saves_its_input_only():
    x, _ = inputs(5, 8, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        swiglu(x)
    assert saved == [x.data_ptr()]


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        swiglu(torch.randn(2, 4), impl="triton")
