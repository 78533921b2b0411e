"""Batches by a budget of tokens: a pure function of the samples' rows, the seed, the epoch and the step.

Shuffled samples go into the first batch that has room for them, a window of some thousand at a time. The window's
batches, sorted by rows, are cut into steps, so that what the ranks do side by side takes them equally long, and the
steps are shuffled. What fills no whole step opens the next window; an epoch's last step is spread over all ranks.
"""

import heapq
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from fastvid.data.order.stream import epoch_indices, epoch_length
from fastvid.data.sharing import Groups

WINDOW = 4096  # units that are packed together
OPEN = 64  # batches that are looked at for room

Unit = tuple[int, list[int]]  # rows, and the samples that stay together in them


@dataclass(frozen=True, eq=False)
class SampleRows:
    """What each sample adds to a batch.

    Attributes:
        own: [n] int64, rows that no other sample has; 0 for one that cannot be trained on, which a batch leaves out.
        shared: [n] int64, rows that the batch computes once for all samples of the sample's group.
        groups: None where nothing is shared.
        base: rows that a batch computes once for all its samples.
    """

    own: np.ndarray
    shared: np.ndarray
    groups: Groups | None = None
    base: int = 0

    @property
    def digest(self) -> int:
        """A number that differs, almost surely, where any sample's rows do."""
        groups = b"" if self.groups is None else self.groups.of.tobytes()
        return zlib.crc32(self.own.tobytes() + self.shared.tobytes() + groups)

    def units(self, indices: np.ndarray, capacity: int) -> list[Unit]:
        """[(rows, samples)] of what stays together: a group, or a part of one where it has more than `capacity`
        rows."""
        own, shared = self.own[indices].tolist(), self.shared[indices].tolist()
        indices = indices.tolist()
        if self.groups is None:
            return [(rows, [index]) for rows, index in zip(own, indices)]
        units, group, free = [], None, 0
        for index, rows, common, number in zip(indices, own, shared, self.groups.of[indices].tolist()):
            if number != group or rows > free:
                units.append((common + rows, [index]))
                group, free = number, capacity - common - rows
            else:
                units[-1] = units[-1][0] + rows, units[-1][1]
                units[-1][1].append(index)
                free -= rows
        return units


class TokenOrder:
    """Which samples each micro-batch takes. Every sample once per epoch, no batch over the budget.

    Args:
        counts, weights, seed: as `fastvid.data.order.stream.epoch_indices` takes them.
        epochs: passes over the samples; `max_steps` overrides it when positive.
        rows: `SampleRows`.
        budget: rows of a micro-batch, at most.
        accumulation: micro-batches per step and rank.
        rank, size: this process among all. A step's samples depend on `size` × `accumulation` alone.
        name: of a sample, by its index, for messages.

    Attributes:
        total_steps: of the run.

    Raises:
        ValueError: a sample has more rows than `budget`.
    """

    def __init__(
        self,
        *,
        counts: tuple[int, ...],
        weights: tuple[float, ...],
        epochs: float,
        max_steps: int,
        rows: SampleRows,
        budget: int,
        accumulation: int,
        rank: int,
        size: int,
        seed: int,
        name: Callable[[int], str] | None = None,
    ):
        longest = int((rows.own + rows.shared).argmax())
        needed = int(rows.own[longest] + rows.shared[longest]) + rows.base
        if needed > budget:
            raise ValueError(
                f"--tokens_per_batch {budget}: the longest sample, "
                f"{name(longest) if name else f'number {longest} from 0'}, takes {needed} tokens; give at "
                "least as many"
            )
        self.counts, self.weights, self.seed, self.rows = counts, weights, seed, rows
        self.budget, self.accumulation, self.rank, self.size = budget, accumulation, rank, size
        self.samples_per_epoch = epoch_length(counts, weights)
        self._samples = math.ceil(epochs * self.samples_per_epoch) if max_steps <= 0 else math.inf
        self._epochs, self._done, self._first_steps = [], [], [0]
        while max_steps <= 0 and len(self._epochs) * self.samples_per_epoch < self._samples:
            self._plan_next()
        self.total_steps = max_steps if max_steps > 0 else self._first_steps[-1]

    @property
    def samples_per_step(self) -> str:
        """What decides a step's samples, in words: their number varies."""
        return f"{self.size * self.accumulation} × {self.budget} tokens (samples {self.rows.digest:08x})"

    def epoch_after(self, step: int) -> float:
        """Epochs seen once `step` steps are done."""
        if step == 0:
            return 0.0
        epoch, at = self._locate(step - 1)
        return (epoch * self.samples_per_epoch + int(self._done[epoch][at])) / self.samples_per_epoch

    def micro_batches(self, step: int) -> list[list[int]]:
        """This rank's samples in `step` (from 0): one list of indices per micro-batch, the same number on every
        rank."""
        epoch, at = self._locate(step)
        batches = self._epochs[epoch][at]
        rounds = [batches[i : i + self.size] for i in range(0, len(batches), self.size)]
        # From most rows to least: every other round backwards, so that no rank always gets the most.
        return [ranks[self.rank if i % 2 == 0 else -1 - self.rank].tolist() for i, ranks in enumerate(rounds)]

    def _locate(self, step):
        """(epoch, step of it) of a step."""
        while step >= self._first_steps[-1]:
            self._plan_next()
        epoch = int(np.searchsorted(self._first_steps, step, side="right")) - 1
        return epoch, step - self._first_steps[epoch]

    def _plan_next(self):
        epoch = len(self._epochs)
        indices = epoch_indices(self.counts, self.weights, self.seed, epoch)
        if self.rows.groups is not None:
            indices = self.rows.groups.together(indices)
        indices = indices[: min(len(indices), self._samples - epoch * self.samples_per_epoch)]
        capacity = self.budget - self.rows.base
        units = self.rows.units(indices, capacity)
        rng = np.random.default_rng([self.seed, epoch, WINDOW])
        steps = plan_steps(units, capacity, self.size, self.accumulation, rng)
        self._epochs.append(steps)
        self._done.append(np.cumsum([sum(map(len, batches)) for batches in steps]))
        self._first_steps.append(self._first_steps[-1] + len(steps))


