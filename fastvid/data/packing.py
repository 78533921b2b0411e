"""Samples laid end to end: what a batch computes once, and what it need not compute at all.

A sample's rows are a chain of pieces, each of which attends to its ancestors and itself:

    system prompt ← text before the video ← video ← question and answer

Pieces that samples of a batch have in common stand in it once (`share`): chains become a tree, whose gradient is that
of the samples packed apart, since every row sees what it would see there. Where the backbone is frozen, the rows before
the first trained one are pieces ahead of all others, and those of the system prompt are not in the batch at all.

Dimensions: N packed rows, R rows of one video, C channels of the vision tower.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import ArrayLike

from fastvid.batch import AttentionLayout, Branches, Channels, Features, PackedBatch, VideoTokens, by_tower
from fastvid.data.conversation import EncodedSample


def pack(
    samples: Sequence[tuple[EncodedSample, Sequence[Features]]],
    tokens: VideoTokens,
    channels: Channels,
    *,
    prefix: Sequence[int] = (),
    frozen: bool = False,
    share: bool = False,
    branches: bool = True,
) -> PackedBatch:
    """Lay samples end to end.

    Args:
        samples: (EncodedSample, list of `Features`) pairs; R may differ from video to video. Without any, the batch
            is one unsupervised row, so that a rank with nothing to train on still takes part in every collective.
        tokens: `VideoTokens`.
        channels: of all features.
        prefix: ids of the system prompt (`fastvid.data.conversation.system_prefix`). A sample that does not begin with
            them is packed whole.
        frozen: the backbone is: the model keeps the keys and values of `prefix`, whose rows stay out of the batch, and
            rows before a sample's first video need no gradient.
        share: rows that samples have in common, up to the end of a video (or of `prefix`), stand in the batch once.
        branches: what samples do not share may lie in another order than theirs, so that attention need not copy the
            keys of what they do. Without, supervised rows lie in the samples' order.

    Returns:
        PackedBatch, `parted`; its pieces are its segments: those without gradient first, branches last.
    """
    chains = [Chain(sample, tokens, prefix=prefix, frozen=frozen, share=share) for sample, _ in samples]
    for chain, (sample, videos) in zip(chains, samples):
        assert len(chain.patches) == sum(map(len, videos)), f"{sample.id}: placeholders and features differ"
    pieces, leaves = _tree(chains, [videos for _, videos in samples])
    if not pieces:
        pieces = [_Piece(np.zeros(1, dtype=np.int64), 0, None, [], False)]
    if all(piece.frozen for piece in pieces):
        pieces[-1].frozen = False  # so that every rank's backward reaches every layer that others may wait in
    pieces = _in_order(pieces) if branches else sorted(pieces, key=lambda piece: not piece.frozen)
    at = 0
    for piece in pieces:
        piece.row, at = at, at + len(piece.ids)

    ids = np.concatenate([piece.ids for piece in pieces])
    patches = np.flatnonzero(ids == tokens.patch)
    videos = [video for piece in pieces for video in piece.videos]
    sizes = np.array([len(video) for video in videos] if tokens.start is not None else [], dtype=np.int64)
    ends = sizes.cumsum()
    boundaries = np.stack([patches[ends - sizes] - 1, patches[ends - 1] + 1], axis=1)
    video_rows, *features = _features(videos, patches, channels)
    loss_rows, targets = _supervised(chains, leaves)
    layout, prefix_rows = _layout(pieces, len(prefix))
    return PackedBatch(
        token_ids=torch.from_numpy(ids),
        positions=torch.from_numpy(ranges([p.first for p in pieces], [len(p.ids) for p in pieces]).astype(np.int32)),
        layout=layout,
        video_rows=torch.from_numpy(video_rows),
        features=features[0],
        features_2=features[1] if len(features) > 1 else None,
        boundary_rows=torch.from_numpy(boundaries.flatten()),
        loss_rows=loss_rows,
        targets=targets,
        sample_ids=[sample.id for sample, _ in samples],
        prefix_rows=prefix_rows,
        frozen_rows=sum(len(piece.ids) for piece in pieces if piece.frozen),
        sample_rows=sum(len(chain.ids) for chain in chains),
    ).parted()


def _features(videos, patches, channels):
    """(rows that features fill, the features of each vision tower end to end): see `PackedBatch`."""
    towers = [channels] if isinstance(channels, int) else channels
    blocks = [by_tower(video) for video in videos]
    if len(towers) > 1:
        second = np.repeat(np.arange(2 * len(blocks)) % 2 > 0, [len(each) for both in blocks for each in both])
        patches = np.concatenate([patches[~second], patches[second]])
    found = zip(*blocks) if blocks else [(torch.empty(0, each, dtype=torch.float16),) for each in towers]
    return patches, *map(torch.cat, found)


@dataclass(eq=False)
class _Piece:
    """Rows that are computed together.

    Attributes:
        ids: [n] int64.
        first: position of the first row.
        parent: the piece that they follow, if that is in the batch.
        videos: features of the videos in it.
        frozen: it depends on nothing that is trained.
        row: packed row of the first one.
        branch: attention reaches its ancestors in a part of its own (`fastvid.batch.Branches`).
    """

    ids: np.ndarray
    first: int
    parent: "_Piece | None"
    videos: Sequence[Features]
    frozen: bool
    row: int = 0
    branch: bool = False

    def lineage(self) -> "list[_Piece]":
        """Its ancestors, the earliest first, and itself."""
        return [*self.parent.lineage(), self] if self.parent else [self]


class Chain:
    """A sample's rows, and where they may be cut into pieces. Arguments as `pack` takes them.

    Attributes:
        ids: [n] int64.
        kept: rows at its beginning that the batch leaves out, as the model keeps their keys and values.
        live: the first row that something trained reaches; 0 unless the backbone is frozen.
        video_end: end of the last video; 0 without one.
        shareable: ends of what it may have in common with others, ascending.
    """

    def __init__(
        self,
        sample: EncodedSample,
        tokens: VideoTokens,
        *,
        prefix: Sequence[int] = (),
        frozen: bool = False,
        share: bool = False,
    ):
        self.sample = sample
        self.ids = np.asarray(sample.token_ids, dtype=np.int64)
        self.patches = np.flatnonzero(self.ids == tokens.patch)
        boundary, videos = int(tokens.start is not None), len(self.patches) > 0
        self.video_end = int(self.patches[-1]) + 1 + boundary if videos else 0
        # The row before a supervised token predicts it: what is cut off for others to share must not hold one.
        latest = min([len(self.ids), *(start for start, _ in sample.supervised)]) - 1
        system = len(prefix) if len(prefix) <= latest and np.array_equal(self.ids[: len(prefix)], prefix) else 0
        self.kept = system if frozen else 0
        self.live = (int(self.patches[0]) - boundary if videos else len(self.ids)) if frozen else 0
        self.shareable = [end for end in (system, self.video_end) if share and self.kept < end <= latest]

    @property
    def rows(self) -> tuple[int, int]:
        """(rows that it alone needs, rows of the video that it may share); those of a shared system prompt are
        neither."""
        *before, last = [0, self.kept, *self.shareable]
        return len(self.ids) - last, last - max(before) if last == self.video_end else 0

    def pieces(self, shared: Iterable[int]) -> Iterator[tuple[int, int, bool, bool]]:
        """(first, end, whether it holds the videos, whether it is frozen) of each piece, cut at `shared` and where
        due."""
        cuts = {self.kept, len(self.ids), *shared, *([self.live] if self.live > self.kept else [])}
        for first, end in pairwise(sorted(cuts)):
            yield first, end, first < self.video_end <= end, end <= self.live

    def beginning(self, end: int) -> tuple[bytes, tuple[str, ...]]:
        """What the rows before `end` are computed from."""
        return self.ids[:end].tobytes(), tuple(self.sample.videos) if self.video_end <= end else ()


def _tree(chains, videos):
    """The pieces that all samples are made of, and for each sample the last one of its chain."""
    counts = Counter(chain.beginning(end) for chain in chains for end in chain.shareable)
    pieces, leaves, known = [], [], {}
    for chain, features in zip(chains, videos):
        shared, among = [], 1
        for end in reversed(chain.shareable):  # who shares more also shares less: cut only where somebody parts
            if counts[chain.beginning(end)] > among:
                shared.append(end)
                among = counts[chain.beginning(end)]
        piece = None
        for first, end, holds_videos, frozen in chain.pieces(shared):
            beginning = chain.beginning(end) if end <= max(shared, default=0) else None
            if beginning not in known:
                pieces.append(_Piece(chain.ids[first:end], first, piece, features if holds_videos else [], frozen))
            piece = known.setdefault(beginning, pieces[-1]) if beginning else pieces[-1]
        leaves.append(piece)
    return pieces, leaves


def _in_order(pieces):
    """Pieces as they are to lie: frozen ones, others, those that branches go on from, branches by where they begin.

    A branch is longer behind than in itself: else a copy of what it goes on from costs less than a second attention.
    """
    inner = {id(piece.parent) for piece in pieces}
    place = {id(piece): number for number, piece in enumerate(pieces)}
    for piece in pieces:
        goes_on = piece.parent is not None and not piece.parent.frozen
        piece.branch = goes_on and id(piece) not in inner and piece.first > len(piece.ids)
    beginnings = {id(piece.parent) for piece in pieces if piece.branch}

    def key(piece):
        begins = id(piece) in beginnings
        return not piece.frozen, begins + 2 * piece.branch, place[id(piece.parent)] if piece.branch else 0

    return sorted(pieces, key=key)


def _layout(pieces, prefix):
    """Attention layout of pieces, and the rows of the constant prefix that it counts: all of them, or 0 without
    need."""
    lineages = [piece.lineage() for piece in pieces]
    lengths = [len(piece.ids) for piece in pieces]
    prefix = prefix if any(first.first for first, *_ in lineages) else 0
    if not prefix and all(len(lineage) == 1 for lineage in lineages):
        return AttentionLayout.of_lengths(lengths), 0
    runs = [_runs(lineage, prefix) for lineage in lineages]
    return _of_runs(lengths, runs, _branches(pieces, runs, lengths)), prefix


def _runs(lineage, prefix):
    """(first row, rows) of each piece that its last one attends to, counted from the constant prefix on."""
    runs = [(piece.row + prefix, len(piece.ids)) for piece in lineage]
    return [(0, prefix), *runs] if lineage[0].first else runs


def _of_runs(lengths, runs, branches=None):
    """Segments of so many queries, each over the keys of its runs."""
    rows = torch.from_numpy(ranges(*zip(*(run for each in runs for run in each))))
    return AttentionLayout.of_lengths(lengths, [_rows(each) for each in runs], rows, branches)


def _rows(runs):
    return sum(size for _, size in runs)


def _branches(pieces, runs, lengths):
    """The same as attention in two parts, or None where no piece is a branch."""
    first = next((i for i, piece in enumerate(pieces) if piece.branch), None)
    if first is None:
        return None
    own = [each[-1:] if piece.branch else each for piece, each in zip(pieces, runs)]
    causal = _of_runs(lengths, own)
    if own == [[(piece.row, length)] for piece, length in zip(pieces, lengths)]:
        causal = AttentionLayout.of_lengths(lengths)  # keys need no copy
    rows = Counter()
    for piece, length in zip(pieces[first:], lengths[first:]):
        rows[id(piece.parent)] += length
    beginning = next(i for i, piece in enumerate(pieces) if id(piece) in rows)
    keys = [_rows(each) for each in runs[beginning:first]]
    full = AttentionLayout.of_lengths([rows[id(piece)] for piece in pieces[beginning:first]], keys)
    return Branches(causal, full, sum(lengths[:first]), sum(_rows(each) for each in runs[:beginning]))


def _supervised(chains, leaves):
    """Packed rows that predict a token, ascending, and those tokens."""
    rows, targets = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for chain, leaf in zip(chains, leaves):
        spans = chain.sample.supervised
        at = ranges([start for start, _ in spans], [end - start for start, end in spans])
        targets.append(chain.ids[at])
        lineage = leaf.lineage()
        piece = np.searchsorted([piece.first for piece in lineage], at - 1, side="right") - 1
        rows.append(at - 1 + np.array([piece.row - piece.first for piece in lineage])[piece])
    rows, targets = np.concatenate(rows), np.concatenate(targets)
    order = np.argsort(rows, kind="stable")
    return torch.from_numpy(rows[order]), torch.from_numpy(targets[order])


def ranges(starts: ArrayLike, sizes: ArrayLike) -> np.ndarray:
    """[start, start + size) of each, one after the other; int64."""
    firsts, lengths = (np.asarray(numbers, dtype=np.int64) for numbers in (starts, sizes))
    return np.arange(lengths.sum()) + np.repeat(firsts - lengths.cumsum() + lengths, lengths)
