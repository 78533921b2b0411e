"""Which samples each step trains on: a pure function of seed, epoch and step, so that resuming needs only the step.

fastvid's own is one stream of samples, epoch after epoch, cut into global batches: the same for any number of ranks.
With a budget of rows it is `fastvid.data.row_order`'s. The reference's (``--parity reference``) is what Hugging Face's
Trainer 4.28
does: per-rank sampling, a short last batch in every epoch, steps that go on from one epoch into the next.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from fastvid.data.epochs import epoch_indices, epoch_length
from fastvid.data.row_order import RowOrder
from fastvid.data.sharing import Groups

# 1: each epoch is cut into steps by itself, and what is left over is put before the next one's first step.
# 2: steps go on from one epoch into the next.
REFERENCE_ORDER_VERSION = 2


def training_order(config, counts, rank, size, *, groups=None, measure=None, name=None):
    """The order of a training run.

    Args:
        config: `TrainConfig`.
        counts: samples of each data file.
        rank, size: this process among all.
        groups: `fastvid.data.sharing.Groups` of samples that stay together; None where none do.
        measure: finds the samples' rows (`fastvid.data.row_order.SampleRows`); called for --rows_per_batch alone.
        name: of a sample, by its index, for messages.

    Raises:
        ValueError: --data_weights that do not go with the files, a sample longer than --rows_per_batch, or what the
            reference does not do with --parity reference.
    """
    weights = tuple(config.data_weights)
    if weights and len(weights) != len(counts):
        raise ValueError(f"--data_weights has {len(weights)} numbers for {len(counts)} --data_path files; give one "
                         "each")
    if config.policy.reference_order:
        _check_reference(config)
    if any(weight < 0 for weight in weights) or (weights and not epoch_length(counts, weights)):
        raise ValueError(f"--data_weights {' '.join(map(str, weights))} leave no sample; give a larger one")
    run = dict(epochs=config.num_train_epochs, max_steps=config.max_steps, rank=rank, size=size, seed=config.seed,
               accumulation=config.gradient_accumulation_steps)
    if config.policy.reference_order:
        return ReferenceOrder(num_samples=sum(counts), batch_size=config.per_device_train_batch_size, **run)
    run |= dict(counts=tuple(counts), weights=weights)
    if config.rows_per_batch:
        return RowOrder(rows=measure(), budget=config.rows_per_batch, name=name, **run)
    return StreamOrder(batch_size=config.per_device_train_batch_size, groups=groups, **run)


def _check_reference(config):
    for flag, given in (("data_weights", config.data_weights), ("rows_per_batch", config.rows_per_batch),
                        ("share_video", config.share_video), ("question_order", config.question_order != "reference")):
        if given:
            raise ValueError(f"--{flag}: the reference has none; leave it out with --parity reference")


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
    def samples_per_epoch(self):
        return epoch_length(self.counts, self.weights)

    @property
    def samples_per_step(self):
        return self.batch_size * self.accumulation * self.size

    @property
    def total_steps(self):
        if self.max_steps > 0:
            return self.max_steps
        return max(1, math.ceil(self.epochs * self.samples_per_epoch / self.samples_per_step))

    def epoch_after(self, step):
        """Epochs seen once `step` steps are done."""
        return min(step * self.samples_per_step, self._total_samples()) / self.samples_per_epoch

    def micro_batches(self, step):
        """This rank's samples in `step` (from 0): one list of indices per micro-batch, the same number on every
        rank."""
        first = step * self.samples_per_step
        samples = self._stream(first, min(first + self.samples_per_step, self._total_samples()))
        width = self.batch_size * self.size
        rounds = [samples[i:i + width] for i in range(0, len(samples), width)]
        if self.groups is None:
            return [ranks[self.rank::self.size].tolist() for ranks in rounds]
        sizes = [len(ranks[rank::self.size]) for ranks in rounds for rank in range(self.size)]
        return self.groups.spread(samples, sizes)[self.rank::self.size]

    def _total_samples(self):
        if self.max_steps > 0:
            return self.max_steps * self.samples_per_step
        return math.ceil(self.epochs * self.samples_per_epoch)

    def _stream(self, first, last):
        n = self.samples_per_epoch
        return np.concatenate([self._epoch(epoch)[max(0, first - epoch * n):last - epoch * n]
                               for epoch in range(first // n, (last - 1) // n + 1)])

    def _epoch(self, epoch):
        run = self.counts, self.weights, self.seed, epoch
        return epoch_indices(*run) if self.groups is None else _grouped(*run, self.groups)


@dataclass(frozen=True)
class ReferenceOrder:
    """The order of Hugging Face's Trainer 4.28, as the reference runs it. Attributes as in `StreamOrder`."""

    num_samples: int
    epochs: float
    max_steps: int
    batch_size: int
    accumulation: int
    rank: int
    size: int
    seed: int

    @property
    def batches_per_epoch(self):
        return math.ceil(math.ceil(self.num_samples / self.size) / self.batch_size)

    @property
    def samples_per_step(self):
        return self.batch_size * self.accumulation * self.size

    @property
    def total_steps(self):
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.epochs * max(1, self.batches_per_epoch // self.accumulation))

    def epoch_after(self, step):
        """Epochs seen once `step` steps are done."""
        return self._micro_batches_before(step) / self.batches_per_epoch

    def micro_batches(self, step):
        """This rank's samples in `step` (from 0): the next of the micro-batches of all epochs, laid end to end."""
        return [self._micro_batch(i) for i in range(*map(self._micro_batches_before, (step, step + 1)))]

    def goes_on_from(self, version, step):
        """Whether `step` steps of that version of the order took the samples that this one's take."""
        if version == REFERENCE_ORDER_VERSION:
            return True
        steps_per_epoch = max(1, self.batches_per_epoch // self.accumulation)
        epoch, at = divmod(step, steps_per_epoch)
        taken = epoch * self.batches_per_epoch + at * self.accumulation
        if epoch and not at and self.batches_per_epoch > self.accumulation:
            taken -= self.batches_per_epoch % self.accumulation  # the next step's
        return taken == self._micro_batches_before(step)

    def _micro_batches_before(self, step):
        ends = _step_ends(self.batches_per_epoch, self.accumulation)
        rounds, at = divmod(step, len(ends))
        return rounds * ends[-1] + (ends[at - 1] if at else 0)

    def _micro_batch(self, number):
        epoch, at = divmod(number, self.batches_per_epoch)
        indices = reference_indices(self.num_samples, self.rank, self.size, self.seed, epoch)
        return indices[at * self.batch_size:(at + 1) * self.batch_size]


@lru_cache(maxsize=4)
def _step_ends(batches_per_epoch, accumulation):
    """How many micro-batches are done at the end of each step, up to where this repeats itself.

    The Trainer counts micro-batches over all epochs and steps at every multiple of `accumulation`; an epoch of no more
    than that also ends with a step.
    """
    if batches_per_epoch > accumulation:
        return (accumulation,)
    end = math.lcm(batches_per_epoch, accumulation)
    return tuple(sorted({*range(accumulation, end + 1, accumulation),
                         *range(batches_per_epoch, end + 1, batches_per_epoch)}))


@lru_cache(maxsize=4)
def reference_indices(num_samples, rank, size, seed, epoch):
    """One rank's sample indices in one epoch: RandomSampler on one rank, DistributedSampler on several."""
    if size == 1:
        drawn = torch.empty((), dtype=torch.int64).random_(generator=torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(int(drawn))
        for _ in range(epoch):  # the sampler draws a second permutation per epoch and throws it away
            torch.randperm(num_samples, generator=generator)
            torch.randperm(num_samples, generator=generator)
        return torch.randperm(num_samples, generator=generator).tolist()
    generator = torch.Generator().manual_seed(seed + epoch)
    indices = torch.randperm(num_samples, generator=generator).tolist()
    total = math.ceil(num_samples / size) * size
    return (indices * math.ceil(total / num_samples))[:total][rank::size]


@dataclass(frozen=True)
class EvaluationOrder:
    """Every sample once, in file order; the same number of batches on every rank (a last one may be empty)."""

    num_samples: int
    batch_size: int
    rank: int
    size: int

    @property
    def total_steps(self):
        return math.ceil(self.num_samples / (self.batch_size * self.size))

    def micro_batches(self, step):
        """This rank's samples of validation batch `step`: one list of indices."""
        width = self.batch_size * self.size
        batch = range(step * width, min((step + 1) * width, self.num_samples))
        return [list(batch[self.rank::self.size])]
