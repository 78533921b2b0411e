"""The decoder's input rows: embeddings of the text, with projected video rows and trained boundary rows in place.

Dimensions: N packed rows, D channels, T rows of the embedding table, P projected video rows (all videos), V videos.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _wide(x):
    """At least fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def splice_video_reference(token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype):
    """`splice_video` in plain differentiable torch."""
    rows_ND = torch.nn.functional.embedding(token_ids_N, table_TD).to(dtype)
    rows_ND = rows_ND.index_copy(0, video_rows_P, video_PD.to(dtype))
    if boundary_2D is None:
        return rows_ND
    videos = boundary_rows_2V.numel() // 2
    return rows_ND.index_copy(0, boundary_rows_2V, boundary_2D.to(dtype).repeat(videos, 1))


class _SpliceVideo(torch.autograd.Function):
    """Saves indices only; gradients go to the projected rows, the boundary rows, and the table if it is trained."""

    @staticmethod
    def forward(ctx, token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype):
        ctx.save_for_backward(token_ids_N, video_rows_P, boundary_rows_2V)
        ctx.table_size = table_TD.shape[0]
        ctx.dtypes = table_TD.dtype, video_PD.dtype, None if boundary_2D is None else boundary_2D.dtype
        return splice_video_reference(token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V,
                                      dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_ND):
        token_ids_N, video_rows_P, boundary_rows_2V = ctx.saved_tensors
        table_dtype, video_dtype, boundary_dtype = ctx.dtypes
        grad_table_TD = grad_video_PD = grad_boundary_2D = None
        if ctx.needs_input_grad[2]:
            grad_video_PD = grad_ND[video_rows_P].to(video_dtype)
        if ctx.needs_input_grad[4]:
            grad_boundary_2D = _wide(grad_ND[boundary_rows_2V]).unflatten(0, (-1, 2)).sum(0).to(boundary_dtype)
        if ctx.needs_input_grad[1]:
            grad_text_ND = _wide(grad_ND).index_fill(0, video_rows_P, 0.0)
            if boundary_dtype is not None:
                grad_text_ND = grad_text_ND.index_fill_(0, boundary_rows_2V, 0.0)
            # On CUDA this sorts the ids and adds in order, where index_add would use atomics.
            grad_table_TD = torch.ops.aten.embedding_dense_backward(
                grad_text_ND, token_ids_N, ctx.table_size, -1, False).to(table_dtype)
        return None, grad_table_TD, grad_video_PD, None, grad_boundary_2D, None, None


def splice_video(token_ids_N: Tensor, table_TD: Tensor, video_PD: Tensor, video_rows_P: Tensor,
                 boundary_2D: Tensor | None, boundary_rows_2V: Tensor, dtype: torch.dtype,
                 *, impl: str = "auto") -> Tensor:
    """Build the packed rows that enter the decoder.

    Args:
        token_ids_N: [N] int64; ids of the video's rows only need to be inside the table.
        table_TD: embedding table.
        video_PD: projected rows of all videos; P may be 0.
        video_rows_P: [P] int64, distinct, the packed row that each of them fills.
        boundary_2D: embeddings of <vid_start> and <vid_end> that replace the table's; None: the table's rows serve.
        boundary_rows_2V: [2V] int64, distinct: start and end rows, alternating, video by video.
        dtype: of the result.
        impl: "auto" or "reference": plain torch.

    Returns:
        [N, D] in `dtype`. Gradients reach only what requires one; the table's excludes the rows that were replaced,
        and sums are fp32. Saved for backward: the indices. Repeatable.

    Raises:
        ValueError: `impl` is not available here.
    """
    if impl not in ("auto", "reference"):
        raise ValueError(f"splice_video has no implementation {impl!r} here; use 'auto' or 'reference'")
    return _SpliceVideo.apply(token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype)


__all__ = ["splice_video", "splice_video_reference"]
