"""splice_video: values and gradients against its reference, what gets a gradient."""

import pytest
import torch
from fastvid_kernels.splice_video import splice_video, splice_video_reference

# Rows 2..4 and 7..9 are video, with boundary rows around them; the placeholder is 9.
TOKENS = [3, 7, 9, 9, 9, 8, 7, 9, 9, 9, 8, 3, 5]
VIDEO_ROWS, BOUNDARY_ROWS = [2, 3, 4, 7, 8, 9], [1, 5, 6, 10]


def inputs(table=torch.float32, video=torch.float32, *, boundary=True, trained=(True, True, True), videos=2, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = torch.tensor(TOKENS if videos else [3, 5, 3, 3])
    return (tokens, randn(10, 6).to(table).requires_grad_(trained[0]),
            randn(3 * videos, 6).to(video).requires_grad_(trained[1]),
            torch.tensor(VIDEO_ROWS[:3 * videos], dtype=torch.int64),
            randn(2, 6).requires_grad_(trained[2]) if boundary else None,
            torch.tensor(BOUNDARY_ROWS[:2 * videos] if boundary else [], dtype=torch.int64))


def run(function, case, dtype, seed=1):
    out = function(*case, dtype)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    sources = [x for x in case if x is not None and x.requires_grad]
    return out, *torch.autograd.grad(out, sources, grad)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16,) * 3,
                                    (torch.bfloat16, torch.bfloat16, torch.float32),
                                    (torch.float32, torch.bfloat16, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("boundary", [True, False])
@pytest.mark.parametrize("videos", [2, 0])
@pytest.mark.parametrize("trained", [(True, True, True), (False, True, True), (True, False, False)])
def test_equals_reference(dtypes, boundary, videos, trained):
    table, video, dtype = dtypes
    case = inputs(table, video, boundary=boundary, trained=trained, videos=videos)
    found, expected = (run(f, case, dtype) for f in (splice_video, splice_video_reference))
    assert found[0].dtype == dtype and torch.equal(found[0], expected[0])
    assert len(found) == len(expected)
    for ours, theirs in zip(found[1:], expected[1:]):
        assert ours.dtype == theirs.dtype
        tolerance = 1e-6 if dtype == torch.float32 and theirs.dtype == torch.float32 else 2**-7
        if ours.numel():
            assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_rows_come_from_where_they_should():
    _tokens, table, video, video_rows, boundary, _boundary_rows = case = inputs()
    out = splice_video(*case, torch.float32)
    assert torch.equal(out[video_rows], video)
    assert torch.equal(out[[1, 6]], boundary[[0, 0]]) and torch.equal(out[[5, 10]], boundary[[1, 1]])
    assert torch.equal(out[[0, 11, 12]], table[[3, 3, 5]])


def test_gradients_of_replaced_rows_do_not_reach_the_table():
    case = inputs()
    _, grad_table, _, _ = run(splice_video, case, torch.float32)
    assert grad_table.abs().sum(1).nonzero()[:, 0].tolist() == [3, 5]
    without = inputs(boundary=False)
    assert run(splice_video, without, torch.float32)[1].abs().sum(1).nonzero()[:, 0].tolist() == [3, 5, 7, 8]


@pytest.mark.parametrize("function", [splice_video, splice_video_reference])
def test_gradient_numerically(function):
    tokens, table, video, video_rows, boundary, boundary_rows = inputs(torch.float64, torch.float64)
    boundary = boundary.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda t, v, b: function(tokens, t, v, video_rows, b, boundary_rows, torch.float64), (table, video, boundary))


def test_gradients_are_summed_in_fp32():
    """1001 rows of one token, and of one boundary token: no bf16 number."""
    tokens = torch.cat([torch.zeros(1001, dtype=torch.int64), torch.ones(2002, dtype=torch.int64)])
    table = torch.zeros(2, 4, requires_grad=True)
    boundary = torch.zeros(2, 4, requires_grad=True)
    out = splice_video(tokens, table, torch.zeros(0, 4, dtype=torch.bfloat16), tokens[:0], boundary,
                       torch.arange(1001, 3003), torch.bfloat16)
    out.sum().backward()
    assert table.grad[0].unique().item() == 1001 and boundary.grad.unique().item() == 1001


def test_saves_indices_only():
    case = inputs()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        splice_video(*case, torch.float32)
    assert all(t.dtype == torch.int64 for t in saved)


def test_unknown_implementation_is_refused():
    with pytest.raises(ValueError, match="no implementation 'triton'"):
        splice_video(*inputs(), torch.float32, impl="triton")
