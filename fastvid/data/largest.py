"""Which steps of a run have the largest micro-batches: from the samples' rows, or else from the lengths of their
texts."""

import heapq

import numpy as np

from fastvid.data.annotations import record_videos
from fastvid.data.row_order import RowOrder, SampleRows

# Beyond these, a run's steps are of the same kind; looking at them takes a second or two.
_MOST_STEPS = 20_000


def largest_steps(loader, count: int, most: int = _MOST_STEPS) -> tuple[list[int], int | None]:
    """The steps whose largest micro-batch of this rank has most rows.

    Args:
        loader: `fastvid.data.batching.Loader`.
        count: steps wanted, at most.
        most: only the first so many steps are looked at.

    Returns:
        (steps, most rows of a micro-batch, those that need no gradient included). The rows are None where the samples'
        are not known: then the steps were chosen by the bytes of their texts.
    """
    order = loader.order
    known = isinstance(order, RowOrder)
    table = order.rows if known else rows_by_text(loader.samples, getattr(order, "groups", None))
    steps = range(min(order.total_steps, most))
    rows = (max((_rows(table, batch) for batch in order.micro_batches(step)), default=0) for step in steps)
    largest = heapq.nlargest(count, zip(rows, steps))
    return [step for _, step in largest], largest[0][0] + table.base if known else None


def rows_by_text(samples, groups=None) -> SampleRows:
    """About how many rows each sample of a `fastvid.data.batching.SampleSet` takes, and every video of it as many as
    the longest of some: not all files are opened.

    Args:
        groups: `fastvid.data.sharing.Groups` of samples that compute their videos once; None where none do.
    """
    some = range(0, len(samples), max(1, len(samples) // 64))
    rows = max((_rows_of(samples, name) for index in some for name in record_videos(samples.records[index])), default=0)
    videos = rows * np.array([len(record_videos(record)) for record in samples.records])
    text = np.array([sum(len(turn["value"].encode()) for turn in record["conversations"])
                     for record in samples.records])
    some = [(index, len(samples.encode(index).token_ids)) for index in some]
    usable = [(tokens - videos[index], text[index]) for index, tokens in some if tokens]
    per_byte = max(1, sum(tokens for tokens, _ in usable)) / max(1, sum(length for _, length in usable))
    own, limit = text * per_byte, samples.config.model_max_length
    if groups is None:
        return SampleRows(np.minimum(own + videos, limit), np.zeros_like(own))
    return SampleRows(np.minimum(own, limit), videos, groups)


def _rows_of(samples, name):
    try:
        return samples.rows_of(name)
    except (ValueError, OSError):  # told where the sample is read
        return 0


def _rows(table, indices):
    """Rows of a micro-batch."""
    own = table.own[indices].sum()
    if table.groups is None:
        return own + table.shared[indices].sum()
    _, first = np.unique(table.groups.of[indices], return_index=True)
    return own + table.shared[indices][first].sum()
