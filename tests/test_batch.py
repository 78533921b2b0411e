"""The packed batch and its attention layout: rows chosen from it, its parts, its copies."""

import itertools
from dataclasses import replace

import pytest
import torch
from attention_cases import keys_of
from hypothesis import given, settings
from hypothesis import strategies as st

from fastvid.batch import AttentionLayout, PackedBatch


@st.composite
def layouts(draw):
    """Segments of up to 5 rows that attend to their own rows, or to any rows before their own."""
    lengths = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    layout = AttentionLayout.of_lengths(lengths)
    if draw(st.booleans()):
        return layout
    keys = [draw(st.lists(st.integers(0, 99), min_size=n, max_size=n + 4)) for n in lengths]
    of_keys = AttentionLayout.of_lengths([len(part) for part in keys])
    return replace(
        layout,
        cu_seqlens_k=of_keys.cu_seqlens_q,
        max_seqlen_k=of_keys.max_seqlen_q,
        kv_rows=torch.tensor(list(itertools.chain.from_iterable(keys)), dtype=torch.int64),
    )


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(layouts(), st.data())
def test_chosen_rows_attend_to_what_they_did(layout, data):
    every = keys_of(layout)
    rows = sorted(data.draw(st.sets(st.integers(0, len(every) - 1))))
    chosen = layout.of_rows(torch.tensor(rows, dtype=torch.int64))
    assert keys_of(chosen) == [every[row] for row in rows]
    assert chosen.kv_rows.dtype == torch.int64 and len(chosen.kv_rows) == chosen.cu_seqlens_k[-1]
    runs = [
        row for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1 or row in layout.cu_seqlens_q.tolist()
    ]
    assert len(chosen.cu_seqlens_q) == len(runs) + 1, "one segment for each run"


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(layouts(), st.data())
def test_split_layouts_attend_to_what_they_did(layout, data):
    segments = data.draw(st.integers(0, len(layout.cu_seqlens_q) - 1))
    first, second = layout.split(segments)
    assert keys_of(first) + keys_of(second) == keys_of(layout)
    assert len(keys_of(first)) == layout.cu_seqlens_q[segments]


def batch_of(layout, loss_rows, frozen_rows=0):
    n, rows = int(layout.cu_seqlens_q[-1]), torch.tensor(loss_rows, dtype=torch.int64)
    none = torch.empty(0, dtype=torch.int64)
    return PackedBatch(
        token_ids=torch.arange(n),
        positions=torch.arange(n, dtype=torch.int32),
        layout=layout,
        video_rows=none,
        features=torch.empty(0, 4),
        boundary_rows=none,
        loss_rows=rows,
        targets=torch.zeros_like(rows),
        frozen_rows=frozen_rows,
    )


def test_parts_are_the_frozen_rows_and_the_others():
    layout = AttentionLayout.of_lengths([2, 3, 4])
    batch = batch_of(layout, [1, 3, 4, 8], frozen_rows=5).parted()
    frozen, live = batch.parts
    assert (frozen.loss_rows.tolist(), live.loss_rows.tolist()) == ([1, 3, 4], [3])
    assert keys_of(frozen.layout) + keys_of(live.layout) == keys_of(layout)
    assert keys_of(frozen.loss_layout) + keys_of(live.loss_layout) == keys_of(batch.loss_layout)
    assert batch_of(layout, [1, 3], frozen_rows=5).parted().parts is None, "no gradient is due: nothing to spare"
    assert batch_of(layout, [8]).parted().parts is None
    with pytest.raises(AssertionError, match="frozen in part"):
        batch_of(layout, [8], frozen_rows=3).parted()


def test_map_reaches_every_tensor():
    batch = batch_of(AttentionLayout.of_lengths([2, 3]), [1, 4], frozen_rows=2).parted()
    seen = []
    mapped = batch.map(lambda tensor: seen.append(tensor) or tensor.clone())

    def tensors(value):
        if isinstance(value, torch.Tensor):
            return [value]
        if isinstance(value, tuple):
            return [tensor for part in value for tensor in tensors(part)]
        return [t for v in vars(value).values() for t in tensors(v)] if hasattr(value, "__dataclass_fields__") else []

    assert {id(tensor) for tensor in tensors(batch)} == {id(tensor) for tensor in seen}
    assert not {id(tensor) for tensor in tensors(batch)} & {id(tensor) for tensor in tensors(mapped)}
    assert mapped.layout.cu_seqlens_k is mapped.layout.cu_seqlens_q, "one copy of what is one"
    assert mapped.num_rows == 5 and mapped.num_supervised == 2
