"""PackedBatch: the one structure that crosses from the data to the model.

All rows of all samples lie end to end; there is no padding and no attention mask. A segment is a run of rows that
attend to each other: a sample, or a part of one where samples share rows (a system prompt, a video) or where the rows
before the first trained one stand apart.

Dimensions: N rows, S segments, M key/value rows, V videos, P rows of all videos, C channels of the vision tower,
L supervised rows. Of two vision towers side by side each has its own: P_1 and P_2, C_1 and C_2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from fastvid_kernels.way_back import WayBack
from torch import Tensor


@dataclass(frozen=True)
class VideoTokens:
    """Ids of the tokens that stand for a video.

    Attributes:
        patch: <vid_patch>, the placeholder of one projected row.
        start, end: <vid_start> and <vid_end>; None without them.
        vocab_size: tokens of the tokenizer, these included.
        added: those of the ids that the model folder's tokenizer lacked; their rows are new.
    """

    patch: int
    start: int | None
    end: int | None
    vocab_size: int
    added: tuple[int, ...] = ()


Channels = int | tuple[int, int]  # C of the vision tower's features; of two towers' (C_1, C_2)


@dataclass(frozen=True, eq=False)
class FeaturePair:
    """Features of one video by two vision towers (VideoGPT+, arXiv:2406.09418). Its rows are all of the first, then all
    of the second.

    Attributes:
        first: [R_1, C_1].
        second: [R_2, C_2].
    """

    first: Tensor
    second: Tensor

    def __len__(self) -> int:
        return len(self.first) + len(self.second)

    @property
    def shape(self) -> tuple[int, tuple[int, int]]:
        """(R_1 + R_2, (C_1, C_2))."""
        return len(self), (self.first.shape[1], self.second.shape[1])


Features = Tensor | FeaturePair  # of one video


def of_towers(first: Tensor, second: Tensor | None = None) -> Features:
    """A video's features of one vision tower, or of two."""
    return first if second is None else FeaturePair(first, second)


def by_tower(features: Features) -> tuple[Tensor, ...]:
    """A video's features of each vision tower."""
    return (features.first, features.second) if isinstance(features, FeaturePair) else (features,)


def _cumulative(lengths):
    """[0, first, first + second, …] as int32."""
    bounds = torch.zeros(len(lengths) + 1, dtype=torch.int32)
    torch.cumsum(torch.as_tensor(lengths, dtype=torch.int32), 0, out=bounds[1:])
    return bounds


