"""Which samples each step trains on: a pure function of seed, epoch and step, so that resuming needs only the step.

fastvid's own is one stream of samples, epoch after epoch, cut into global batches: the same for any number of ranks.
With a budget of rows it is `fastvid.data.order.tokens`'s; with ``--parity reference``, `fastvid.data.order.upstream`'s.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fastvid.data.sharing import Groups


@lru_cache(maxsize=4)
def _grouped(counts, weights, seed, epoch, groups):
    """Sample indices of one epoch of the stream, those of a group next to each other."""
    return groups.together(epoch_indices(counts, weights, seed, epoch))


@dataclass(frozen=True)
class StreamOrder:
    """One stream of samples in global batches; each rank takes every size-th sample of a micro-batch.

    Attributes:
        counts, weights: as `epoch_indices` takes them.
        epochs: passes over the stream; `max_steps` overrides it when positive.
        batch_size: samples per rank and micro-batch.
        accumulation: micro-batches per step.
        groups: samples that come one after the other, and share a micro-batch where they fit.
    """

    counts: tuple[int, ...]
    weights: tuple[float, ...]
    epochs: float
    max_steps: int
    batch_size: int
    accumulation: int
    rank: int
    size: int
    seed: int
    groups: Groups | None = None

    @property
    def samples_per_epoch(self) -> int:
        return epoch_length(self.counts, self.weights)

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.size

    @property
    def total_steps(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.epochs * self.samples_per_epoch / self.samples_per_step))

    def epoch_after(self, step: int) -> float:
        """Epochs seen once `step` steps are done."""
        return min(step * self.samples_per_step, self._total_samples()) / self.samples_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's samples in `step` (from 0): one list of indices per micro-batch, the same number on every
        rank."""
        first = step * self.samples_per_step
        samples = self._stream(first, min(first + self.samples_per_step, self._total_samples()))
        width = self.batch_size * self.size
        rounds = [samples[i : i + width] for i in range(0, len(samples), width)]
        if self.groups is None:
            return [ranks[self.rank :: self.size].tolist() for ranks in rounds]
        sizes = [len(ranks[rank :: self.size]) for ranks in rounds for rank in range(self.size)]
        return self.groups.spread(samples, sizes)[self.rank :: self.size]

    def _total_samples(self):
        if self.max_steps > 0:
            return self.max_steps * self.samples_per_step
        return math.ceil(self.epochs * self.samples_per_epoch)

    def _stream(self, first, last):
        n = self.samples_per_epoch
        return np.concatenate(
            [
                self._epoch(epoch)[max(0, first - epoch * n) : last - epoch * n]
                for epoch in range(first // n, (last - 1) // n + 1)
            ]
        )

    def _epoch(self, epoch):
        run = self.counts, self.weights, self.seed, epoch
        return epoch_indices(*run) if self.groups is None else _grouped(*run, self.groups)


@dataclass(frozen=True)
class EvaluationOrder:
    """Every sample once, in file order; the same number of batches on every rank (a last one may be empty)."""

    num_samples: int
    batch_size: int
    rank: int
    size: int

    @property
    def total_steps(self) -> int:
        return math.ceil(self.num_samples / (self.batch_size * self.size))

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's samples of validation batch `step`: one list of indices."""
        width = self.batch_size * self.size
        batch = range(step * width, min((step + 1) * width, self.num_samples))
        return [list(batch[self.rank :: self.size])]


@lru_cache(maxsize=4)
def epoch_indices(counts: tuple[int, ...], weights: tuple[float, ...], seed: int, epoch: int) -> np.ndarray:
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


def epoch_length(counts: Sequence[int], weights: Sequence[float]) -> int:
    """Samples per epoch."""
    return sum(round(weight * count) for count, weight in zip(counts, weights or [1.0] * len(counts)))
