"""quantize_fp8: bits and scales against torch's own conversion, every rounding case, saturation."""

from functools import partial

import fastvid_kernels.quantize_fp8 as kernel_module
import pytest
import torch
from fastvid_kernels.quantize_fp8 import quantize_fp8, quantize_fp8_reference
from harness import DEVICE, DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.model import quantize

SCALES = (None, 0.01)


@pytest.fixture(autouse=True)
def poison(poisoned):
    pass


def inputs(rows, channels, dtype=torch.float32, seed=0):
    """Rows of sizes from 10^-3 to 10^3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator) * 10 ** (6 * torch.rand(rows, 1, generator=generator) - 3)
    return x.to(dtype).to(DEVICE)


def given_scale(value):
    return None if value is None else torch.tensor([value], device=DEVICE)


def assert_same(found, expected):
    (ours, our_scale), (theirs, their_scale) = found, expected
    assert ours.dtype == torch.float8_e4m3fn and ours.is_contiguous() and our_scale.dtype == torch.float32
    assert torch.equal(our_scale, their_scale)
    different = ours.view(torch.uint8) != theirs.view(torch.uint8)
    both_nan = ours.float().isnan() & theirs.float().isnan()
    assert ours.shape == theirs.shape and not (different & ~both_nan).any()


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (5, 33), (3, 512), (2, 11008), (2, 16385)])
def test_equals_reference(shape, dtype, scale):
    """16385 channels: more than a tile."""
    x = inputs(*shape, dtype)
    assert_same(quantize_fp8(x, given_scale(scale), impl="triton"), quantize_fp8_reference(x, given_scale(scale)))


@pytest.mark.slow
@given(st.integers(1, 6), st.integers(1, 700), st.sampled_from(DTYPES), st.sampled_from(SCALES), st.integers(0, 99))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_any_shape(rows, channels, dtype, scale, seed):
    x = inputs(rows, channels, dtype, seed)
    assert_same(quantize_fp8(x, given_scale(scale), impl="triton"), quantize_fp8_reference(x, given_scale(scale)))


@pytest.mark.parametrize("channels", [4096, 5120, 11008, 13824])
def test_rows_of_a_layer_are_read_once(channels):
    """They lie in registers, of which a thread has enough."""
    block, warps = kernel_module._tiles(channels)
    assert block >= channels and block // (32 * warps) <= 32


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_every_number_and_every_tie(impl):
    """All numbers of e4m3, the middles between them, what lies just beside those, and what saturates, of both signs."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    exact = torch.cat(
        [
            numbers,
            middles,
            torch.nextafter(middles, torch.tensor(1e9)),
            torch.nextafter(middles, torch.tensor(0.0)),
            torch.tensor([1e-40, 449.0, 480.0, 1e30]),
        ]
    )
    x = torch.cat([exact, -exact])[None].to(DEVICE)
    found, _ = quantize_fp8(x, given_scale(1.0), impl=impl)
    found = found.float().cpu()[0]
    count = len(numbers)
    assert torch.equal(found[:count], numbers)
    even = torch.where(torch.arange(count - 1) % 2 == 0, numbers[:-1], numbers[1:])
    assert torch.equal(found[count : 2 * count - 1], even)
    assert torch.equal(found[2 * count - 1 : 3 * count - 2], numbers[1:])
    assert torch.equal(found[3 * count - 2 : 4 * count - 3], numbers[:-1])
    assert found[4 * count - 3 : len(exact)].tolist() == [0, 448, 448, 448]
    assert torch.equal(found[len(exact) :], -found[: len(exact)])


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["triton", "reference"])
@pytest.mark.parametrize("tile", [8192, 64])
def test_a_row_uses_the_whole_range(impl, tile, monkeypatch):
    monkeypatch.setattr(kernel_module, "_tiles", lambda channels: (tile, 1))
    x = inputs(7, 200)
    x[3] = 0
    x[4, 199] = -x[4].abs().max() * 2
    found, scale = quantize_fp8(x, impl=impl)
    top = found.float().abs().amax(1)
    assert top[3] == 0 and scale[3] > 0 and (top[[0, 1, 2, 4, 5, 6]] == 448).all()
    error = (found.float() * scale[:, None] - x).abs()
    assert (error <= 2**-4 * 1.0001 * x.abs() + 2**-10 * scale[:, None]).all()


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_nan_and_infinity_are_seen(impl):
    x = inputs(4, 40)
    x[1, 3], x[2, 5] = torch.nan, torch.inf
    found, scale = quantize_fp8(x, impl=impl)
    assert scale.isfinite().tolist() == [True, False, False, True]
    assert found.float()[1].isnan().all() and found.float()[2, 5].isnan()
    given, _ = quantize_fp8(x, given_scale(1.0), impl=impl)
    assert given.float()[1].isnan().nonzero().tolist() == [[3]] and given.float()[2, 5] == 448


@pytest.mark.slow
@pytest.mark.parametrize("view", ["columns", "rows", "transposed"])
def test_strided_rows(view):
    x = inputs(12, 60, torch.bfloat16)
    x = {"columns": x[:, 7:40], "rows": x[::3], "transposed": x.T}[view]
    assert_same(quantize_fp8(x, impl="triton"), quantize_fp8_reference(x.contiguous()))


def test_input_is_left_alone_and_runs_repeat():
    x = inputs(9, 300)
    before = x.clone()
    assert_same(quantize_fp8(x, impl="triton"), quantize_fp8(x, impl="triton"))
    assert torch.equal(x, before)


@pytest.mark.slow
def test_a_frozen_matrix_multiplies_the_kernels_bits(monkeypatch):
    """The matrix and its transpose, rows, and a gradient that is a part of wider rows."""
    if DEVICE == "cuda" and torch.cuda.get_device_capability() < quantize.FP8_CAPABILITY:
        pytest.skip("no FP8 units")
    weight, x, wider = (
        inputs(*shape, torch.bfloat16, seed) for seed, shape in enumerate([(96, 64), (9, 64), (9, 200)])
    )

    def results(impl):
        monkeypatch.setattr(quantize, "quantize_fp8", partial(quantize_fp8, impl=impl))
        linear = quantize.Fp8Linear(64, 96)
        linear.quantize_(weight)
        leaf = x.clone().requires_grad_()
        y = linear(leaf)
        return [*(buffer.float() for buffer in linear.buffers()), y, *torch.autograd.grad(y, leaf, wider[:, 50:146])]

    assert all(map(torch.equal, results("triton"), results("reference")))
