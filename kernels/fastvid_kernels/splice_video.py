"""The decoder's input rows: embeddings of the text, with projected video rows and trained boundary rows in place.

Dimensions: N packed rows, D channels, T rows of the embedding table, P projected video rows (all videos), V videos.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu
from .dispatch import launch, use_triton
from .plain import wide


def splice_video_reference(
    token_ids_N: Tensor,
    table_TD: Tensor,
    video_PD: Tensor,
    video_rows_P: Tensor,
    boundary_2D: Tensor | None,
    boundary_rows_2V: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`splice_video` in plain differentiable torch."""
    rows_ND = torch.nn.functional.embedding(token_ids_N, table_TD).to(dtype)
    rows_ND = rows_ND.index_copy(0, video_rows_P, video_PD.to(dtype))
    if boundary_2D is None:
        return rows_ND
    videos = boundary_rows_2V.numel() // 2
    return rows_ND.index_copy(0, boundary_rows_2V, boundary_2D.to(dtype).repeat(videos, 1))


def _tiles(rows, D):
    """Columns of a program, programs per row, grid, of copies of rows."""
    BLOCK_D = min(triton.next_power_of_2(max(D, 1)), 2048)
    blocks = triton.cdiv(D, BLOCK_D)
    return BLOCK_D, blocks, (rows * blocks,)


@triton.jit(
    do_not_specialize=["P", "boundaries"], do_not_specialize_on_alignment=["video_rows_ptr", "boundary_rows_ptr"]
)
def _splice_map_kernel(sources_ptr, video_rows_ptr, boundary_rows_ptr, P, boundaries, BLOCK: tl.constexpr):
    """Marks the packed rows that do not come from the table: p ≥ 0 for projected row p, −2 for a start, −3 for an
    end."""
    source = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(video_rows_ptr + source, mask=source < P, other=0)
    tl.store(sources_ptr + row, source, mask=source < P)
    row = tl.load(boundary_rows_ptr + source, mask=source < boundaries, other=0)
    tl.store(sources_ptr + row, -2 - source % 2, mask=source < boundaries)


