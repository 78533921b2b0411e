"""splice_video: values and gradients against its reference, what gets a gradient."""

import fastvid_kernels.splice_video as kernel_module
import pytest
import torch
from fastvid_kernels.splice_video import splice_video, splice_video_reference
from harness import DEVICE, assert_close_as_eager, noted_launches
from hypothesis import given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("poisoned")
IMPLS = ["triton", "auto"]  # which is what CPUs compute their own way, where there is no GPU
# Rows 2..4 and 7..9 are video, with boundary rows around them; the placeholder is 9.
TOKENS = [3, 7, 9, 9, 9, 8, 7, 9, 9, 9, 8, 3, 5]
VIDEO_ROWS, BOUNDARY_ROWS = [2, 3, 4, 7, 8, 9], [1, 5, 6, 10]
MIXES = [  # table, projected rows, boundary, result
    (torch.float32,) * 4,
    (torch.bfloat16,) * 4,
    (torch.float16,) * 4,
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32),
    (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
]


def inputs(
    table=torch.float32,
    video=torch.float32,
    rows=torch.float32,
    *,
    boundary=True,
    trained=(True, True, True),
    videos=2,
    channels=6,
    seed=0,
):
    generator = torch.Generator().manual_seed(seed)

    def randn(count, dtype, grad):
        return torch.randn(count, channels, generator=generator).to(DEVICE, dtype).requires_grad_(grad)

    def indices(values):
        return torch.tensor(values, dtype=torch.int64, device=DEVICE)

    return (
        indices(TOKENS if videos else [3, 5, 3, 3]),
        randn(10, table, trained[0]),
        randn(3 * videos, video, trained[1]),
        indices(VIDEO_ROWS[: 3 * videos]),
        randn(2, rows, trained[2]) if boundary else None,
        indices(BOUNDARY_ROWS[: 2 * videos]),
    )


def implementation(impl):
    return lambda *args: splice_video(*args, impl=impl)


def run(function, case, dtype, grad):
    out = function(*case, dtype)
    sources = [x for x in case if x is not None and x.requires_grad]
    return out.detach(), *torch.autograd.grad(out, sources, grad)


def gradient(case, dtype, seed=1):
    shape = case[0].shape[0], case[1].shape[1]
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def check(case, dtype, impl):
    grad = gradient(case, dtype)
    found, eager = (run(f, case, dtype, grad) for f in (implementation(impl), splice_video_reference))
    exact_case = [
        x.detach().double().requires_grad_(x.requires_grad) if x is not None and x.is_floating_point() else x
        for x in case
    ]
    exact = run(splice_video_reference, exact_case, torch.float64, grad.double())
    assert torch.equal(found[0], eager[0])
    assert len(found) == len(eager) == len(exact)
    for values in zip(found, exact, eager):
        assert_close_as_eager(*values)


@pytest.mark.slow
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtypes", MIXES, ids=lambda dtypes: "-".join(str(dtype)[6:] for dtype in dtypes))
@pytest.mark.parametrize("boundary", [True, False], ids=["boundary", "table only"])
@pytest.mark.parametrize("videos", [2, 0])
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, True), (True, False, False)], ids=str)
def test_equals_reference(impl, dtypes, boundary, videos, trained):
    *kinds, dtype = dtypes
    check(inputs(*kinds, boundary=boundary, trained=trained, videos=videos), dtype, impl)


@st.composite
def packings(draw):
    """Any rows, in any order, are video or boundary rows."""
    videos, per_video, text = draw(st.integers(0, 20)), draw(st.integers(0, 3)), draw(st.integers(0, 9))
    rows = videos * (per_video + 2) + text
    order = torch.randperm(rows, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))).to(DEVICE)
    return rows, order[: videos * per_video], order[videos * per_video : videos * (per_video + 2)]


