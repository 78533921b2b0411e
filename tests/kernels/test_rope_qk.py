"""rope_qk: values and gradients against its reference and against the definition, in place and not."""

import cmath

import pytest
import torch
from fastvid_kernels.rope_qk import rope_qk, rope_qk_reference

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
SHAPES = [(1, 1, 1, 2), (7, 4, 4, 8), (9, 6, 2, 6), (0, 2, 1, 4)]  # rows, query heads, key heads, channels per head


def inputs(rows, heads, kv_heads, channels, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * channels, generator=generator).to(dtype).requires_grad_()
    positions = torch.randint(0, 3000, (rows,), generator=generator, dtype=torch.int32)
    frequencies = 1 / 10000 ** (torch.arange(0, channels, 2) / channels)
    return qkv, positions, frequencies, heads, kv_heads


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inplace", [False, True])
def test_equals_reference(dtype, shape, inplace):
    qkv, *rest = inputs(*shape, dtype)
    grad = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = rope_qk_reference(qkv, *rest, scale=1.2)
    found = rope_qk(qkv.clone(), *rest, scale=1.2, inplace=inplace)
    assert found.dtype == dtype and torch.equal(found, expected)
    (ours,), (theirs,) = torch.autograd.grad(found, qkv, grad), torch.autograd.grad(expected, qkv, grad)
    if ours.numel():
        assert (ours - theirs).abs().max() <= TOLERANCE[dtype] * theirs.abs().max()


def test_rotates_pairs_of_halves():
    """Channel i and i + d/2 of a head are one complex number, turned by position · frequency; values are not."""
    qkv, positions, frequencies, heads, kv_heads = inputs(3, 2, 1, 4)
    rows = rope_qk(qkv, positions, frequencies, heads, kv_heads).detach().view(3, 4, 4)
    given = qkv.detach().view(3, 4, 4)
    for row in range(3):
        for head in range(3):
            for i in range(2):
                angle = positions[row].item() * frequencies[i].item()
                turned = complex(given[row, head, i], given[row, head, i + 2]) * cmath.exp(1j * angle)
                assert complex(rows[row, head, i], rows[row, head, i + 2]) == pytest.approx(turned, abs=1e-3)
    assert torch.equal(rows[:, 3], given[:, 3])


@pytest.mark.parametrize("function", [rope_qk, rope_qk_reference])
def test_gradient_numerically(function):
    qkv, positions, frequencies, *heads = inputs(3, 2, 1, 4, torch.float64)
    assert torch.autograd.gradcheck(lambda x: function(x, positions, frequencies, *heads, scale=0.9), (qkv,))


def test_in_place_writes_there_and_nowhere_else():
    qkv, *rest = inputs(5, 2, 1, 4)
    buffer = qkv.detach().clone()
    out = rope_qk(buffer, *rest, inplace=True)
    assert out.data_ptr() == buffer.data_ptr()
    before = qkv.detach().clone()
    assert rope_qk(qkv, *rest).data_ptr() != qkv.data_ptr()
    assert torch.equal(qkv, before)


def test_backward_leaves_the_incoming_gradient_alone():
    qkv, *rest = inputs(5, 2, 1, 4)
    grad = torch.ones_like(qkv)
    torch.autograd.grad(rope_qk(qkv, *rest), qkv, grad)
    assert torch.equal(grad, torch.ones_like(qkv))


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        rope_qk(*inputs(2, 2, 1, 4), impl="triton")