def plan_steps(
    units: list[Unit], capacity: int, size: int, accumulation: int, rng: np.random.Generator
) -> list[list[np.ndarray]]:
    """The steps of an epoch.

    Args:
        units: [(rows, samples)], shuffled.
        capacity: rows of a batch.
        size, accumulation: ranks, and batches per rank and step.
        rng: shuffles the steps of a window.

    Returns:
        For each step its batches (arrays of samples), from most rows to least, a multiple of `size`.
    """
    per_step = size * accumulation
    mean = max(1.0, sum(rows for rows, _ in units) / len(units))
    window = max(WINDOW, math.ceil(8 * per_step * capacity / mean))
    smallest = min((rows for rows, _ in units if rows), default=0)
    steps, left = [], []
    for first in range(0, len(units), window):
        batches = _first_fit(left + units[first : first + window], capacity, smallest)
        batches.sort(key=lambda batch: -batch[0])
        whole = len(batches) // per_step
        for i in rng.permutation(whole):
            steps.append([_samples(units) for _, units in batches[i * per_step : (i + 1) * per_step]])
        left = [unit for _, part in batches[whole * per_step :] for unit in part]
        rest = batches[whole * per_step :]
    if rest:
        steps.append([_samples(part) for part in _spread(rest, capacity, size)])
    return steps


def _first_fit(units, capacity, smallest):
    """Batches [rows, units], each unit in the first of the `OPEN` newest that have room for it."""
    batches, unfilled = [], []
    for unit in units:
        rows = unit[0]
        for batch in unfilled:
            if batch[0] + rows <= capacity:
                break
        else:
            batch = [0, []]
            batches.append(batch)
            unfilled.append(batch)
            if len(unfilled) > OPEN:
                unfilled.pop(0)
        batch[0] += rows
        batch[1].append(unit)
        if capacity - batch[0] < smallest:
            unfilled.remove(batch)
    return batches


def _spread(batches, capacity, size):
    """The units of `batches` in the next multiple of `size` batches, as even as longest-first makes them."""
    count = math.ceil(len(batches) / size) * size
    loads = [(0, i) for i in range(count)]
    even = [[] for _ in loads]
    for unit in sorted((unit for _, part in batches for unit in part), key=lambda unit: -unit[0]):
        rows, i = heapq.heappop(loads)
        even[i].append(unit)
        heapq.heappush(loads, (rows + unit[0], i))
    if max(loads)[0] > capacity:
        even = [part for _, part in batches] + [[]] * (count - len(batches))
    return sorted(even, key=lambda part: -sum(rows for rows, _ in part))


def _samples(units):
    return np.array([index for _, samples in units for index in samples], dtype=np.int32)
