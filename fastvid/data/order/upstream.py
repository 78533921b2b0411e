"""The order of Hugging Face's Trainer 4.28 (``--parity reference``).

Per-rank sampling, a short last batch in every epoch, steps that go on from one epoch into the next.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

# 1: each epoch is cut into steps by itself, and what is left over is put before the next one's first step.
# 2: steps go on from one epoch into the next.
UPSTREAM_ORDER_VERSION = 2


@dataclass(frozen=True)
class UpstreamOrder:
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
    def batches_per_epoch(self) -> int:
        return math.ceil(math.ceil(self.num_samples / self.size) / self.batch_size)

    @property
    def samples_per_step(self) -> int:
        return self.batch_size * self.accumulation * self.size

    @property
    def total_steps(self) -> int:
        if self.max_steps > 0:
            return self.max_steps
        return math.ceil(self.epochs * max(1, self.batches_per_epoch // self.accumulation))

    def epoch_after(self, step: int) -> float:
        """Epochs seen once `step` steps are done."""
        return self._micro_batches_before(step) / self.batches_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's samples in `step` (from 0): the next of the micro-batches of all epochs, laid end to end."""
        return [self._micro_batch(i) for i in range(*map(self._micro_batches_before, (step, step + 1)))]

    def goes_on_from(self, version: int, step: int) -> bool:
        """Whether `step` steps of that version of the order took the samples that this one's take."""
        if version == UPSTREAM_ORDER_VERSION:
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
        return indices[at * self.batch_size : (at + 1) * self.batch_size]


@lru_cache(maxsize=4)
def _step_ends(batches_per_epoch, accumulation):
    """How many micro-batches are done at the end of each step, up to where this repeats itself.

    The Trainer counts micro-batches over all epochs and steps at every multiple of `accumulation`; an epoch of no more
    than that also ends with a step.
    """
    if batches_per_epoch > accumulation:
        return (accumulation,)
    end = math.lcm(batches_per_epoch, accumulation)
    return tuple(
        sorted({*range(accumulation, end + 1, accumulation), *range(batches_per_epoch, end + 1, batches_per_epoch)})
    )


@lru_cache(maxsize=4)
def reference_indices(num_samples: int, rank: int, size: int, seed: int, epoch: int) -> list[int]:
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
