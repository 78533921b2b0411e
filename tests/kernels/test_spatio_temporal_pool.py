"""Pooling against float64 means, the reference's recordings and finite differences."""

import hashlib
import importlib
import json

import numpy as np
import pytest
import torch
from fastvid_kernels import spatio_temporal_pool
from harness import DEVICE, DTYPES, assert_close_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
each_impl = pytest.mark.parametrize("impl", ["reference", "triton"])


def _exact(x_TPC, num_temporal):
    x_TPC = x_TPC.double()
    T, P, C = x_TPC.shape
    zeros = x_TPC.new_zeros(num_temporal - T, C)
    temporal = x_TPC.mean(1) if P else x_TPC.new_zeros(T, C)
    spatial = x_TPC.mean(0) if T else x_TPC.new_zeros(P, C)
    return torch.cat([temporal, zeros, spatial])


def _eager(x_TPC, num_temporal):
    """As `_exact`, by torch's own means in x's dtype."""
    T, P, C = x_TPC.shape
    temporal = x_TPC.mean(1) if P else x_TPC.new_zeros(T, C)
    spatial = x_TPC.mean(0) if T else x_TPC.new_zeros(P, C)
    return torch.cat([temporal, x_TPC.new_zeros(num_temporal - T, C), spatial])


def _states(*shape, dtype=torch.float32, seed=0):
    """Mean one, so that a row too many or too few in a mean shows."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(DEVICE, dtype)


def _assert_pooled(x_TPC, num_temporal, impl):
    out = spatio_temporal_pool(x_TPC, num_temporal=num_temporal, impl=impl)
    T = x_TPC.shape[0]
    assert (out[T:num_temporal] == 0).all()
    assert_close_as_eager(out, _exact(x_TPC, num_temporal), _eager(x_TPC, num_temporal))
    assert torch.equal(out, spatio_temporal_pool(x_TPC, num_temporal=num_temporal, impl=impl))


@pytest.mark.slow
@each_impl
@given(
    T=st.integers(0, 9),
    P=st.integers(0, 40),
    C=st.integers(1, 70),
    extra=st.integers(0, 9),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape_and_dtype(impl, T, P, C, extra, dtype, seed):
    _assert_pooled(_states(T, P, C, dtype=dtype, seed=seed), T + extra, impl)


@pytest.mark.parametrize("patches", [576, 256])
@pytest.mark.parametrize("videos", [1, 2, 8])
def test_frames_are_cut_into_runs_only_within_one_wave(videos, patches):
    """More programs than a GPU holds at once would leave it nearly empty at the end."""
    module = importlib.import_module("fastvid_kernels.spatio_temporal_pool")
    block_p, block_c, of_block, run_frames, *_ = module._tiles(videos, 100, patches, 1024, 2)
    programs, runs = videos * -(-patches // of_block) * (1024 // block_c), -(-100 // run_frames)
    assert runs == 1 or programs * runs <= module.ENOUGH < programs * (runs + 1)
    assert patches % of_block == 0 and of_block == block_p  # none of a tile's rows is masked


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T, P, C", [(1, 1, 1), (3, 300, 130), (17, 129, 65)])
def test_larger_than_a_tile(impl, dtype, T, P, C):
    _assert_pooled(_states(T, P, C, dtype=dtype), T, impl)


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("counts", [[0], [3, 0, 5], [17, 1, 16, 9]])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_batch_reads_nothing_behind_the_real_frames(impl, counts, as_tensor):
    x = _states(len(counts), 17, 6, 7)
    for video, count in zip(x, counts):
        video[count:] = float("nan")
    out = spatio_temporal_pool(
        x, num_temporal=20, frame_counts=torch.tensor(counts) if as_tensor else counts, impl=impl
    )
    assert out.shape == (len(counts), 26, 7)
    for video, count, pooled in zip(x, counts, out):
        assert (pooled[count:20] == 0).all()
        assert_close_as_eager(pooled, _exact(video[:count], 20), _eager(video[:count], 20))


@each_impl
def test_no_videos(impl):
    assert spatio_temporal_pool(_states(0, 5, 6, 7), num_temporal=8, frame_counts=[], impl=impl).shape == (0, 14, 7)


@each_impl
@pytest.mark.parametrize(
    "strided",
    [
        lambda: _states(2, 5, 9, 6)[:, :, 1:],
        lambda: _states(6, 9, 5, 2).permute(3, 2, 1, 0),
        lambda: _states(2, 10, 9, 12)[:, ::2, :, ::2],
        lambda: _states(2, 1, 9, 6).expand(2, 5, 9, 6),
    ],
)
def test_strides(impl, strided):
    x = strided()
    before = x.clone()
    for video, out in zip(x, spatio_temporal_pool(x, num_temporal=10, impl=impl)):
        assert_close_as_eager(out, _exact(video, 10), _eager(video, 10))
    assert torch.equal(x, before)


@each_impl
def test_accumulates_in_fp32(impl):
    x = torch.full((9, 576, 2), 1000.0, dtype=torch.float16, device=DEVICE)
    assert (spatio_temporal_pool(x, num_temporal=9, impl=impl) == 1000).all()


def test_gradients():
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spatio_temporal_pool(x, num_temporal=5), x)
    assert torch.autograd.gradcheck(lambda x: spatio_temporal_pool(x, num_temporal=5, frame_counts=[0, 2]), x)
    assert torch.autograd.gradcheck(lambda x: spatio_temporal_pool(x[0, :, 1:], num_temporal=3), x)


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 3], [0, 2], [1, 3]])
@pytest.mark.parametrize("T, P, C", [(3, 4, 5), (18, 35, 3)])
def test_gradients_of_each_dtype(impl, dtype, counts, T, P, C):
    whole = _states(2, T, P + 1, C, dtype=dtype).requires_grad_()
    out = spatio_temporal_pool(whole[:, :, 1:], num_temporal=T + 2, frame_counts=counts, impl=impl)
    out_gradient = torch.randn(out.shape).to(out)
    out.backward(out_gradient)
    assert (whole.grad[:, :, 0] == 0).all()
    for gradient, out_g, count in zip(whole.grad[:, :, 1:], out_gradient, counts):
        assert (gradient[count:] == 0).all()
        exact, eager = ((g[:count, None] / P + g[None, T + 2 :] / max(count, 1)) for g in (out_g.double(), out_g))
        assert_close_as_eager(gradient[:count], exact, eager)


@each_impl
def test_saves_nothing_but_counts(impl):
    x = _states(1, 3, 4, 5).requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor.numel()) or tensor, lambda t: t):
        spatio_temporal_pool(x, num_temporal=5, frame_counts=[2], impl=impl)
    assert sum(saved) <= 1


@pytest.mark.parametrize(
    "x, options, message",
    [
        (torch.zeros(4, 5), {}, r"\[4, 5\]"),
        (torch.zeros(2, 3, 4, dtype=torch.int64), {}, "int64"),
        (torch.zeros(101, 2, 3), {}, "101 frames"),
        (torch.zeros(3, 2, 3), {"frame_counts": [3]}, "single video"),
        (torch.zeros(2, 3, 2, 3), {"frame_counts": [3]}, "2 integers"),
        (torch.zeros(2, 3, 2, 3), {"frame_counts": [3, 4]}, r"\[0, 3\]"),
        (torch.zeros(2, 3, 2, 3), {"frame_counts": [3, -1]}, r"\[0, 3\]"),
        (torch.zeros(3, 2, 3), {"impl": "fast"}, "'fast'"),
    ],
)
def test_refusals(x, options, message):
    with pytest.raises(ValueError, match=message):
        spatio_temporal_pool(x, **options)


def test_triton_is_not_silently_replaced():
    with pytest.raises(ValueError, match="fp32"):
        spatio_temporal_pool(torch.zeros(1, 2, 3, dtype=torch.float64), impl="triton")


@pytest.mark.slow
@each_impl
@pytest.mark.parametrize("case", ["a", "c", "d"])
def test_recordings(golden, case, impl):
    recorded = np.load(golden / "pool.npz")
    meta = json.loads((golden / "pool.meta.json").read_text())["cases"][case]
    (T, S, C), random = meta["shape"], np.random.default_rng(meta["seed"])
    x = random.standard_normal((T, S, C), dtype=np.float32) * np.float32(1.5)
    outliers = random.permutation(C)[: max(1, C // 16)]
    x[..., outliers] *= 40
    x += random.standard_normal((1, 1, C), dtype=np.float32)
    x[..., outliers[0]] += 200
    x = x.astype(np.float16)
    assert hashlib.sha256(x.tobytes()).hexdigest() == meta["input_sha256"]
    out = spatio_temporal_pool(torch.from_numpy(x).to(DEVICE), impl=impl).cpu().numpy()
    means = [x.mean(1, np.float64), np.zeros((100 - T, C)), x.mean(0, np.float64)]
    for expected in (recorded[f"{case}_out"], np.concatenate(means).astype(np.float16)):
        steps = np.abs(_order(out) - _order(expected))
        assert steps.max() <= 1
        assert (steps != 0).sum() <= steps.size / 10_000
    assert (out[T:100] == 0).all()


def _order(values):
    """fp16 as integers, neighbours one apart."""
    bits = values.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
