"""Pooling against float64 means, the reference's recordings and finite differences."""

import hashlib
import json

import numpy as np
import pytest
import torch
from fastvid_kernels import spatio_temporal_pool
from hypothesis import given, settings
from hypothesis import strategies as st

ULP = {torch.float16: 2**-10, torch.bfloat16: 2**-7, torch.float32: 2**-20}  # relative; for fp32 the sum's


def _exact(x_TPC, num_temporal):
    x_TPC = x_TPC.double()
    T, P, C = x_TPC.shape
    zeros = torch.zeros(num_temporal - T, C, dtype=torch.float64)
    temporal = x_TPC.mean(1) if P else torch.zeros(T, C, dtype=torch.float64)
    spatial = x_TPC.mean(0) if T else torch.zeros(P, C, dtype=torch.float64)
    return torch.cat([temporal, zeros, spatial])


def _assert_close(out, exact, x):
    scale = x.abs().amax().double().item() if x.numel() else 0.0
    assert torch.isfinite(out).all()
    assert ((out.double() - exact).abs() <= ULP[out.dtype] * exact.abs() + 2**-20 * scale).all()


@given(T=st.integers(0, 9), P=st.integers(0, 40), C=st.integers(1, 33), extra=st.integers(0, 5),
       dtype=st.sampled_from(list(ULP)), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_any_shape_and_dtype(T, P, C, extra, dtype, seed):
    x = (torch.randn(T, P, C, generator=torch.Generator().manual_seed(seed)) * 3 + 1).to(dtype)
    out = spatio_temporal_pool(x, num_temporal=T + extra)
    assert out.dtype == dtype and out.shape == (T + extra + P, C)
    assert (out[T:T + extra] == 0).all()
    _assert_close(out, _exact(x, T + extra), x)


@given(counts=st.lists(st.integers(0, 5), min_size=0, max_size=4), as_tensor=st.booleans())
@settings(max_examples=30, deadline=None)
def test_batch_reads_nothing_behind_the_real_frames(counts, as_tensor):
    x = torch.randn(len(counts), 5, 6, 7)
    for video, count in zip(x, counts):
        video[count:] = float("nan")
    out = spatio_temporal_pool(x, num_temporal=8, frame_counts=torch.tensor(counts) if as_tensor else counts)
    assert out.shape == (len(counts), 14, 7)
    for i, count in enumerate(counts):
        assert torch.equal(out[i], spatio_temporal_pool(x[i, :count], num_temporal=8))


@pytest.mark.parametrize("strided", [
    lambda: torch.randn(2, 5, 9, 6)[:, :, 1:],
    lambda: torch.randn(6, 9, 5, 2).permute(3, 2, 1, 0),
    lambda: torch.randn(2, 10, 9, 12)[:, ::2, :, ::2],
    lambda: torch.randn(2, 1, 9, 6).expand(2, 5, 9, 6),
])
def test_strides(strided):
    x = strided()
    before = x.clone()
    for video, out in zip(x, spatio_temporal_pool(x, num_temporal=10)):
        _assert_close(out, _exact(video, 10), x)
    assert torch.equal(x, before)


def test_accumulates_in_fp32():
    assert (spatio_temporal_pool(torch.full((100, 576, 2), 1000.0, dtype=torch.float16)) == 1000).all()


def test_gradients():
    x = torch.randn(2, 3, 4, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: spatio_temporal_pool(x, num_temporal=5), x)
    assert torch.autograd.gradcheck(lambda x: spatio_temporal_pool(x, num_temporal=5, frame_counts=[0, 2]), x)
    assert torch.autograd.gradcheck(lambda x: spatio_temporal_pool(x[0, :, 1:], num_temporal=3), x)


@pytest.mark.parametrize("dtype", list(ULP))
def test_gradients_of_each_dtype(dtype):
    x = torch.randn(3, 4, 5).to(dtype).requires_grad_()
    out = spatio_temporal_pool(x, num_temporal=6)
    out_gradient = torch.randn(out.shape).to(dtype)
    out.backward(out_gradient)
    exact = out_gradient[:3, None].double() / 4 + out_gradient[None, 6:].double() / 3
    assert x.grad.dtype == dtype
    assert torch.allclose(x.grad.double(), exact, rtol=ULP[dtype], atol=4 * ULP[dtype])


@pytest.mark.parametrize("x, options, message", [
    (torch.zeros(4, 5), {}, r"\[4, 5\]"),
    (torch.zeros(2, 3, 4, dtype=torch.int64), {}, "int64"),
    (torch.zeros(101, 2, 3), {}, "101 frames"),
    (torch.zeros(3, 2, 3), {"frame_counts": [3]}, "single video"),
    (torch.zeros(2, 3, 2, 3), {"frame_counts": [3]}, "2 integers"),
    (torch.zeros(2, 3, 2, 3), {"frame_counts": [3, 4]}, r"\[0, 3\]"),
    (torch.zeros(2, 3, 2, 3), {"frame_counts": [3, -1]}, r"\[0, 3\]"),
    (torch.zeros(3, 2, 3), {"impl": "fast"}, "'fast'"),
])
def test_refusals(x, options, message):
    with pytest.raises(ValueError, match=message):
        spatio_temporal_pool(x, **options)


def test_triton_is_not_silently_replaced():
    with pytest.raises(NotImplementedError, match="Triton"):
        spatio_temporal_pool(torch.zeros(1, 2, 3), impl="triton")


@pytest.mark.parametrize("case", ["a", "c", "d"])
def test_recordings(shared, case):
    recorded = np.load(shared / "golden" / "pool.npz")
    meta = json.loads((shared / "golden" / "pool.meta.json").read_text())["cases"][case]
    (T, S, C), random = meta["shape"], np.random.default_rng(meta["seed"])
    x = random.standard_normal((T, S, C), dtype=np.float32) * np.float32(1.5)
    outliers = random.permutation(C)[:max(1, C // 16)]
    x[..., outliers] *= 40
    x += random.standard_normal((1, 1, C), dtype=np.float32)
    x[..., outliers[0]] += 200
    x = x.astype(np.float16)
    assert hashlib.sha256(x.tobytes()).hexdigest() == meta["input_sha256"]
    out = spatio_temporal_pool(torch.from_numpy(x)).numpy()
    zeros = np.zeros((100 - T, C))
    exact = np.concatenate([recorded[f"{case}_t64"], zeros, recorded[f"{case}_s64"]]).astype(np.float16)
    steps = np.abs(_order(out) - _order(exact))
    assert steps.max() <= 1
    assert (steps != 0).sum() <= steps.size / 10_000
    assert (out[T:100] == 0).all()


def _order(values):
    """fp16 as integers, neighbours one apart."""
    bits = values.view(np.int16).astype(np.int32)
    return np.where(bits < 0, -(bits & 0x7FFF), bits)
