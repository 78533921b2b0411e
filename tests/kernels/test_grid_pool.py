"""Pooling to a grid: against torch's adaptive_avg_pool3d in fp64, and frames that are chosen."""

import importlib

import pytest
import torch
from fastvid_kernels import grid_pool
from harness import DEVICE, DTYPES, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import adaptive_avg_pool3d

pytestmark = pytest.mark.usefixtures("poisoned")
each_impl = pytest.mark.parametrize("impl", ["reference", "triton"])
# Frames, the side of their patches, and the grid: of fewer places, of as many, of more.
GRIDS = [
    *((7, 5, grid) for grid in ((2, 2, 2), (3, 2, 2), (2, 3, 1), (1, 1, 1))),
    (3, 3, (3, 3, 3)),
    (2, 2, (3, 3, 3)),
    (4, 3, (4, 3, 3)),
]


def _states(*shape, dtype=torch.float32, seed=0):
    """Mean one, so that a place too many or too few in a mean shows."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(DEVICE, dtype)


def _in_torch(x_TPC, grid):
    side = round(x_TPC.shape[1] ** 0.5)
    x_CTHW = x_TPC.unflatten(1, (side, side)).movedim(-1, 0)
    return adaptive_avg_pool3d(x_CTHW[None], grid)[0].flatten(1).T


def _assert_pooled(x_TPC, grid, impl):
    out = grid_pool(x_TPC, grid, impl=impl)
    assert_close_as_eager(out, _in_torch(x_TPC.double(), grid), _in_torch(x_TPC, grid))
    assert out.is_contiguous() and torch.equal(out, grid_pool(x_TPC, grid, impl=impl))


@each_impl
@pytest.mark.parametrize("sizes, dtype", [*zip(GRIDS, DTYPES * 3)], ids=str)
def test_is_adaptive_avg_pool3d(impl, sizes, dtype):
    T, side, grid = sizes
    _assert_pooled(_states(T, side**2, 33, dtype=dtype), grid, impl)


@pytest.mark.slow
@each_impl
def test_more_places_than_frames_and_patches(impl):
    _assert_pooled(_states(3, 9, 33), (4, 4, 5), impl)


@pytest.mark.slow
@each_impl
@given(
    T=st.integers(1, 9),
    side=st.integers(1, 7),
    C=st.integers(1, 70),
    grid=st.tuples(*(st.integers(1, 5) for _ in range(3))),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape_and_dtype(impl, T, side, C, grid, dtype, seed):
    _assert_pooled(_states(T, side * side, C, dtype=dtype, seed=seed), grid, impl)


@each_impl
def test_a_window_larger_than_a_tile(impl):
    _assert_pooled(_states(5, 81, 300, dtype=torch.float16), (2, 1, 2), impl)


@each_impl
@pytest.mark.parametrize("T, count", [(7, 3), (3, 7), (50, 10), (4, 4)])
def test_frames_are_chosen_evenly(impl, T, count):
    x = _states(T, 16, 9)
    chosen = [step * T // count for step in range(count)]
    out = grid_pool(x, (count, 2, 3), over_time=False, impl=impl)
    expected = torch.cat([_in_torch(frame[None].double(), (1, 2, 3)) for frame in x[chosen]])
    assert_close_as_eager(out, expected, expected.float())


@pytest.mark.parametrize("T, count", [(50, 10), (100, 10), (50, 50), (32, 8), (100, 50)])
def test_the_frames_are_slowfast_llavas(T, count):
    """Of configurations as published; see `grid_pool` for those where rounding in float32 gives others."""
    theirs = torch.linspace(0, T, count + 1).to(torch.int32).tolist()[:-1]
    x = torch.arange(T, dtype=torch.float32)[:, None, None]
    assert grid_pool(x, (count, 1, 1), over_time=False, impl="reference")[:, 0].tolist() == theirs


@each_impl
@pytest.mark.parametrize(
    "strided",
    [
        lambda: _states(5, 17, 6)[:, 1:],
        lambda: _states(6, 16, 5).permute(2, 1, 0),
        lambda: _states(10, 16, 12)[::2, :, ::2],
        lambda: _states(1, 16, 6).expand(5, 16, 6),
    ],
)
def test_strides(impl, strided):
    x = strided()
    before = x.clone()
    _assert_pooled(x, (2, 3, 2), impl)
    assert torch.equal(x, before)


@pytest.mark.slow
@each_impl
def test_accumulates_in_fp32(impl):
    x = torch.full((9, 576, 2), 1000.0, dtype=torch.float16, device=DEVICE)
    assert (grid_pool(x, (1, 1, 1), impl=impl) == 1000).all()
    x = torch.full((9, 576, 2), 257.0, dtype=torch.bfloat16, device=DEVICE)
    assert (grid_pool(x, (2, 1, 1), impl=impl) == x[0, 0, 0]).all()


@each_impl
def test_the_whole_grid_is_the_states_themselves(impl):
    x = _states(3, 16, 40, dtype=torch.float16)
    assert torch.equal(grid_pool(x, (3, 4, 4), impl=impl), x.flatten(0, 1))


def test_auto_takes_the_kernel_on_a_gpu_and_torch_elsewhere(monkeypatch):
    launches = noted_launches(monkeypatch, importlib.import_module("fastvid_kernels.grid_pool"))
    grid_pool(_states(2, 4, 8), (1, 1, 1))
    assert bool(launches) == (DEVICE == "cuda")


@each_impl
def test_a_gradient_is_refused(impl):
    x = _states(2, 4, 8).requires_grad_()
    with pytest.raises(ValueError, match=r"grid_pool has no gradient, .*torch.no_grad\(\)"):
        grid_pool(x, (1, 1, 1), impl=impl)
    with torch.no_grad():
        grid_pool(x, (1, 1, 1), impl=impl)


@pytest.mark.parametrize(
    "x, grid, options, message",
    [
        (torch.zeros(4, 5), (1, 1, 1), {}, r"\[4, 5\]"),
        (torch.zeros(2, 4, 4, dtype=torch.int64), (1, 1, 1), {}, "int64"),
        (torch.zeros(2, 6, 4), (1, 1, 1), {}, "2 of 6"),
        (torch.zeros(0, 4, 4), (1, 1, 1), {}, "0 of 4"),
        (torch.zeros(2, 4, 4), (1, 1), {}, r"\(1, 1\)"),
        (torch.zeros(2, 4, 4), (1, 0, 1), {}, r"\(1, 0, 1\)"),
        (torch.zeros(2, 4, 4), (1, 1, 1), {"impl": "fast"}, "'fast'"),
        (torch.zeros(2, 4, 4, dtype=torch.float64), (1, 1, 1), {"impl": "triton"}, "fp32"),
    ],
)
def test_refusals(x, grid, options, message):
    with pytest.raises(ValueError, match=message):
        grid_pool(x, grid, **options)
