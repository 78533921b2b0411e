"""Attention of answers that grow: against attention of each alone, with keys written out."""

import pytest
import torch

from fastvid.batch import AttentionLayout
from fastvid.model.attention import SDPA
from fastvid.model.decoding import DecodingLayout


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize(
    "alone, shared",
    [
        ([(2, 5)], []),
        ([(0, 3), (3, 1), (9, 4)], []),
        ([], [((0, 7), [(7, 2)])]),
        ([], [((3, 4), [(7, 2), (20, 1), (10, 6)]), ((25, 2), [(27, 3), (36, 4)])]),
        ([(1, 2), (30, 5)], [((3, 4), [(7, 2), (20, 1)])]),
    ],
)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_each_query_sees_its_own_rows(kv_heads, alone, shared, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    count = len(alone) + sum(len(own) for _, own in shared)
    q, k, v = (
        torch.randn(rows, heads, 8, generator=generator) for rows, heads in ((count, 6), (40, kv_heads), (40, kv_heads))
    )
    seen = [range(first, first + rows) for first, rows in alone]
    for (first, rows), own in shared:
        seen += [[*range(first, first + rows), *range(start, start + size)] for start, size in own]
    used = sorted({row for rows in seen for row in rows})
    for x in (k, v):  # no row that nobody sees counts
        x[[row for row in range(40) if row not in used]] = float("inf") if kv_heads == 1 else 1e4
    expected = []
    for query, rows in zip(q, seen):
        layout = AttentionLayout.of_lengths([1], [len(rows)])
        expected.append(SDPA(query[None], k[list(rows)], v[list(rows)], layout))
    layout = DecodingLayout.of(alone, shared)
    found = SDPA(*(x.to(dtype) for x in (q, k, v)), layout)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), torch.cat(expected), atol=tolerance, rtol=tolerance)
