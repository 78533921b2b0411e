"""Which steps of a run have the largest micro-batches: from the samples' rows, or else from about as many.

Where no budget of rows had all samples tokenized, a sample's rows are those of its videos, whose headers are read, and
a share of its text's bytes.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

import numpy as np

from fastvid.data.dataset import SampleSet
from fastvid.data.order.tokens import SampleRows, TokenOrder
from fastvid.data.sharing import Groups

if TYPE_CHECKING:
    from fastvid.data.loader import Loader

# Beyond these, a run's steps are of the same kind; looking at them takes a second or two.
_MOST_STEPS = 20_000
_MOST_VIDEOS = 5_000  # whose headers are read, which takes about as long
_MOST_RECORDS = 200_000  # which are read from their files


def largest_steps(loader: Loader, count: int, most: int = _MOST_STEPS) -> tuple[list[int], int | None]:
    """The steps whose largest micro-batch of this rank has most rows, and those where one has most keys.

    Where samples share rows or attend to a constant prefix, batches of as many rows differ in keys, several times.

    Args:
        loader: `fastvid.data.loader.Loader`.
        count: steps wanted for each, at most.
        most: only the first so many steps are looked at.

    Returns:
        (steps, most rows of a micro-batch, those that need no gradient included). The rows are None where the
        samples' are not known: then the steps were chosen by `rows_by_text`.
    """
    order, packing = loader.order, loader.packing
    known = isinstance(order, TokenOrder)
    table = order.rows if known else rows_by_text(loader.samples, getattr(order, "groups", None))
    prefix = len(packing.get("prefix", ())) if packing.get("share") or packing.get("frozen") else 0
    found = []
    for step in range(min(order.total_steps, most)):
        sizes = [_sizes(table, batch, prefix) for batch in order.micro_batches(step)] or [(0, 0)]
        found.append((*map(max, zip(*sizes)), step))
    by_rows, by_keys = (heapq.nlargest(count, found, key=lambda each, i=i: each[i]) for i in (0, 1))
    steps = dict.fromkeys(step for *_, step in by_rows + by_keys)
    return list(steps), by_rows[0][0] + table.base if known else None


def rows_by_text(samples: SampleSet, groups: Groups | None = None) -> SampleRows:
    """About how many rows each sample of a `fastvid.data.dataset.SampleSet` takes.

    Args:
        groups: `fastvid.data.sharing.Groups` of samples that compute their videos once; None where none do.
    """
    videos = _video_rows(samples)
    text = _text_bytes(samples.records)
    limit, tokens, length = samples.config.model_max_length, 0, 0
    for index in range(0, len(samples), max(1, len(samples) // 64)):
        sample = samples.encode(index)
        if 0 < len(sample.token_ids) < limit:  # what is cut tells nothing
            tokens += len(sample.token_ids) - sum(_rows_of(samples, name) for name in sample.videos)
            length += text[index]
    own = text * (tokens / length) if length else np.full(len(samples), float(limit))
    if groups is None:
        return SampleRows(np.minimum(own + videos, limit), np.zeros_like(own))
    return SampleRows(np.minimum(own, limit), videos, groups)


def _text_bytes(records):
    """Bytes of each record's text; of very many, those of the whole records, names and quotation marks included."""
    if len(records) > _MOST_RECORDS:
        return records.sizes()
    return np.array([sum(len(turn["value"].encode()) for turn in record["conversations"]) for record in records])


def _video_rows(samples):
    """Rows of each sample's videos. Of more than `_MOST_VIDEOS` some files are opened; others count as the longest of
    those.
    """
    names = samples.records.names
    known = [_rows_of(samples, name) for name in names[:: max(1, math.ceil(len(names) / _MOST_VIDEOS))]]
    rows = np.full(len(names), max(known, default=0))
    rows[:: max(1, math.ceil(len(names) / _MOST_VIDEOS))] = known
    return samples.records.sum_over_videos(rows)


def _rows_of(samples, name):
    try:
        return samples.rows_of(name)
    except (ValueError, OSError):  # told where the sample is read
        return 0


def _sizes(table, indices, prefix):
    """(rows of a micro-batch, keys that its segments attend to, `prefix` constant ones each)."""
    own, shared = table.own[indices].sum(), table.shared[indices]
    keys = own + shared.sum() + prefix * len(indices)
    if table.groups is None:
        return own + shared.sum(), keys
    _, first, samples = np.unique(table.groups.of[indices], return_index=True, return_counts=True)
    shared = shared[first]
    apart = (samples > 1) & (shared > 0)  # what several samples share is a segment of its own
    return own + shared.sum(), keys + shared[apart].sum() + prefix * apart.sum()