@pytest.mark.slow
@given(
    packing=packings(),
    channels=st.sampled_from([1, 5, 128, 150]),
    dtypes=st.sampled_from(MIXES),
    boundary=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_any_packing(packing, channels, dtypes, boundary, seed):
    rows, video_rows, boundary_rows = packing
    *kinds, dtype = dtypes
    _, table, _, _, ends, _ = inputs(*kinds, channels=channels, boundary=boundary, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 10, (rows,), generator=generator).to(DEVICE)
    video = torch.randn(len(video_rows), channels, generator=generator).to(DEVICE, kinds[1]).requires_grad_()
    check((tokens, table, video, video_rows, ends, boundary_rows), dtype, "triton")


def test_boundary_gradient_of_many_videos():
    """More than the sum takes at once, and no multiple of that."""
    _, table, video, _, boundary, _ = inputs(videos=0, channels=3)
    rows = torch.arange(74, device=DEVICE)
    check((rows % 10, table, video, rows[:0], boundary, rows.flip(0)), torch.float32, "triton")


@pytest.mark.slow
def test_rows_wider_than_a_program():
    check(inputs(channels=2500), torch.float32, "triton")


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_come_from_where_they_should(impl):
    _tokens, table, video, video_rows, boundary, _boundary_rows = case = inputs()
    out = splice_video(*case, torch.float32, impl=impl)
    assert torch.equal(out[video_rows], video)
    assert torch.equal(out[[1, 6]], boundary[[0, 0]]) and torch.equal(out[[5, 10]], boundary[[1, 1]])
    assert torch.equal(out[[0, 11, 12]], table[[3, 3, 5]])


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_replaced_rows_do_not_reach_the_table(impl):
    case = inputs()
    _, grad_table, _, _ = run(implementation(impl), case, torch.float32, gradient(case, torch.float32))
    assert grad_table.abs().sum(1).nonzero()[:, 0].tolist() == [3, 5]
    without = inputs(boundary=False)
    _, grad_table, _ = run(implementation(impl), without, torch.float32, gradient(without, torch.float32))
    assert grad_table.abs().sum(1).nonzero()[:, 0].tolist() == [3, 5, 7, 8]


@pytest.mark.parametrize("function", [implementation("auto"), splice_video_reference])
def test_gradient_numerically(function):
    tokens, table, video, video_rows, boundary, boundary_rows = inputs(*[torch.float64] * 3)
    assert torch.autograd.gradcheck(
        lambda t, v, b: function(tokens, t, v, video_rows, b, boundary_rows, torch.float64), (table, video, boundary)
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_are_summed_in_fp32(impl):
    """In bf16, 256 + 1 is 256."""
    tokens = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1], device=DEVICE)
    table, boundary = (torch.zeros(2, 1, device=DEVICE, requires_grad=True) for _ in range(2))
    case = (
        tokens,
        table,
        torch.zeros(0, 1, dtype=torch.bfloat16, device=DEVICE),
        tokens[:0],
        boundary,
        torch.arange(3, 9, device=DEVICE),
    )
    grad = torch.tensor([256, 1, 1, 256, 1, 1, 256, 1, 1], dtype=torch.bfloat16, device=DEVICE)[:, None]
    _, grad_table, grad_boundary = run(implementation(impl), case, torch.bfloat16, grad)
    assert grad_table.tolist() == [[258], [0]] and grad_boundary.tolist() == [[258], [258]]


@pytest.mark.parametrize("impl", IMPLS)
def test_strided_inputs_and_gradient(impl):
    case = inputs()
    grad = gradient(case, torch.float32)[:1].expand(13, 6)
    strided = [
        None
        if x is None
        else x.detach().T.contiguous().T.requires_grad_()
        if x.dim() == 2
        else x.repeat_interleave(2)[::2]
        for x in case
    ]
    found = run(implementation(impl), strided, torch.float32, grad)
    expected = run(implementation(impl), case, torch.float32, grad.contiguous())
    assert all(torch.equal(*pair) for pair in zip(found, expected))


@pytest.mark.parametrize("impl", IMPLS)
def test_same_bits_again_and_inputs_left_alone(impl):
    case = inputs(torch.bfloat16, torch.bfloat16)
    grad = gradient(case, torch.bfloat16)
    before = [x.detach().clone() for x in (*case, grad)]
    first, second = (run(implementation(impl), case, torch.bfloat16, grad) for _ in range(2))
    assert all(torch.equal(*pair) for pair in zip(first, second))
    assert all(torch.equal(*pair) for pair in zip((*case, grad), before))


@pytest.mark.parametrize("impl", IMPLS)
def test_saves_indices_only(impl):
    case = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        splice_video(*case, torch.float32, impl=impl)
    assert saved == [case[i].data_ptr() for i in (0, 3, 5)]


def test_auto_is_triton_on_cuda_only(monkeypatch):
    launches = noted_launches(monkeypatch, kernel_module)
    case = inputs()
    run(implementation("auto"), case, torch.float32, gradient(case, torch.float32))
    assert bool(launches) == (DEVICE == "cuda")


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="splice_video: impl .* 'fast'"):
        splice_video(*inputs(), torch.float32, impl="fast")


@pytest.mark.parametrize("index", [2, 3, 4, 5], ids=["video", "video rows", "boundary", "boundary rows"])
def test_shapes_that_do_not_fit_are_refused(index):
    case = list(inputs())
    case[index] = case[index][1:]
    with pytest.raises(ValueError, match="splice_video: .* do not fit"):
        splice_video(*case, torch.float32)
