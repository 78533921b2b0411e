"""The decoder's input rows on CPUs: copies of rows, each written once.

Dimensions: N packed rows, D channels, T rows of the embedding table, P projected video rows, V videos.
"""

from torch.nn import functional

from ..plain import wide


def _forward(token_ids_N, table_TD, video_PD, video_rows_P, boundary_2D, boundary_rows_2V, dtype):
    rows_ND = functional.embedding(token_ids_N, table_TD).to(dtype)
    rows_ND.index_copy_(0, video_rows_P, video_PD.to(dtype))
    if boundary_2D is not None:
        rows_ND.index_copy_(0, boundary_rows_2V, boundary_2D.to(dtype).repeat(boundary_rows_2V.numel() // 2, 1))
    return rows_ND


def _video_gradient(grad_ND, video_rows_P, dtype):
    return grad_ND[video_rows_P].to(dtype)


def _boundary_gradient(grad_ND, boundary_rows_2V, dtype):
    return wide(grad_ND[boundary_rows_2V]).unflatten(0, (-1, 2)).sum(0).to(dtype)


SPLICE_VIDEO = _forward, _video_gradient, _boundary_gradient

__all__ = ["SPLICE_VIDEO"]