@triton.jit(do_not_specialize_on_alignment=["token_ids_ptr"])
def _splice_fwd_kernel(
    sources_ptr,
    token_ids_ptr,
    table_ptr,
    video_ptr,
    boundary_ptr,
    out_ptr,
    D,
    BLOCKS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    columns = program % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    source = tl.load(sources_ptr + row).to(tl.int64)
    if source >= 0:
        x = tl.load(video_ptr + source * D + columns, mask=inside).to(tl.float32)
    else:
        if source == -1:
            token = tl.load(token_ids_ptr + row).to(tl.int64)
            x = tl.load(table_ptr + token * D + columns, mask=inside).to(tl.float32)
        else:
            x = tl.load(boundary_ptr + (-2 - source) * D + columns, mask=inside).to(tl.float32)
    tl.store(out_ptr + row * D + columns, x.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["video_rows_ptr"])
def _splice_video_bwd_kernel(grad_ptr, video_rows_ptr, grad_video_ptr, D, BLOCKS: tl.constexpr, BLOCK_D: tl.constexpr):
    program = tl.program_id(0)
    video_row = (program // BLOCKS).to(tl.int64)
    columns = program % BLOCKS * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    row = tl.load(video_rows_ptr + video_row).to(tl.int64)
    grad = tl.load(grad_ptr + row * D + columns, mask=inside).to(tl.float32)
    tl.store(grad_video_ptr + video_row * D + columns, grad.to(grad_video_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["V"], do_not_specialize_on_alignment=["boundary_rows_ptr"])
def _splice_boundary_bwd_kernel(
    grad_ptr, boundary_rows_ptr, grad_boundary_ptr, V, D, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    end = tl.program_id(1)
    total = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for first in range(0, V, BLOCK_V):
        videos = first + tl.arange(0, BLOCK_V)
        rows = tl.load(boundary_rows_ptr + videos * 2 + end, mask=videos < V, other=0).to(tl.int64)
        inside = (videos < V)[:, None] & (columns < D)[None, :]
        total += tl.load(grad_ptr + rows[:, None] * D + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(
        grad_boundary_ptr + end * D + columns, tl.sum(total, 0).to(grad_boundary_ptr.dtype.element_ty), mask=columns < D
    )


def _forward(token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype):
    """`splice_video` by the kernels. Where each row comes from is found out on the device: the host never waits."""
    N, D, P = token_ids_N.shape[0], table_TD.shape[1], video_PD.shape[0]
    boundaries = 0 if boundary_2D is None else boundary_rows_2V.shape[0]
    sources_N = torch.full((N,), -1, dtype=torch.int32, device=token_ids_N.device)
    launch(
        _splice_map_kernel,
        (triton.cdiv(max(P, boundaries), 256),),
        sources_N,
        video_rows_P.contiguous(),
        boundary_rows_2V.contiguous(),
        P,
        boundaries,
        256,
        num_warps=4,
    )
    out_ND = table_TD.new_empty(N, D, dtype=dtype)
    BLOCK_D, blocks, grid = _tiles(N, D)
    launch(
        _splice_fwd_kernel,
        grid,
        sources_N,
        token_ids_N.contiguous(),
        table_TD.contiguous(),
        video_PD.contiguous(),
        table_TD if boundary_2D is None else boundary_2D.contiguous(),
        out_ND,
        D,
        blocks,
        BLOCK_D,
        num_warps=4,
    )
    return out_ND


def _video_gradient(grad_ND, video_rows_P, dtype):
    """The projected rows' gradient by the kernel."""
    P, D = video_rows_P.shape[0], grad_ND.shape[1]
    grad_video_PD = grad_ND.new_empty(P, D, dtype=dtype)
    BLOCK_D, blocks, grid = _tiles(P, D)
    launch(
        _splice_video_bwd_kernel,
        grid,
        grad_ND.contiguous(),
        video_rows_P.contiguous(),
        grad_video_PD,
        D,
        blocks,
        BLOCK_D,
        num_warps=4,
    )
    return grad_video_PD


def _boundary_gradient(grad_ND, boundary_rows_2V, dtype):
    """The boundary rows' gradient by the kernel: sums over videos in a fixed order."""
    V, D = boundary_rows_2V.shape[0] // 2, grad_ND.shape[1]
    grad_boundary_2D = grad_ND.new_empty(2, D, dtype=dtype)
    launch(
        _splice_boundary_bwd_kernel,
        (triton.cdiv(D, 128), 2),
        grad_ND.contiguous(),
        boundary_rows_2V.contiguous(),
        grad_boundary_2D,
        V,
        D,
        16,
        128,
        num_warps=4,
    )
    return grad_boundary_2D


_KERNELS = _forward, _video_gradient, _boundary_gradient


class _SpliceVideo(torch.autograd.Function):
    """Saves indices only; gradients go to the projected rows, the boundary rows, and the table if it is trained."""

    @staticmethod
    def forward(ctx, token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype, passes):
        ctx.save_for_backward(token_ids_N, video_rows_P, boundary_rows_2V)
        splice, *ctx.gradients = passes
        ctx.table_size = table_TD.shape[0]
        ctx.dtypes = table_TD.dtype, video_PD.dtype, None if boundary_2D is None else boundary_2D.dtype
        return splice(token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        token_ids_N, video_rows_P, boundary_rows_2V = ctx.saved_tensors
        table_dtype, video_dtype, boundary_dtype = ctx.dtypes
        grad_table_TD = grad_video_PD = grad_boundary_2D = None
        video_gradient, boundary_gradient = ctx.gradients
        if ctx.needs_input_grad[2]:
            grad_video_PD = video_gradient(grad_ND, video_rows_P, video_dtype)
        if ctx.needs_input_grad[4]:
            grad_boundary_2D = boundary_gradient(grad_ND, boundary_rows_2V, boundary_dtype)
        if ctx.needs_input_grad[1]:
            grad_text_ND = wide(grad_ND).index_fill(0, video_rows_P, 0.0)
            if boundary_dtype is not None:
                grad_text_ND = grad_text_ND.index_fill_(0, boundary_rows_2V, 0.0)
            # On CUDA this sorts the ids and adds in order, where index_add would use atomics.
            grad_table_TD = torch.ops.aten.embedding_dense_backward(
                grad_text_ND, token_ids_N, ctx.table_size, -1, False
            ).to(table_dtype)
        return None, grad_table_TD, grad_video_PD, None, grad_boundary_2D, None, None, None


def splice_video(
    token_ids_N: Tensor,
    table_TD: Tensor,
    video_PD: Tensor,
    video_rows_P: Tensor,
    boundary_2D: Tensor | None,
    boundary_rows_2V: Tensor,
    dtype: torch.dtype,
    *,
    impl: str = "auto",
) -> Tensor:
    """Build the packed rows that enter the decoder.

    Args:
        token_ids_N: [N] int64; ids of the video's rows only need to be inside the table.
        table_TD: embedding table.
        video_PD: projected rows of all videos; P may be 0.
        video_rows_P: [P] int64, distinct, the packed row that each of them fills.
        boundary_2D: embeddings of <vid_start> and <vid_end> that replace the table's; None: the table's rows serve.
        boundary_rows_2V: [2V] int64, distinct: start and end rows, alternating, video by video.
        dtype: of the result.
        impl: "auto" (Triton on CUDA tensors, else `cpu`), "triton" or "reference" (`splice_video_reference`).

    Tables and rows are fp32, bf16 or fp16, each its own. The kernels do not check that ids and rows are in range.

    Returns:
        [N, D] in `dtype`. Gradients reach only what requires one; the table's excludes the rows that were replaced,
        and sums are fp32. Saved for backward: the indices. Repeatable.

    Raises:
        ValueError: shapes do not fit, `impl` is unknown, or "triton" where its kernels cannot run.
    """
    D = table_TD.shape[1]
    if (
        video_PD.shape != (video_rows_P.shape[0], D)
        or boundary_rows_2V.shape[0] % 2
        or (boundary_2D is not None and boundary_2D.shape != (2, D))
    ):
        raise ValueError(
            f"splice_video: a table {list(table_TD.shape)}, video rows {list(video_PD.shape)} for "
            f"{list(video_rows_P.shape)}, boundary {None if boundary_2D is None else list(boundary_2D.shape)} for "
            f"{list(boundary_rows_2V.shape)} do not fit"
        )
    tensors = [token_ids_N, table_TD, video_PD, video_rows_P, boundary_rows_2V]
    if boundary_2D is not None:
        tensors.append(boundary_2D)
    in_triton = use_triton(impl, *tensors, name="splice_video")
    given = token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype
    if impl == "reference":
        return splice_video_reference(*given)
    return _SpliceVideo.apply(*given, _KERNELS if in_triton else cpu.SPLICE_VIDEO)


__all__ = ["splice_video", "splice_video_reference"]
