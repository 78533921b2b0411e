"""SwiGLU, quick-GELU, norms and rotary embedding on CPUs: the kernels' own checks of what AVX512-BF16 computes, and
of the chains of torch's operations that serve without it."""

import pytest
import test_add_layer_norm as layer_norm
import test_add_rms_norm as norm
import test_quick_gelu as gelu
import test_rope_qk as rope
import test_swiglu as swiglu
import torch
from fastvid_kernels.add_layer_norm import add_layer_norm
from fastvid_kernels.add_rms_norm import add_rms_norm
from fastvid_kernels.cpu import rows as cpu_rows
from fastvid_kernels.quick_gelu import quick_gelu
from fastvid_kernels.rope_qk import rope_qk
from fastvid_kernels.swiglu import swiglu as fused
from harness import DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st

BF16 = torch.bfloat16
pytestmark = pytest.mark.usefixtures("poisoned")
# Where it ought to compile and does not, the tests fail.
needs_cpu = pytest.mark.skipif(
    any(x in (cpu_rows.obstacle() or "") for x in ("it is for", "no AVX512", "no C++ compiler")),
    reason=f"rows for AVX512-BF16: {cpu_rows.obstacle()}",
)
WIDTHS = [1, 15, 16, 17, 31, 33, 64, 1100]  # around the ends of vectors


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 16), (4, 0), (1, 1), *((5, width) for width in WIDTHS)])
def test_swiglu(shape):
    swiglu.check(*swiglu.inputs(*shape, BF16), "auto")


@needs_cpu
@pytest.mark.parametrize("elements", [0, *WIDTHS])
def test_quick_gelu(elements):
    gelu.check(gelu.inputs(elements, BF16), "auto")


@needs_cpu
@pytest.mark.parametrize("weight", [BF16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(0, 16), *((5, width) for width in WIDTHS)])
@pytest.mark.parametrize("add", [True, False], ids=["add", "no branch"])
@pytest.mark.parametrize("trained", [True, False], ids=["trained", "frozen"])
def test_add_rms_norm(shape, weight, add, trained):
    norm.check(norm.inputs(*shape, BF16, BF16, weight, add=add, trained=trained), BF16, "auto")


@needs_cpu
@pytest.mark.parametrize("shape", [(0, 16), *((5, width) for width in WIDTHS)])
@pytest.mark.parametrize("add", [True, False], ids=["add", "no branch"])
def test_add_layer_norm(shape, add):
    layer_norm.check(layer_norm.inputs(*shape, BF16, add=add), "auto")


@needs_cpu
def test_layer_norm_of_rows_far_from_zero():
    layer_norm.check(layer_norm.inputs(4, 200, BF16, add=False, offset=300.0), "auto")


@needs_cpu
@pytest.mark.parametrize("shape", rope.SHAPES + [(5, 3, 1, 2 * width) for width in WIDTHS[:-1]])
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in place"])
def test_rope_qk(shape, inplace):
    rope.check(rope.inputs(*shape, BF16), "auto", inplace)


@needs_cpu
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 300),
    heads=st.integers(1, 9),
    kv_heads=st.integers(1, 9),
    add=st.booleans(),
    trained=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_shape(rows, width, heads, kv_heads, add, trained, seed):
    swiglu.check(*swiglu.inputs(rows, width, BF16, seed), "auto")
    norm.check(norm.inputs(rows, width, BF16, BF16, BF16, add=add, trained=trained, seed=seed), BF16, "auto", seed)
    layer_norm.check(layer_norm.inputs(rows, width, BF16, add=add, seed=seed), "auto")
    rope.check(rope.inputs(rows, heads, kv_heads, 2 * (width // 4 + 1), BF16, seed), "auto", add)


def results(given, impl):
    """Every value and gradient on `given`: (swiglu's, norm's, rope's) inputs and output gradients; quick-GELU's of the
    first, LayerNorm's of the second."""
    (x, grad), (case, grads), (qkv, rest, qkv_grad) = given
    return (
        quick_gelu(x.detach(), impl=impl),
        *swiglu.run(lambda x: fused(x, impl=impl), x, grad),
        *add_layer_norm(*(x.detach() for x in (*case, case[2])), 1e-5, impl=impl),
        *norm.run(norm.implementation(impl), *case, BF16, grads),
        *rope.run(rope_qk, qkv, rest, qkv_grad, impl=impl),
    )


def inputs(rows=30, width=70):
    case = norm.inputs(rows, width, BF16, BF16, BF16)
    qkv, *rest = rope.inputs(rows, 3, 1, 40, BF16)
    return [
        swiglu.inputs(rows, width, BF16),
        (case, norm.gradients((rows, width), BF16, BF16)),
        (qkv, rest, torch.randn(qkv.shape).to(BF16)),
    ]


def flat(given):
    return [
        x.detach()
        for (x, grad), (case, grads), (qkv, rest, qkv_grad) in [given]
        for x in (x, grad, *case, *grads, qkv, qkv_grad)
    ]


@needs_cpu
def test_same_bits_on_any_number_of_threads_and_inputs_left_alone():
    given, before = inputs(), torch.get_num_threads()
    copies, found = [x.clone() for x in flat(given)], []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            found.append(results(given, "auto"))
    finally:
        torch.set_num_threads(before)
    assert all(all(map(torch.equal, found[0], others)) for others in found[1:])
    assert all(map(torch.equal, flat(given), copies))


@needs_cpu
def test_rows_and_gradients_may_lie_apart():
    given = inputs()
    (x, grad), (case, grads), (qkv, rest, qkv_grad) = given

    def apart(x):
        return torch.nn.functional.pad(x.detach(), (3, 2))[:, 3:-2].requires_grad_(x.requires_grad)

    expanded = [g[:1].expand(g.shape) for g in (grad, *grads, qkv_grad)]
    strided = [
        (apart(x), expanded[0]),
        ((apart(case[0]), apart(case[1]), case[2]), expanded[1:3]),
        (apart(qkv), rest, expanded[3]),
    ]
    dense = [
        (x, expanded[0].contiguous()),
        (case, [g.contiguous() for g in expanded[1:3]]),
        (qkv, rest, expanded[3].contiguous()),
    ]
    assert all(map(torch.equal, results(strided, "auto"), results(dense, "auto")))


@needs_cpu
@pytest.mark.parametrize("pick", [0, 1], ids=["sum", "norm"])
def test_only_one_output_of_the_norm_used(pick):
    x, b, w = norm.inputs(4, 33, BF16, BF16, BF16)
    found, expected = (
        torch.autograd.grad(add_rms_norm(x, b, w, 1e-5, BF16, impl=impl)[pick].sum(), (x, b))
        for impl in ("auto", "reference")
    )
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair, rtol=2**-7, atol=2**-7)


@needs_cpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 500.0, -500.0, 3e38, -3e38])
def test_swiglu_of_what_is_no_common_number(value):
    x = torch.tensor([[value, 2.0, 1.0, 3.0], [1.0, 1.0, value, 2.0]], dtype=BF16, requires_grad=True)
    grad = torch.ones(2, 2, dtype=BF16)
    for ours, plain in zip(*(swiglu.run(lambda x: fused(x, impl=impl), x, grad) for impl in ("auto", "reference"))):
        torch.testing.assert_close(ours, plain, rtol=2**-7, atol=0, equal_nan=True)


