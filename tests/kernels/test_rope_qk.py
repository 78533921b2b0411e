"""rope_qk: values and gradients against fp64 and against the definition, in place and not, far positions."""

import cmath

import fastvid_kernels.rope_qk as kernel_module
import pytest
import torch
from fastvid_kernels.rope_qk import rope_qk, rope_qk_reference
from harness import DEVICE, DTYPES, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "auto"]  # which is what CPUs compute their own way, where there is no GPU
# rows, query heads, key heads, channels per head; the last two take several programs a row
SHAPES = [(1, 1, 1, 2), (7, 4, 4, 8), (9, 6, 2, 6), (0, 2, 1, 4), (3, 32, 2, 128), (2, 9, 3, 200)]


def inputs(rows, heads, kv_heads, channels, dtype=torch.float32, seed=0, furthest=3000):
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * channels, generator=generator).to(DEVICE, dtype).requires_grad_()
    positions = torch.randint(0, furthest, (rows,), generator=generator, dtype=torch.int32).to(DEVICE)
    frequencies = 1 / 10000 ** (torch.arange(0, channels, 2, device=DEVICE) / channels)
    return qkv, positions, frequencies, heads, kv_heads


def exact_rotation(qkv, positions, frequencies, heads, kv_heads, scale):
    """In fp64 but for the angle, which is the product rounded to fp32."""
    angles = (positions.float()[:, None] * frequencies).double()
    return rope_qk_reference(qkv, torch.ones_like(positions), angles[:, None], heads, kv_heads, scale)


def run(function, qkv, rest, grad, **options):
    out = function(qkv, *rest, scale=1.2, **options)
    return out.detach(), *torch.autograd.grad(out, qkv, grad)


def check(case, impl, inplace=False):
    qkv, *rest = case
    grad = torch.randn(qkv.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, qkv.dtype)
    found = run(
        lambda x, *args, **options: rope_qk(x.clone(), *args, **options), qkv, rest, grad, impl=impl, inplace=inplace
    )
    eager = run(rope_qk_reference, qkv, rest, grad)
    exact = run(exact_rotation, qkv.detach().double().requires_grad_(), rest, grad.double())
    for values in zip(found, exact, eager):
        assert_close_as_eager(*values)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_equals_reference(impl, dtype, shape, inplace):
    check(inputs(*shape, dtype), impl, inplace)


@pytest.mark.slow
@given(
    rows=st.integers(0, 4),
    heads=st.integers(1, 20),
    kv_heads=st.integers(1, 20),
    half=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    inplace=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, heads, kv_heads, half, dtype, inplace, seed):
    check(inputs(rows, heads, kv_heads, 2 * half, dtype, seed), "triton", inplace)


@pytest.mark.slow
def test_far_positions():
    """Up to 100,000 radians the rotation of the unit vectors is right to 2 units in the last place."""
    positions = torch.cat([torch.arange(64), torch.arange(99_900, 100_001)]).to(DEVICE)
    frequencies = torch.tensor([1.0, 0.93, 0.5, 0.011, 1e-4], device=DEVICE)
    qkv = torch.zeros(len(positions), 30, device=DEVICE)
    qkv[:, :5] = qkv[:, 15:20] = 1
    found = rope_qk(qkv, positions, frequencies, 1, 1, impl="triton")
    exact = exact_rotation(qkv.double(), positions, frequencies, 1, 1, 1.0)
    assert (found - exact).abs().max() <= 2**-22


@pytest.mark.parametrize("impl", IMPLS)
def test_rotates_pairs_of_halves(impl):
    """Channel i and i + d/2 of a head are one complex number, turned by position · frequency; values are not."""
    qkv, positions, frequencies, heads, kv_heads = inputs(3, 2, 1, 4)
    rows = rope_qk(qkv, positions, frequencies, heads, kv_heads, impl=impl).detach().view(3, 4, 4)
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


@pytest.mark.parametrize("impl", IMPLS)
def test_in_place_writes_there_and_nowhere_else(impl):
    qkv, *rest = inputs(5, 2, 1, 4)
    buffer = qkv.detach().clone()
    out = rope_qk(buffer, *rest, inplace=True, impl=impl)
    assert out.data_ptr() == buffer.data_ptr()
    before = qkv.detach().clone()
    apart = rope_qk(qkv, *rest, impl=impl)
    assert apart.data_ptr() != qkv.data_ptr() and torch.equal(apart, buffer)
    assert torch.equal(qkv, before)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_input_positions_and_gradient(impl):
    qkv, positions, *rest = inputs(5, 2, 1, 4)
    grad = torch.randn(16, device=DEVICE).expand(5, 16)
    strided = torch.nn.functional.pad(qkv.detach(), (1, 2))[:, 1:-2].requires_grad_()
    found = run(rope_qk, strided, [positions.long().repeat_interleave(2)[::2], *rest], grad, impl=impl)
    expected = run(rope_qk, qkv, [positions, *rest], grad.contiguous(), impl=impl)
    assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_again_and_gradient_left_alone(impl):
    qkv, *rest = inputs(5, 3, 1, 40, torch.bfloat16)
    grad = torch.ones_like(qkv)
    first, second = (run(rope_qk, qkv, rest, grad, impl=impl) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    assert torch.equal(grad, torch.ones_like(qkv))


@pytest.mark.parametrize("impl", IMPLS)
def test_saves_positions_and_frequencies_only(impl):
    qkv, positions, frequencies, *heads = inputs(5, 2, 1, 4)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        rope_qk(qkv, positions, frequencies, *heads, impl=impl)
    assert saved == [positions.data_ptr(), frequencies.data_ptr()]


def test_auto_is_triton_on_cuda_only(monkeypatch):
    launches = noted_launches(monkeypatch, kernel_module)
    qkv, *rest = inputs(3, 3, 1, 40)
    run(rope_qk, qkv, rest, torch.ones_like(qkv))
    assert bool(launches) == (DEVICE == "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reference_in_place(dtype):
    qkv, *rest = inputs(5, 2, 1, 4, dtype)
    grad, buffer = torch.ones_like(qkv), []

    def in_place(x, *given, **options):
        buffer.append(x.clone())
        return rope_qk(buffer[0], *given, inplace=True, impl="reference", **options)

    found = run(in_place, qkv, rest, grad)
    assert found[0].data_ptr() == buffer[0].data_ptr()
    assert all(map(torch.equal, found, run(rope_qk_reference, qkv, rest, grad)))


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="rope_qk: impl .* 'fast'"):
        rope_qk(*inputs(2, 2, 1, 4), impl="fast")


@pytest.mark.parametrize("change", [lambda x, p: (x[:, 1:], p), lambda x, p: (x, p[1:])], ids=["channels", "positions"])
def test_shapes_that_do_not_fit_are_refused(change):
    qkv, positions, *rest = inputs(5, 2, 1, 4)
    with pytest.raises(ValueError, match="rope_qk: rows .* do not fit 2"):
        rope_qk(*change(qkv, positions), *rest)


def test_strided_rows_are_not_written_in_place():
    qkv, *rest = inputs(5, 2, 1, 4)
    with pytest.raises(ValueError, match="contiguous"):
        rope_qk(torch.nn.functional.pad(qkv.detach(), (1, 2))[:, 1:-2], *rest, inplace=True)
