"""rope_keys_backward_fp8: the bits of the gradient of rope_keys that is quantised afterwards."""

import fastvid_kernels.rope_keys_fp8 as kernel_module
import pytest
import torch
from fastvid_kernels.quantize_fp8 import quantize_fp8
from fastvid_kernels.rope_keys_backward import rope_keys_backward
from fastvid_kernels.rope_keys_fp8 import rope_keys_backward_fp8
from harness import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import each_pair
from test_rope_keys import SHAPES, WAYS, inputs
from test_rope_keys_backward import PARTS, in_parts

pytestmark = pytest.mark.usefixtures("poisoned")


def arguments(shape, way, dtype, seed=0):
    _, (positions, frequencies, *_), keys, _, grads = inputs(shape, way, dtype, seed)
    way_back = keys and (keys["way_back"].starts_N1, keys["way_back"].places)
    return grads, positions, frequencies, way_back or None


def check(grads, positions, frequencies, way_back, more=None):
    before = [x.clone() for x in grads]
    options = {"scale": 1.2, "way_back": way_back, "more": more, "impl": "triton"}
    bits, scale = quantize_fp8(rope_keys_backward(*grads, positions, frequencies, **options), impl="triton")
    found, found_scale = rope_keys_backward_fp8(*grads, positions, frequencies, **options)
    assert found.dtype == torch.float8_e4m3fn and found.is_contiguous() and torch.equal(found_scale, scale)
    assert torch.equal(found.float(), bits.float())
    assert all(map(torch.equal, grads, before))


@pytest.mark.slow
@each_pair(shape=SHAPES, way=WAYS, dtype=DTYPES)
def test_is_the_gradient_quantised_afterwards(shape, way, dtype):
    check(*arguments(shape, way, dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(dtype):
    check(*arguments((0, 4, 2, 8), "in order", dtype))


@pytest.mark.slow
@given(
    rows=st.integers(1, 4),
    heads=st.integers(0, 20),
    kv_heads=st.integers(1, 20),
    half=st.integers(1, 70),
    way=st.sampled_from(sorted(WAYS)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, heads, kv_heads, half, way, dtype, seed):
    check(*arguments((rows, heads, kv_heads, 2 * half), way, dtype, seed))


@pytest.mark.slow
@each_pair(way=WAYS, kind=PARTS, dtype=DTYPES)
def test_of_two_parts(way, kind, dtype):
    grads, *others = arguments((7, 4, 2, 8), way, dtype)
    check(*in_parts(grads, kind, others))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_reference(way):
    grads, positions, frequencies, way_back = arguments((7, 4, 2, 8), way, torch.float32)
    (ours, our_scale), (theirs, their_scale) = (
        rope_keys_backward_fp8(*grads, positions, frequencies, scale=1.2, way_back=way_back, impl=impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(our_scale, their_scale, rtol=1e-5, atol=0)
    assert ours.shape == theirs.shape
    # What is rounded differs in its last bits, so that a rare number becomes its neighbour in e4m3.
    assert (ours.float() == theirs.float()).float().mean() > 0.99
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2**-3, atol=2**-9)


@pytest.mark.slow
def test_heads_side_by_side_in_wider_rows():
    grads, positions, frequencies, way_back = arguments((7, 4, 2, 8), "shared", torch.bfloat16)
    wider = [torch.cat([x, x[:, :1]], 1)[:, :-1] for x in grads]
    assert not wider[0].is_contiguous()
    check(wider, positions, frequencies, way_back)
    check([x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads], positions, frequencies, way_back)


@pytest.mark.slow
def test_rows_that_registers_cannot_hold_are_quantised_afterwards(monkeypatch):
    monkeypatch.setattr(kernel_module, "LARGEST_TILE", 15)
    monkeypatch.setattr(kernel_module, "_collect_fp8_kernel", None)
    check(*arguments((7, 4, 2, 8), "shared", torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("which", range(3))
def test_nan_is_seen(which):
    grads, positions, frequencies, _ = arguments((5, 4, 2, 8), "in order", torch.bfloat16)
    grads[which][2, 1, 3] = torch.nan
    bits, scale = rope_keys_backward_fp8(*grads, positions, frequencies, impl="triton")
    assert scale.isnan().tolist() == [False, False, True, False, False] and bits.float()[2].isnan().all()


def test_unknown_implementation_is_refused():
    grads, positions, frequencies, _ = arguments((5, 4, 2, 8), "in order", torch.bfloat16)
    with pytest.raises(ValueError, match="rope_keys_backward_fp8: impl .* 'fast'"):
        rope_keys_backward_fp8(*grads, positions, frequencies, impl="fast")
