"""add_rms_norm: values and gradients against its reference, what it saves."""

import pytest
import torch
from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference

DTYPES = {  # residual, branch and output, weight
    "fp32": (torch.float32, torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "bf16, fp32 weight": (torch.bfloat16, torch.bfloat16, torch.float32),
    "fp32 residual": (torch.float32, torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16, torch.float16),
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def inputs(rows, channels, residual, branch, weight, *, add=True, trained=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator).to(residual).requires_grad_()
    b = torch.randn(rows, channels, generator=generator).to(branch).requires_grad_() if add else None
    w = (1 + torch.randn(channels, generator=generator) / 10).to(weight).requires_grad_(trained)
    return x, b, w


def run(function, x, b, w, dtype, seed=1):
    total, y = function(x, b, w, 1e-5, dtype)
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(t.shape, generator=generator).to(t.dtype) for t in (total, y)]
    sources = [t for t in (x, b, w) if t is not None and t.requires_grad]
    return total, y, *torch.autograd.grad((total, y), sources, grads)


def assert_near(found, expected, tolerance):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    if found.numel():
        error = (found.double() - expected.double()).abs().max()
        assert error <= tolerance * expected.double().abs().max(), f"{error}"


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8), (5, 33), (0, 16), (64, 128)])
@pytest.mark.parametrize("add", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_equals_reference(dtypes, shape, add, trained):
    residual, branch, weight = DTYPES[dtypes]
    case = inputs(*shape, residual, branch, weight, add=add, trained=trained)
    found, expected = (run(f, *case, branch) for f in (add_rms_norm, add_rms_norm_reference))
    assert len(found) == len(expected) == 3 + add + trained
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    for ours, theirs in zip(found, expected):
        assert_near(ours, theirs, TOLERANCE[theirs.dtype])


def test_is_torchs_rms_norm_of_the_sum():
    """On rows so small that eps decides."""
    x, b, w = (t.detach() for t in inputs(4, 6, *[torch.float32] * 3))
    total, y = add_rms_norm(x / 300, b / 300, w, 1e-5, torch.float32)
    assert torch.equal(total, x / 300 + b / 300)
    assert_near(y, torch.nn.functional.rms_norm(total, (6,), w, 1e-5), 1e-6)


@pytest.mark.parametrize("function", [add_rms_norm, add_rms_norm_reference])
def test_gradient_numerically(function):
    x, b, w = inputs(3, 5, *[torch.float64] * 3)
    assert torch.autograd.gradcheck(lambda x, b, w: function(x, b, w, 1e-5, torch.float64), (x, b, w))


def test_only_one_output_used():
    x, b, w = inputs(4, 6, *[torch.float64] * 3)
    for pick in (0, 1):
        found, expected = (torch.autograd.grad(f(x, b, w, 1e-5, torch.float64)[pick].square().sum(), (x, b))
                           for f in (add_rms_norm, add_rms_norm_reference))
        for ours, theirs in zip(found, expected):
            assert_near(ours, theirs, 1e-12)


def test_saves_the_sum_and_a_number_per_row():
    x, b, w = inputs(16, 32, torch.bfloat16, torch.bfloat16, torch.bfloat16, trained=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        total, _ = add_rms_norm(x, b, w, 1e-5, torch.bfloat16)
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), b.data_ptr(), w.data_ptr())]
    assert sorted(t.nbytes for t in new) == [16 * 4, total.nbytes]


def test_inputs_are_left_alone():
    x, b, w = inputs(4, 6, *[torch.float32] * 3)
    before = [t.detach().clone() for t in (x, b, w)]
    run(add_rms_norm, x, b, w, torch.float32)
    assert all(torch.equal(t, copy) for t, copy in zip((x, b, w), before))


def test_unknown_implementation_is_refused():
    x, b, w = inputs(4, 6, *[torch.float32] * 3)
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        add_rms_norm(x, b, w, 1e-5, torch.float32, impl="triton")
