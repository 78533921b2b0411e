"""rope_keys_backward: in fp64 and as eager torch has it, of one part of attention and of two that are added."""

from typing import Any

import pytest
import torch
from fastvid_kernels.rope_keys import rope_keys, rope_keys_reference
from fastvid_kernels.rope_keys_backward import rope_keys_backward, rope_keys_backward_reference
from fastvid_kernels.way_back import Twice
from harness import DTYPES, assert_close_as_eager
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import each_pair
from test_rope_keys import SHAPES, WAYS, exact_keys, inputs

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "reference"]
# (first query, keys of the first part, first key and number of the second's) of N rows and M keys
PARTS = {
    "keys behind": lambda N, M: Twice(N // 2, M // 2, M // 2, M - M // 2),
    "keys at the end again": lambda N, M: Twice(N // 3, M, M // 2, M - M // 2),
    "keys in the middle again": lambda N, M: Twice(0, M, M // 4, M // 2),
}


def arguments(shape, way, dtype, seed=0):
    made: Any = inputs(shape, way, dtype, seed)
    _, (positions, frequencies, *_), keys, _, grads = made
    way_back = keys and (keys["way_back"].starts_N1, keys["way_back"].places)
    return grads, positions, frequencies, way_back or None


def in_parts(grads, kind, others=()):
    """The first part's gradients, `others`, and the second's with where they belong."""
    q, k, v = grads
    twice = PARTS[kind](len(q), len(k))
    noise = torch.Generator().manual_seed(1)
    parts = twice.split(*(torch.randn(x.shape, generator=noise).to(x) for x in grads))
    firsts = q, k[: twice.keys].clone(), v[: twice.keys].clone()
    return firsts, *others, (parts[3:], twice)


def check(shape, way, dtype, impl, kind=None, seed=0):
    grads, *others = arguments(shape, way, dtype, seed)
    more = None
    if kind is not None:
        grads, more = in_parts(grads, kind)
    before = [x.clone() for x in grads]
    options = {"scale": 1.2, "way_back": others.pop(), "more": more}
    found = rope_keys_backward(*grads, *others, **options, impl=impl)
    assert found.dtype == dtype and found.is_contiguous() and all(map(torch.equal, grads, before))
    made: Any = inputs(shape, way, torch.float64, seed)
    qkv, rest, keys, constant, _ = made
    outs = exact_keys(qkv, *rest, scale=1.2, rows_M=keys.get("rows_M"), constant=constant, twice=more and more[1])
    given_grads = [x.double() for x in (*grads, *(more[0] if more else ()))]
    [exact] = torch.autograd.grad(outs, qkv, given_grads)
    assert_close_as_eager(found, exact, rope_keys_backward_reference(*grads, *others, **options))


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@each_pair(shape=SHAPES, way=WAYS, dtype=DTYPES)
def test_equals_reference(impl, dtype, way, shape):
    check(shape, way, dtype, impl)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@each_pair(way=WAYS, kind=PARTS, dtype=DTYPES)
def test_two_parts_are_added(impl, dtype, kind, way):
    check((9, 6, 2, 6), way, dtype, impl, kind)


@pytest.mark.slow
@given(
    rows=st.integers(1, 5),
    heads=st.integers(0, 20),
    kv_heads=st.integers(1, 20),
    half=st.integers(1, 70),
    way=st.sampled_from(sorted(WAYS)),
    kind=st.sampled_from([None, *PARTS]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(rows, heads, kv_heads, half, way, kind, dtype, seed):
    check((rows, heads, kv_heads, 2 * half), way, dtype, "triton", kind, seed)


@pytest.mark.parametrize("kind", PARTS)
@pytest.mark.parametrize("way", WAYS)
def test_both_parts_come_back_to_the_rows(way, kind):
    """Through autograd: the same tensors for either part, and gradients as of slices."""
    made: Any = inputs((9, 4, 2, 8), way, torch.float32)
    qkv, rest, keys, constant, grads = made
    firsts, (seconds, twice) = in_parts(grads, kind)
    found = rope_keys(qkv.clone(), *rest, **keys, constant=constant, twice=twice, impl="triton")
    plain = rope_keys_reference(qkv, *rest, rows_M=keys.get("rows_M"), constant=constant, twice=twice)
    assert all(torch.equal(x, y) or torch.allclose(x, y, atol=1e-6) for x, y in zip(found, plain, strict=True))
    assert found[3].untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
    assert found[4].untyped_storage().data_ptr() == found[1].untyped_storage().data_ptr()
    ours, theirs = (torch.autograd.grad(outs, qkv, (*firsts, *seconds))[0] for outs in (found, plain))
    torch.testing.assert_close(ours, theirs)


def test_what_nobody_asks_for_counts_as_nothing():
    made: Any = inputs((9, 4, 2, 8), "shared", torch.float32)
    qkv, rest, keys, constant, grads = made
    firsts, (seconds, twice) = in_parts(grads, "keys in the middle again")
    found = rope_keys(qkv.clone(), *rest, **keys, constant=constant, twice=twice, impl="triton")
    [ours] = torch.autograd.grad(found[1:5], qkv, (*firsts[1:], *seconds[:2]))
    plain = rope_keys_reference(qkv, *rest, rows_M=keys["rows_M"], twice=twice)
    [theirs] = torch.autograd.grad(plain[1:5], qkv, (*firsts[1:], *seconds[:2]))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
def test_heads_side_by_side_in_wider_rows():
    made: Any = arguments((7, 4, 2, 8), "shared", torch.bfloat16)
    grads, positions, frequencies, way_back = made
    options = {"way_back": way_back, "impl": "triton"}
    expected = rope_keys_backward(*grads, positions, frequencies, **options)
    wider = [torch.cat([x, x[:, :1]], 1)[:, :-1] for x in grads]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in grads]
    for others in wider, turned:
        assert not others[0].is_contiguous()
        assert torch.equal(rope_keys_backward(*others, positions, frequencies, **options), expected)


@pytest.mark.slow
def test_same_bits_again():
    made: Any = arguments((9, 6, 2, 6), "shared", torch.bfloat16)
    grads, *others = made
    grads, more = in_parts(grads, "keys at the end again")
    positions, frequencies, way_back = others
    options = {"way_back": way_back, "more": more, "impl": "triton"}
    assert torch.equal(*(rope_keys_backward(*grads, positions, frequencies, **options) for _ in range(2)))


def test_unknown_implementation_is_refused():
    made: Any = arguments((5, 4, 2, 8), "in order", torch.bfloat16)
    grads, positions, frequencies, _ = made
    with pytest.raises(ValueError, match="rope_keys_backward: impl .* 'fast'"):
        rope_keys_backward(*grads, positions, frequencies, impl="fast")