@dataclass(frozen=True)
class AttentionLayout:
    """Which key/value rows each segment of queries attends to: causal, aligned at the segment's last row.

    Attributes:
        cu_seqlens_q: [S+1] int32, cumulative query rows.
        max_seqlen_q: rows of the longest query segment.
        cu_seqlens_k: [S+1] int32, cumulative key rows; the same tensor as `cu_seqlens_q` when `kv_rows` is None.
        max_seqlen_k: rows of the longest key segment.
        kv_rows: [M] int64, for each key of each segment the row that it is, counted from the first row of the batch's
            constant prefix (`PackedBatch.prefix_rows`), which the packed rows follow; None: a segment's own rows.
        way_back: of `kv_rows`: which keys each packed row is. None: unknown.
        own_keys: [N] int64, where in `kv_rows` each row stands, if each stands there once: the gradient of a gather is
            then a gather too. None: unknown, or some row is a key of several segments or of none.
        branches: the same for attention in two parts, if several segments go on from the same rows.
    """

    cu_seqlens_q: Tensor
    max_seqlen_q: int
    cu_seqlens_k: Tensor
    max_seqlen_k: int
    kv_rows: Tensor | None = None
    way_back: WayBack | None = None
    own_keys: Tensor | None = None
    branches: Branches | None = None

    @cached_property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Rows of each segment's queries and keys. Whoever makes a layout knows them, and copies on a GPU keep them:
        there the host would have to wait for the tensors."""
        return self.cu_seqlens_q.diff().tolist(), self.cu_seqlens_k.diff().tolist()

    @staticmethod
    def of_lengths(
        lengths: Sequence[int],
        key_lengths: Sequence[int] | None = None,
        kv_rows: Tensor | None = None,
        branches: Branches | None = None,
    ) -> AttentionLayout:
        """Segments of `lengths` rows, each attending to its own; or to as many keys as `key_lengths` has, of
        `kv_rows`. A segment without queries passes over keys.
        """
        queries = _cumulative(lengths)
        keys, key_lengths = (queries, lengths) if key_lengths is None else (_cumulative(key_lengths), key_lengths)
        longest = max((rows for asked, rows in zip(lengths, key_lengths) if asked), default=0)
        layout = AttentionLayout(queries, max(lengths, default=0), keys, longest, kv_rows, branches=branches)
        vars(layout)["lengths"] = list(lengths), list(key_lengths)
        return layout

    @property
    def placed(self) -> AttentionLayout:
        """Where keys are to lie for attention in two parts; without branches, as they do."""
        return self if self.branches is None else self.branches.causal

    def replaced(self, **tensors: Any) -> AttentionLayout:
        """The same segments, of which is known what was, with other tensors."""
        layout = replace(self, **tensors)
        if "lengths" in vars(self):
            vars(layout)["lengths"] = self.lengths
        return layout

    def of_rows(self, rows: Tensor) -> AttentionLayout:
        """Who `rows` alone attend to, so that only they need queries: one segment for each run of consecutive rows.

        Args:
            rows: [L] int64 on the CPU, ascending; this layout's queries are all packed rows, in order.

        Returns:
            A layout with `kv_rows`, whose queries are `rows`. Keys of a run end at its last row.
        """
        bounds, ends = self.cu_seqlens_q.long(), self.cu_seqlens_k.long()
        segment = torch.searchsorted(bounds, rows, right=True) - 1
        breaks = torch.ones(len(rows) + 1, dtype=torch.bool)  # between two runs, before the first and after the last
        breaks[1:-1] = (rows[1:] != rows[:-1] + 1) | (segment[1:] != segment[:-1])
        breaks = breaks.nonzero().flatten() if len(rows) else torch.zeros(1, dtype=torch.int64)
        at, last = segment[breaks[:-1]], rows[breaks[1:] - 1]
        sizes = ends[at + 1] - (bounds[at + 1] - 1 - last) - ends[at]
        keys = torch.arange(int(sizes.sum())) + (ends[at] - sizes.cumsum(0) + sizes).repeat_interleave(sizes)
        return AttentionLayout.of_lengths(
            breaks.diff().tolist(),
            sizes.tolist(),
            keys if self.kv_rows is None else self.kv_rows[keys],
            self.branches and self.branches.of_rows(rows),
        )

    def with_rows(self) -> AttentionLayout:
        """The same layout, which says which row each key is. On the CPU."""
        branches = self.branches and replace(self.branches, causal=self.branches.causal.with_rows())
        rows = torch.arange(int(self.cu_seqlens_k[-1])) if self.kv_rows is None else self.kv_rows
        return self.replaced(kv_rows=rows, branches=branches)

    def split(self, segments: int) -> tuple[AttentionLayout, AttentionLayout]:
        """(the first `segments` segments, the others), whose queries each count from 0. Branches stay together: they
        are among the others. On the CPU."""
        rows = torch.arange(int(self.cu_seqlens_k[-1])) if self.kv_rows is None else self.kv_rows
        queries, keys = self.lengths
        first, others = rows.tensor_split([int(self.cu_seqlens_k[segments])])
        branches = self.branches and self.branches.without(segments)
        return (
            AttentionLayout.of_lengths(queries[:segments], keys[:segments], first),
            AttentionLayout.of_lengths(queries[segments:], keys[segments:], others, branches),
        )

    def with_way_back(self, first: int, rows: int) -> AttentionLayout:
        """The same layout with `way_back` and `own_keys`, for `rows` packed rows that `kv_rows` counts from `first`.
        On the CPU.
        """
        branches = self.branches and self.branches.with_way_back(first, rows)
        if self.kv_rows is None:
            return self.replaced(branches=branches)
        way_back = WayBack.of(self.kv_rows, first, rows)
        once = torch.equal(way_back.starts_N1, torch.arange(rows + 1, dtype=torch.int32))
        own_keys = way_back.places.long() if once else None
        return self.replaced(way_back=way_back, own_keys=own_keys, branches=branches)

    def map(self, function: Callable[[Tensor], Tensor]) -> AttentionLayout:
        """The same layout with `function`, which leaves values alone, applied to every tensor."""
        queries = function(self.cu_seqlens_q)
        keys = queries if self.cu_seqlens_k is self.cu_seqlens_q else function(self.cu_seqlens_k)
        kv_rows, own_keys = (rows if rows is None else function(rows) for rows in (self.kv_rows, self.own_keys))
        way_back = self.way_back and self.way_back.map(function)
        return self.replaced(
            cu_seqlens_q=queries,
            cu_seqlens_k=keys,
            kv_rows=kv_rows,
            way_back=way_back,
            own_keys=own_keys,
            branches=self.branches and self.branches.map(function),
        )


@dataclass(frozen=True)
class Branches:
    """Attention in two parts, for segments that go on from the same rows: branches, from a beginning.

    First every query attends causally, branches to their own rows only. Then branches attend to all rows of their
    beginning. So a beginning's keys are there once, however many branches it has.

    Attributes:
        causal: the first part, of all queries. Its `kv_rows` may hold more keys than its segments have: behind those.
        full: the second part, not causal: a segment for each beginning, whose queries are those of its branches.
        first_query: branches' queries are this one and all after it.
        first_key: keys of `full` begin at this one of `causal`'s.
    """

    causal: AttentionLayout
    full: AttentionLayout
    first_query: int
    first_key: int

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """(keys of `causal`, keys of `full`)."""
        return sum(self.causal.lengths[1]), sum(self.full.lengths[1])

    def of_rows(self, rows: Tensor) -> Branches | None:
        """`AttentionLayout.of_rows`; None if no branch has such a row."""
        bounds = self.first_query + self.full.cu_seqlens_q.long()
        counts = torch.searchsorted(rows, bounds).diff()
        if not counts.sum():
            return None
        asked, sizes = counts > 0, self.full.cu_seqlens_k.long().diff()
        places = (torch.arange(self.sizes[1]) + self.first_key)[asked.repeat_interleave(sizes)]
        causal = self.causal.of_rows(rows)
        assert causal.kv_rows is not None
        beginnings = places if self.causal.kv_rows is None else self.causal.kv_rows[places]
        return Branches(
            causal.replaced(kv_rows=torch.cat([causal.kv_rows, beginnings])),
            AttentionLayout.of_lengths(counts[asked].tolist(), sizes[asked].tolist()),
            int((rows < self.first_query).sum()),
            len(causal.kv_rows),
        )

    def without(self, segments: int) -> Branches:
        """The same behind the first `segments` segments, which are no branches or beginnings. On the CPU."""
        queries, keys = (sum(lengths[:segments]) for lengths in self.causal.lengths)
        return replace(
            self,
            causal=self.causal.split(segments)[1],
            first_query=self.first_query - queries,
            first_key=self.first_key - keys,
        )

    def with_way_back(self, first: int, rows: int) -> Branches:
        """`AttentionLayout.with_way_back` of the keys that are placed."""
        return replace(self, causal=self.causal.with_way_back(first, rows))

    def map(self, function: Callable[[Tensor], Tensor]) -> Branches:
        """The same with `function`, which leaves values alone, applied to every tensor."""
        return replace(self, causal=self.causal.map(function), full=self.full.map(function))


@dataclass(frozen=True)
class BatchPart:
    """Consecutive rows of a batch that are computed together.

    Attributes:
        layout: who they attend to; keys are counted as in the batch's own layout, queries from the part's first row.
        loss_rows: [l] int64, rows whose output is supervised, counted from the part's first.
        loss_layout: who those attend to.
    """

    layout: AttentionLayout
    loss_rows: Tensor
    loss_layout: AttentionLayout

    def map(self, function: Callable[[Tensor], Tensor]) -> BatchPart:
        """The same part with `function` applied to every tensor."""
        return BatchPart(self.layout.map(function), function(self.loss_rows), self.loss_layout.map(function))


@dataclass(frozen=True)
class PackedBatch:
    """Samples laid end to end.

    Attributes:
        token_ids: [N] int64, text and placeholder ids.
        positions: [N] int32, rotary position of each row.
        layout: who attends to whom.
        video_rows: [P] int64, rows that the projected features fill, video by video; each has any number of them. Of
            two towers those of `features`, then those of `features_2`.
        features: [P, C] fp16/bf16/fp32, the rows of all videos end to end.
        boundary_rows: [2V] int64, rows of <vid_start>, <vid_end>, video by video; empty without those tokens.
        loss_rows: [L] int64, rows whose output is supervised.
        targets: [L] int64, the token that each supervised row must predict.
        sample_ids: for messages about this batch.
        loss_layout: who the supervised rows attend to, as `layout.of_rows(loss_rows)` has it: the last layer needs no
            other queries. None: to be computed with all rows.
        prefix_rows: rows of the constant prefix (the system prompt, the same in every batch) whose keys and values
            the model keeps (`VideoLlava.keep_prefix`); the batch does not hold them. `positions` count them.
        frozen_rows: the first so many packed rows depend on nothing that is trained, so they need no gradient.
        sample_rows: rows of the samples laid end to end without sharing, the constant prefix included.
        parts: the frozen rows, and all others; see `parted`. `layout` and `loss_layout` then say which rows keys are,
            in all cases. None: the model treats all rows alike.
        features_2: [P_2, C_2], likewise, of the second vision tower; `features` are [P_1, C_1]. None: there is one.
    """

    token_ids: Tensor
    positions: Tensor
    layout: AttentionLayout
    video_rows: Tensor
    features: Tensor
    boundary_rows: Tensor
    loss_rows: Tensor
    targets: Tensor
    sample_ids: list[str] = field(default_factory=list)
    loss_layout: AttentionLayout | None = None
    prefix_rows: int = 0
    frozen_rows: int = 0
    sample_rows: int = 0
    parts: tuple[BatchPart, BatchPart] | None = None
    features_2: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return self.token_ids.numel()

    @property
    def second_rows(self) -> int:
        """Of `video_rows` those of a second vision tower."""
        return 0 if self.features_2 is None else len(self.features_2)

    @property
    def num_supervised(self) -> int:
        return self.targets.numel()

    def parted(self) -> PackedBatch:
        """The same batch with what spares the model work: `loss_layout`, ways back, `parts` if rows are frozen. On the
        CPU.

        Where no supervised row is left outside the frozen ones there is nothing to spare, and no parts.
        """
        loss_layout = self.loss_layout or self.layout.of_rows(self.loss_rows)
        batch = replace(self, loss_layout=loss_layout)
        supervised = int(torch.searchsorted(self.loss_rows, self.frozen_rows))
        if not self.frozen_rows or supervised == self.num_supervised:
            return replace(
                batch,
                layout=batch.layout.with_way_back(self.prefix_rows, self.num_rows),
                loss_layout=loss_layout.with_way_back(self.prefix_rows, self.num_rows),
            )
        segments = int(torch.searchsorted(self.layout.cu_seqlens_q, self.frozen_rows))
        assert self.layout.cu_seqlens_q[segments] == self.frozen_rows, "a segment is frozen in part"
        layout = self.layout.with_rows()
        frozen, live = layout.split(segments)
        before, rows = self.prefix_rows + self.frozen_rows, self.num_rows - self.frozen_rows
        frozen_loss, live_loss = self.loss_rows[:supervised], self.loss_rows[supervised:] - self.frozen_rows
        parts = (
            BatchPart(frozen, frozen_loss, frozen.of_rows(frozen_loss)),
            BatchPart(live.with_way_back(before, rows), live_loss, live.of_rows(live_loss).with_way_back(before, rows)),
        )
        return replace(batch, layout=layout, parts=parts)

    def map(self, function: Callable[[Tensor], Tensor]) -> PackedBatch:
        """The same batch with `function` applied to every tensor."""
        values = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                values[f.name] = function(value)
            elif isinstance(value, AttentionLayout):
                values[f.name] = value.map(function)
            elif f.name == "parts" and value is not None:
                values[f.name] = tuple(part.map(function) for part in value)
        return replace(self, **values)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """The batch on `device`."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        """The batch in page-locked memory, from which copies to a GPU overlap with work."""
        return self.map(Tensor.pin_memory)
