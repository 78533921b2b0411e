"""The stream of samples: each epoch's in a fresh order, a pure function of the seed and the epoch."""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def epoch_indices(counts, weights, seed, epoch):
    """Shuffled sample indices of one epoch of the stream.

    Args:
        counts: tuple, samples of each data file; indices run through the files in order.
        weights: tuple, passes over each file per epoch; a fraction takes a fresh random part. Empty: one pass each.
        seed, epoch: decide the shuffle.

    Returns:
        int64 array of `epoch_length(counts, weights)` indices.
    """
    rng = np.random.default_rng([seed, epoch])
    parts, first = [], 0
    for count, weight in zip(counts, weights or [1.0] * len(counts)):
        whole, rest = divmod(round(weight * count), count) if count else (0, 0)
        parts += [np.arange(first, first + count)] * whole + [first + rng.permutation(count)[:rest]]
        first += count
    indices = np.concatenate(parts)
    rng.shuffle(indices)
    return indices


def epoch_length(counts, weights):
    """Samples per epoch."""
    return sum(round(weight * count) for count, weight in zip(counts, weights or [1.0] * len(counts)))
