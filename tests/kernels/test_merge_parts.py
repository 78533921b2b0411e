"""merge_parts: attention to two parts of the keys equals attention to all, in fp64 and as eager torch has it."""

import math

import fastvid_kernels.merge_parts as kernel_module
import pytest
import torch
from fastvid_kernels.merge_parts import merge_parts, merge_parts_reference
from harness import DEVICE, DTYPES, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "reference"]
SHAPES = [(1, 1, 1), (5, 3, 33), (0, 2, 16), (7, 32, 128), (3, 40, 200), (2, 9, 6)]


def inputs(shape, dtype, seed=0, transposed=False):
    generator = torch.Generator().manual_seed(seed)
    rows, heads, channels = shape
    parts = []
    for _ in range(2):
        out = torch.randn(rows, heads, channels, generator=generator).to(DEVICE, dtype)
        lse = 4 * torch.randn(rows, heads, generator=generator).to(DEVICE)
        parts += [out, lse.T if transposed else lse.T.contiguous()]
    return parts


def check(parts, impl, **options):
    exact = merge_parts_reference(*(x.double() for x in parts))
    eager = merge_parts_reference(*parts)
    found = merge_parts(*(x.clone() for x in parts), impl=impl, **options)
    for values in zip(found, exact, eager):
        assert_close_as_eager(*values)
    return found


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_reference(impl, inplace, dtype, shape):
    check(inputs(shape, dtype), impl, inplace=inplace)


@pytest.mark.slow
@given(
    shape=st.tuples(st.integers(0, 4), st.integers(1, 40), st.integers(1, 140)),
    dtype=st.sampled_from(DTYPES),
    transposed=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_any_shape(shape, dtype, transposed, seed):
    check(inputs(shape, dtype, seed, transposed), "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_is_attention_to_all_keys(impl):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(4, rows, 8, generator=generator).to(DEVICE) for rows in (5, 9, 9))
    scores = q @ k.transpose(1, 2) / math.sqrt(8)

    def part(keys):
        return (scores[..., keys].softmax(-1) @ v[:, keys]).transpose(0, 1).contiguous(), scores[..., keys].logsumexp(
            -1
        )

    found = merge_parts(*part(slice(0, 4)), *part(slice(4, 9)), impl=impl)
    for ours, whole in zip(found, part(slice(0, 9))):
        torch.testing.assert_close(ours, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_last_rows_of_larger_tensors_in_place(impl):
    out, lse, other, other_lse = inputs((9, 3, 8), torch.bfloat16)
    expected = merge_parts(out[5:].clone(), lse[:, 5:].clone(), other[5:], other_lse[:, 5:], impl=impl)
    before = out.clone(), lse.clone(), other.clone(), other_lse.clone()
    merge_parts(out[5:], lse[:, 5:], other[5:], other_lse[:, 5:], inplace=True, impl=impl)
    assert torch.equal(out[5:], expected[0]) and torch.equal(lse[:, 5:], expected[1])
    assert torch.equal(out[:5], before[0][:5]) and torch.equal(lse[:, :5], before[1][:, :5])
    assert torch.equal(other, before[2]) and torch.equal(other_lse[:, :5], before[3][:, :5])
    assert torch.equal(other_lse[:, 5:], expected[1])  # dense, for the second part's backward


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("lacking", [0, 1], ids=["first", "second"])
def test_a_part_without_keys_and_far_scores_count_as_they_should(impl, lacking):
    parts = inputs((4, 2, 8), torch.float32)
    parts[2 * lacking + 1] = torch.full_like(parts[1], -math.inf)
    out, lse = merge_parts(*parts, impl=impl)
    other = 2 - 2 * lacking
    assert torch.equal(out, parts[other]) and torch.equal(lse, parts[other + 1])
    parts[1], parts[3] = torch.full_like(lse, 1e4), torch.full_like(lse, 1e4 - 200)
    assert torch.equal(merge_parts(*parts, impl=impl)[0], parts[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_again_and_inputs_left_alone(impl):
    parts = inputs((30, 3, 70), torch.bfloat16)
    before = [x.clone() for x in parts]
    first, second = (merge_parts(*parts, impl=impl) for _ in range(2))
    assert all(map(torch.equal, first, second)) and all(map(torch.equal, parts, before))


def test_auto_is_triton_on_cuda_only(monkeypatch):
    launches = noted_launches(monkeypatch, kernel_module)
    merge_parts(*inputs((3, 2, 8), torch.float32))
    assert bool(launches) == (DEVICE == "cuda")


def test_what_does_not_fit_is_refused():
    out, lse, other, other_lse = inputs((3, 2, 8), torch.float32)
    with pytest.raises(ValueError, match=r"merge_parts: parts .*\[3, 2\].* do not fit"):
        merge_parts(out, lse.T, other, other_lse)
    with pytest.raises(ValueError, match="merge_parts has no gradient"):
        merge_parts(out.requires_grad_(), lse, other, other_lse)
    with pytest.raises(ValueError, match="merge_parts: heads of a row must lie side by side"):
        merge_parts(out.detach().transpose(0, 1).contiguous().transpose(0, 1), lse, other, other_lse, impl="triton")