@needs_cpu
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38, -3e38])
def test_quick_gelu_of_what_is_no_common_number(value):
    x = torch.tensor([value, 1.0], dtype=BF16)
    torch.testing.assert_close(
        quick_gelu(x, impl="auto"), quick_gelu(x, impl="reference"), rtol=2**-7, atol=0, equal_nan=True
    )


@needs_cpu
def test_what_is_not_a_number_stays_in_its_row():
    x, b, w = (t.detach() for t in norm.inputs(5, 33, BF16, BF16, BF16))
    x[2, 7] = float("nan")
    total, y = add_rms_norm(x, b, w, 1e-5, BF16, impl="auto")
    assert y[2].isnan().all() and y[[0, 1, 3, 4]].isfinite().all() and total.isnan().sum() == 1


@needs_cpu
@pytest.mark.parametrize("saver", [swiglu.test_saves_its_input_only, norm.test_saves_the_sum_and_a_number_per_row])
def test_saves_as_little(saver):
    saver("auto")


CALLS = {
    "swiglu": lambda impl, dtype: fused(torch.randn(3, 8).to(dtype), impl=impl),
    "add_rms_norm": lambda impl, dtype: add_rms_norm(
        *(t.detach() for t in norm.inputs(3, 8, dtype, dtype, BF16)), 1e-5, BF16, impl=impl
    )[1],
    "add_layer_norm": lambda impl, dtype: add_layer_norm(*layer_norm.inputs(3, 8, dtype), 1e-5, impl=impl)[1],
    "quick_gelu": lambda impl, dtype: quick_gelu(torch.randn(3, 8).to(dtype), impl=impl),
    "rope_qk": lambda impl, dtype: rope_qk(*rope.inputs(3, 2, 1, 8, dtype), impl=impl),
}


@needs_cpu
@pytest.mark.parametrize("name", CALLS)
def test_auto_takes_it_for_bf16_alone(name, monkeypatch):
    calls, call = [], cpu_rows._call
    monkeypatch.setattr(cpu_rows, "_call", lambda *given: calls.append(given) or call(*given))
    for dtype, impl, taken in ((BF16, "auto", 1), (torch.float32, "auto", 0), (BF16, "reference", 0)):
        calls.clear()
        CALLS[name](impl, dtype)
        assert len(calls) == taken, (dtype, impl)


@pytest.fixture
def no_library(monkeypatch):
    monkeypatch.setattr(cpu_rows, "_library", lambda: "no luck")


@pytest.mark.parametrize("name", CALLS)
def test_where_it_cannot_run_torch_serves(name, no_library):
    torch.manual_seed(0)
    found = CALLS[name]("auto", BF16)
    torch.manual_seed(0)
    torch.testing.assert_close(found, CALLS[name]("reference", BF16), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 16), (5, 33), (2, 1100)])
@pytest.mark.parametrize("add", [True, False], ids=["add", "no branch"])
def test_chains_of_torchs_operations(no_library, monkeypatch, shape, dtype, add):
    """In several blocks of rows, of which the last is shorter."""
    monkeypatch.setattr("fastvid_kernels.cpu.row_blocks.BLOCK_NUMBERS", 2 * shape[1] + 1)
    swiglu.check(*swiglu.inputs(*shape, dtype), "auto")
    gelu.check(gelu.inputs(shape, dtype), "auto")
    norm.check(norm.inputs(*shape, dtype, dtype, torch.float32, add=add), dtype, "auto")
    rope.check(rope.inputs(shape[0], shape[1] // 10, 1, 10, dtype), "auto", inplace=add)
