"""add_rms_norm: values and gradients against fp64, what it saves."""

import fastvid_kernels.add_rms_norm as kernel_module
import pytest
import torch
from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_fp8, add_rms_norm_reference
from fastvid_kernels.quantize_fp8 import BackInFp8, quantize_fp8
from harness import DEVICE, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import each_pair

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "auto"]  # which is what CPUs compute their own way, where there is no GPU
CASES = {  # residual, branch, weight, output
    "fp32": (torch.float32,) * 4,
    "bf16": (torch.bfloat16,) * 4,
    "bf16, fp32 weight": (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    "fp32 residual": (torch.float32, torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "fp32 branch": (torch.bfloat16, torch.float32, torch.bfloat16, torch.float32),
    "fp16": (torch.float16,) * 4,
}

WIDTHS = [(1, 8), (5, 33), (0, 16), (4, 1100), (2, 4096)]


def any_shape(test):
    """Shapes, dtypes and choices, drawn at random."""
    drawn = given(
        rows=st.integers(0, 5),
        channels=st.integers(1, 700),
        dtypes=st.sampled_from(list(CASES)),
        add=st.booleans(),
        trained=st.booleans(),
        seed=st.integers(0, 99),
    )
    return drawn(settings(max_examples=25, deadline=None, derandomize=True)(test))


def inputs(rows, channels, residual, branch, weight, *, add=True, trained=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, channels, generator=generator).to(DEVICE, residual).requires_grad_()
    b = torch.randn(rows, channels, generator=generator).to(DEVICE, branch).requires_grad_() if add else None
    w = (1 + torch.randn(channels, generator=generator) / 10).to(DEVICE, weight).requires_grad_(trained)
    return x, b, w


def implementation(impl):
    return lambda *args: add_rms_norm(*args, impl=impl)


def run(function, x, b, w, dtype, grads, eps=1e-5):
    outputs = function(x, b, w, eps, dtype)
    sources = [t for t in (x, b, w) if t is not None and t.requires_grad]
    return *(out.detach() for out in outputs), *torch.autograd.grad(outputs, sources, grads)


def gradients(shape, residual, dtype, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(shape, generator=generator).to(DEVICE, kind) for kind in (residual, dtype))


def check(case, dtype, impl, seed=1):
    x, _, w = case
    grads = gradients(x.shape, x.dtype, dtype, seed)
    found = run(implementation(impl), *case, dtype, grads)
    eager = run(add_rms_norm_reference, *case, dtype, grads)
    # The sum is rounded to the residual's dtype; the norm and all gradients are those of the rounded sum.
    assert torch.equal(found[0], eager[0])
    total = found[0].double().requires_grad_()
    exact_w = w.detach().double().requires_grad_(w.requires_grad)
    _, y, grad, *grad_w = run(add_rms_norm_reference, total, None, exact_w, torch.float64, [g.double() for g in grads])
    exact = [y, *[grad] * (1 if case[1] is None else 2), *grad_w]
    assert len(found) == len(eager) == 1 + len(exact)
    for values in zip(found[1:], exact, eager[1:]):
        assert_close_as_eager(*values)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@each_pair(shape=[(1, 8), (5, 33), (0, 16), (4, 1100)], dtypes=CASES, add=[True, False], trained=[True, False])
def test_equals_reference(impl, dtypes, shape, add, trained):
    *kinds, dtype = CASES[dtypes]
    check(inputs(*shape, *kinds, add=add, trained=trained), dtype, impl)


@pytest.mark.slow
@any_shape
def test_any_shape(rows, channels, dtypes, add, trained, seed):
    *kinds, dtype = CASES[dtypes]
    check(inputs(rows, channels, *kinds, add=add, trained=trained, seed=seed), dtype, "triton", seed)


@pytest.mark.slow
@pytest.mark.parametrize("rows, channels", [(13, 5), (523, 40)])
def test_weight_gradient_over_groups_of_rows(rows, channels):
    """Each program adds up four rows, the last fewer; then 128 groups are added up at once."""
    check(inputs(rows, channels, *[torch.float32] * 3), torch.float32, "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_is_torchs_rms_norm_of_the_sum(impl):
    """On rows so small that eps decides."""
    x, b, w = (t.detach() for t in inputs(4, 6, *[torch.float32] * 3))
    total, y = add_rms_norm(x / 300, b / 300, w, 1e-5, torch.float32, impl=impl)
    assert torch.equal(total, x / 300 + b / 300)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(total, (6,), w, 1e-5), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_gradients(impl):
    x, b, w = (t.detach() for t in inputs(4, 6, *[torch.float32] * 3))
    plain = [t.clone().requires_grad_() for t in (x, b, w)]
    strided = [
        t.requires_grad_()
        for t in (x.T.contiguous().T, torch.nn.functional.pad(b, (1, 2))[:, 1:-2], w.repeat_interleave(2)[::2])
    ]
    grads = [g[:1].expand(4, 6) for g in gradients((4, 6), torch.float32, torch.float32)]
    found = run(implementation(impl), *strided, torch.float32, grads)
    expected = run(implementation(impl), *plain, torch.float32, [g.contiguous() for g in grads])
    for pair in zip(found, expected):
        torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("function", [implementation("auto"), add_rms_norm_reference])
def test_gradient_numerically(function):
    x, b, w = inputs(3, 5, *[torch.float64] * 3)
    assert torch.autograd.gradcheck(lambda x, b, w: function(x, b, w, 1e-5, torch.float64), (x, b, w))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("pick", [0, 1], ids=["sum", "norm"])
def test_only_one_output_used(impl, pick):
    x, b, w = inputs(4, 6, *[torch.float32] * 3)
    found, expected = (
        torch.autograd.grad(f(x, b, w, 1e-5, torch.float32)[pick].square().sum(), (x, b))
        for f in (implementation(impl), add_rms_norm_reference)
    )
    for ours, theirs in zip(found, expected):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_saves_the_sum_and_a_number_per_row(impl):
    x, b, w = inputs(16, 32, torch.bfloat16, torch.bfloat16, torch.bfloat16, trained=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        total, _ = add_rms_norm(x, b, w, 1e-5, torch.bfloat16, impl=impl)
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), b.data_ptr(), w.data_ptr())]
    assert sorted(t.nbytes for t in new) == [16 * 4, total.nbytes]


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", ["bf16", "fp32 residual"])
def test_same_bits_again_and_inputs_left_alone(impl, dtypes):
    *kinds, dtype = CASES[dtypes]
    case = inputs(30, 70, *kinds)
    grads = gradients((30, 70), kinds[0], dtype)
    before = [t.detach().clone() for t in (*case, *grads)]
    first, second = (run(implementation(impl), *case, dtype, grads) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    assert all(torch.equal(t, copy) for t, copy in zip((*case, *grads), before))


def test_auto_is_triton_on_cuda_only(monkeypatch):
    launches = noted_launches(monkeypatch, kernel_module)
    case = inputs(3, 50, *[torch.float32] * 3)
    run(implementation("auto"), *case, torch.float32, gradients((3, 50), torch.float32, torch.float32))
    assert bool(launches) == (DEVICE == "cuda")


def check_fp8(case, dtype, impl="triton", seed=1):
    """Rows in e4m3 equal, to the bit, those that are quantised afterwards; so do all gradients."""
    grads = gradients(case[0].shape, case[0].dtype, dtype, seed)
    total, y = (implementation(impl) if impl == "triton" else add_rms_norm_reference)(*case, 1e-5, dtype)
    bits, scale = quantize_fp8(y.detach(), impl=impl)
    found_total, rows = add_rms_norm_fp8(*case, 1e-5, dtype, impl=impl)
    assert torch.equal(found_total, total) and torch.equal(rows.scale_N, scale)
    assert torch.equal(rows.bits_ND.view(torch.uint8), bits.view(torch.uint8))
    assert rows.stand_in_ND.shape == y.shape and rows.stand_in_ND.dtype == y.dtype
    assert not rows.bits_ND.requires_grad and not rows.scale_N.requires_grad
    sources = [t for t in case if t is not None and t.requires_grad]
    for pair in zip(
        torch.autograd.grad((found_total, rows.stand_in_ND), sources, grads),
        torch.autograd.grad((total, y), sources, grads),
    ):
        assert torch.equal(*pair)
    return rows


@pytest.mark.slow
@each_pair(shape=WIDTHS, dtypes=CASES, add=[True, False])
def test_rows_in_e4m3(dtypes, shape, add):
    *kinds, dtype = CASES[dtypes]
    rows = check_fp8(inputs(*shape, *kinds, add=add, trained=add), dtype)
    assert rows.stand_in_ND.untyped_storage().nbytes() <= 4


@pytest.mark.slow
@any_shape
def test_rows_in_e4m3_of_any_shape(rows, channels, dtypes, add, trained, seed):
    *kinds, dtype = CASES[dtypes]
    check_fp8(inputs(rows, channels, *kinds, add=add, trained=trained, seed=seed), dtype, seed=seed)


def test_rows_in_e4m3_of_the_reference():
    check_fp8(inputs(5, 33, *CASES["fp32"][:3]), torch.float32, "reference")


def test_rows_in_e4m3_show_nan():
    x, b, w = (t.detach() for t in inputs(4, 40, *[torch.bfloat16] * 3))
    b[2, 7] = torch.nan
    _, rows = add_rms_norm_fp8(x, b, w, 1e-5, torch.bfloat16, impl="triton")
    assert rows.scale_N.isnan().tolist() == [False, False, True, False] and rows.bits_ND.float()[2].isnan().all()


def test_rows_in_e4m3_save_what_the_norm_saves():
    x, b, w = inputs(16, 32, torch.bfloat16, torch.bfloat16, torch.bfloat16, trained=False)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        total, _ = add_rms_norm_fp8(x, b, w, 1e-5, torch.bfloat16, impl="triton")
    new = [t for t in saved if t.data_ptr() not in (x.data_ptr(), b.data_ptr(), w.data_ptr())]
    assert sorted(t.nbytes for t in new) == [16 * 4, total.nbytes]


@pytest.mark.parametrize("pick", [0, 1], ids=["sum", "norm"])
def test_only_one_output_of_rows_in_e4m3_used(pick):
    case = inputs(4, 6, *[torch.float32] * 3)
    grads = gradients((4, 6), torch.float32, torch.float32)
    total, rows = add_rms_norm_fp8(*case, 1e-5, torch.float32, impl="triton")
    found = torch.autograd.grad((total, rows.stand_in_ND)[pick], case[:2], grads[pick])
    expected = torch.autograd.grad(add_rms_norm(*case, 1e-5, torch.float32, impl="triton")[pick], case[:2], grads[pick])
    assert all(map(torch.equal, found, expected))


def back_in_fp8(branch):
    """A branch as it leaves a product, whose stand-ins are leaves."""
    rows = BackInFp8.of(branch.detach())
    return BackInFp8(rows.rows_ND, *(stand_in.requires_grad_() for stand_in in rows[1:]))


def plain_norm(x, b, w, dtype, impl="triton"):
    return add_rms_norm(x, b, w, 1e-5, dtype, impl=impl)


def norm_to_fp8(x, b, w, dtype, impl="triton"):
    total, rows = add_rms_norm_fp8(x, b, w, 1e-5, dtype, impl=impl)
    return total, rows.stand_in_ND


def check_back_in_fp8(function, case, dtype, grads, impl="triton"):
    """The branch's gradient in e4m3 equals, to the bit, the one that is quantised afterwards; so do the others."""
    x, b, w = case
    outputs = function(x, b, w, dtype, impl)
    used = [(output, grad) for output, grad in zip(outputs, grads) if grad is not None]
    grad_b, *expected = torch.autograd.grad(
        [output for output, _ in used],
        [t for t in (b, x, w) if t.requires_grad],
        [g for _, g in used],
        allow_unused=True,
    )
    branch = back_in_fp8(b)
    found = function(x, branch, w, dtype, impl)
    if function is plain_norm:
        assert all(map(torch.equal, found, outputs))
    used = [(output, grad) for output, grad in zip(found, grads) if grad is not None]
    bits, scale, *others = torch.autograd.grad(
        [output for output, _ in used],
        [*branch[1:], *(t for t in (x, w) if t.requires_grad)],
        [g for _, g in used],
        allow_unused=True,
    )
    expected_bits, expected_scale = quantize_fp8(grad_b, impl=impl)
    assert bits.dtype == torch.float8_e4m3fn and torch.equal(scale, expected_scale)
    assert torch.equal(bits.view(torch.uint8), expected_bits.view(torch.uint8))
    for ours, theirs in zip(others, expected, strict=True):
        assert (ours is theirs is None) or torch.equal(ours, theirs)


@pytest.mark.slow
@each_pair(shape=WIDTHS, dtypes=CASES, trained=[True, False])
def test_branch_back_in_e4m3(dtypes, shape, trained):
    *kinds, dtype = CASES[dtypes]
    grads = gradients(shape, kinds[0], dtype)
    check_back_in_fp8(plain_norm, inputs(*shape, *kinds, trained=trained), dtype, grads)


@pytest.mark.slow
@given(
    rows=st.integers(0, 9),
    channels=st.integers(1, 700),
    dtypes=st.sampled_from(list(CASES)),
    function=st.sampled_from([plain_norm, norm_to_fp8]),
    trained=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_branch_back_in_e4m3_of_any_shape(rows, channels, dtypes, function, trained, seed):
    *kinds, dtype = CASES[dtypes]
    grads = gradients((rows, channels), kinds[0], dtype, seed)
    check_back_in_fp8(function, inputs(rows, channels, *kinds, trained=trained, seed=seed), dtype, grads)


@pytest.mark.parametrize("impl", ["triton", "auto", "reference"])
@pytest.mark.parametrize("function", [plain_norm, norm_to_fp8])
@pytest.mark.parametrize("pick", [None, 0, 1], ids=["both", "sum", "norm"])
def test_branch_back_in_e4m3_by_every_implementation(impl, function, pick):
    """Also where one of the outputs has no gradient."""
    case = inputs(4, 6, *CASES["fp32 residual"][:3], trained=False)
    grads = [grad if pick in (None, i) else None for i, grad in enumerate(gradients((4, 6), *[torch.float32] * 2))]
    if grads[1] is not None:
        grads[1] = grads[1].bfloat16()
    check_back_in_fp8(function, case, torch.bfloat16, grads, impl)


def test_branch_back_in_e4m3_shows_nan():
    x, b, w = inputs(4, 40, *[torch.bfloat16] * 3, trained=False)
    grads = gradients((4, 40), torch.bfloat16, torch.bfloat16)
    grads[0][2, 7] = torch.nan
    branch = back_in_fp8(b)
    _, scale = torch.autograd.grad(plain_norm(x, branch, w, torch.bfloat16), branch[1:], grads)
    assert scale.isnan().tolist() == [False, False, True, False]


def test_branch_back_in_e4m3_has_a_gradient_for_other_readers():
    _, b, _ = inputs(4, 6, *[torch.bfloat16] * 3)
    (grad,) = gradients((4, 6), torch.bfloat16, torch.bfloat16)[:1]
    branch = back_in_fp8(b)
    rows = branch.plain()
    assert torch.equal(rows, b)
    for found, expected in zip(torch.autograd.grad(rows, branch[1:], grad), quantize_fp8(grad)):
        assert torch.equal(found.float(), expected.float())


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="add_rms_norm_fp8: impl .* 'fast'"):
        add_rms_norm_fp8(*inputs(4, 6, *[torch.float32] * 3), 1e-5, torch.float32, impl="fast")
    with pytest.raises(ValueError, match="add_rms_norm: impl .* 'fast'"):
        add_rms_norm(*inputs(4, 6, *[torch.float32] * 3), 1e-5, torch.float32, impl="fast")


@pytest.mark.parametrize("shapes", [((4, 6), (6,), (6,)), ((4, 6), (4, 6), (5,)), ((4, 6), (3, 6), (6,))], ids=str)
def test_shapes_that_do_not_fit_are_refused(shapes):
    with pytest.raises(ValueError, match="add_rms_norm: .*\\[4, 6\\]"):
        add_rms_norm(*map(torch.randn, shapes), 1e-5, torch.float32)


@pytest.mark.parametrize("impl", [*IMPLS, "reference"])
@pytest.mark.parametrize("add", [True, False], ids=["add", "no branch"])
@pytest.mark.parametrize("fp8", [False, True], ids=["", "e4m3"])
@pytest.mark.parametrize("dtypes", ["bf16", "fp32 residual"])
def test_rows_behind_others_have_the_bits_of_rows_alone(impl, add, fp8, dtypes):
    """In one pass over all of them, of which the first three get no gradient."""
    *kinds, dtype = CASES[dtypes]
    every, branches, weight = inputs(7, 33, *kinds, add=add, trained=False)
    every, branches = (None if x is None else x.detach() for x in (every, branches))
    live, branch = (None if x is None else x[3:].clone().requires_grad_() for x in (every, branches))
    grads = gradients((4, 33), kinds[0], dtype)
    function = add_rms_norm_fp8 if fp8 else add_rms_norm
    settings = weight, 1e-5, dtype

    def bits(y):
        return y.bits_ND.view(torch.uint8) if fp8 else y

    total, y = function(live, branch, *settings, impl=impl)
    found_total, found_y, *of_every = function(live, branch, *settings, every=(every, branches), impl=impl)
    all_total, all_y = function(every, branches, *settings, impl=impl)
    assert torch.equal(found_total, total) and torch.equal(of_every[0], all_total)
    assert torch.equal(bits(found_y)[-4:], bits(y))
    assert torch.equal(bits(found_y if fp8 else of_every[1]), bits(all_y))
    assert not any(x.requires_grad for x in of_every)
    sources = [x for x in (live, branch) if x is not None]
    found, expected = (
        torch.autograd.grad((sums, rows.stand_in_ND if fp8 else rows), sources, grads)
        for sums, rows in ((found_total, found_y), (total, y))
    )
    assert all(map(torch.equal, found, expected))
