"""Records and feature files to packed batches, read ahead of the step that needs them.

Dimensions: R rows of one video, C channels of the vision tower.
"""

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any, Generic, NamedTuple, TypeVar

from fastvid.batch import Features, PackedBatch
from fastvid.config import TrainConfig
from fastvid.data.conversation import EncodedSample, system_prefix
from fastvid.data.dataset import SampleSet, SampleSkipped
from fastvid.data.lengths import measure
from fastvid.data.order.stream import EvaluationOrder, StreamOrder, epoch_length
from fastvid.data.order.tokens import SampleRows, TokenOrder
from fastvid.data.order.upstream import UpstreamOrder
from fastvid.data.packing import pack
from fastvid.data.prefetch import Prefetcher, Stopped
from fastvid.data.sharing import Groups
from fastvid.dist.parallel import World

log = logging.getLogger("fastvid")

TrainingOrder = UpstreamOrder | TokenOrder | StreamOrder
Order = TypeVar("Order", bound=TrainingOrder | EvaluationOrder)


class Skipped(NamedTuple):
    """A sample, by its index, that could not be used, and why."""

    sample: int
    reason: str


class Remarked(NamedTuple):
    """A sample, by its index, that was used, and what is unusual about it."""

    sample: int
    remarks: list[str]


class Loader(Generic[Order]):
    """Packed batches by step, read ahead in processes.

    Args:
        samples: `SampleSet`.
        order: which samples each step takes (`fastvid.data.order.stream`).
        workers: processes that read ahead; 0 reads in line. The batches are the same for any number.
        pin: put batches into page-locked memory.
        packing: keyword arguments of `fastvid.data.packing.pack`.

    Attributes:
        prefix: ids of the system prompt, which the batches leave out and whose keys and values the model must keep.
        drawn: samples drawn so far; `skipped` of them could not be used.
        unusable: indices of the skipped samples.
        remarks: by kind, the indices of the samples that a remark was made about.
        validation: the `Loader` of the validation set that is read now and then between steps, or None.
    """

    MESSAGES = 10  # skipped samples and remarks told one by one; the rest are only counted

    def __init__(
        self,
        samples: SampleSet,
        order: Order,
        *,
        workers: int = 2,
        pin: bool = False,
        packing: dict[str, Any] | None = None,
    ):
        self.samples, self.order, self.pin, self.packing = samples, order, pin, packing or {}
        self.prefix = self.packing.get("prefix", ()) if self.packing.get("frozen") else ()
        self.drawn = self.skipped = 0
        self.validation: Loader[EvaluationOrder] | None = None
        self.unusable: set[int] = set()
        self.remarks: dict[str, set[int]] = {}
        self._ahead = Prefetcher(self.read, workers, pin=pin)

    def begin(self) -> None:
        """Have features that are not made yet begin to be made, some time before the first step."""
        if self.samples.features is not None:
            self.samples.features.begin(self._videos(0))

    def read(self, step: int, *, values: bool = True) -> tuple[list[PackedBatch], list[Skipped | Remarked]]:
        """This rank's packed micro-batches of one step, and a list of the `Skipped` and `Remarked` samples in them.

        Args:
            values: False where only the batches' sizes matter.
        """
        samples = self.samples
        batches: list[PackedBatch] = []
        odd: list[Skipped | Remarked] = []
        for indices in self.order.micro_batches(step):
            usable: list[tuple[EncodedSample, list[Features]]] = []
            loaded: dict[str, Features] = {}
            for index in indices:
                try:
                    usable.append(samples.read(index, loaded, values=values))
                except SampleSkipped as error:
                    odd.append(Skipped(index, str(error)))
                else:
                    # What the record alone tells was told when it was read.
                    remarks = [each for each in usable[-1][0].remarks if each not in samples.remarks.counts]
                    if remarks:
                        odd.append(Remarked(index, remarks))
            batches.append(pack(usable, samples.tokenizer.tokens, samples.channels, **self.packing))
        return batches, odd

    def iterate(
        self, first_step: int = 0, stopped: Callable[[], object] = lambda: False
    ) -> Generator[tuple[list[PackedBatch] | None, float]]:
        """Yield (micro-batches, seconds waited for them) of each step up to the order's end.

        Each skipped sample and each kind of remark is named once.

        Args:
            stopped: ends a long wait (`Prefetcher.map`); the last micro-batches are None then.
        """
        begin, steps = time.perf_counter(), range(first_step, self.order.total_steps)
        try:
            with contextlib.ExitStack() as stack:
                if self.samples.features is not None:
                    stack.enter_context(self.samples.features.made_ahead(self._videos(first_step), stopped))
                read = stack.enter_context(contextlib.closing(self._ahead.map(steps, stopped)))
                for step, (batches, odd) in zip(steps, read):
                    for each in odd:
                        self._report(each)
                    self.drawn += sum(map(len, self.order.micro_batches(step)))
                    batches = [batch.pin_memory() for batch in batches] if self.pin else batches
                    yield batches, time.perf_counter() - begin
                    begin = time.perf_counter()
        except Stopped:
            yield None, time.perf_counter() - begin

    def _videos(self, first_step):
        """Names of the videos that the next samples of this rank need, as many samples as the set has; then those of
        the validation set."""
        left = len(self.samples)
        for step in range(first_step, self.order.total_steps):
            for index in itertools.chain(*self.order.micro_batches(step)):
                yield from self.samples.records.videos(index)
                left -= 1
            if left <= 0:
                break
        if self.validation is not None:
            yield from self.validation._videos(0)

    def account(self, world: World) -> tuple[list[str], str]:
        """What became of the samples of all ranks since this process began; every rank calls it.

        Returns:
            (one line for each kind of remark, how many samples were skipped)
        """
        unusable: set[int] = set()
        remarks: dict[str, set[int]] = {}
        for theirs, made in world.gather_objects((self.unusable, self.remarks)):
            unusable |= theirs
            for remark, indices in made.items():
                remarks.setdefault(remark, set()).update(indices)
        lines = [f"{len(indices):,} of {len(self.samples):,} samples: {remark}" for remark, indices in remarks.items()]
        return lines, f"{len(unusable):,} of {len(self.samples):,} samples skipped"

    def _report(self, odd):
        index = odd.sample
        if isinstance(odd, Skipped):
            self.skipped += 1
            if index not in self.unusable and len(self.unusable) < self.MESSAGES:
                last = " (further ones are counted, not shown)" * (len(self.unusable) == self.MESSAGES - 1)
                log.warning("skipped sample %s: %s%s", self.samples.name(index), odd.reason, last)
            self.unusable.add(index)
            return
        for remark in odd.remarks:
            if remark not in self.remarks and len(self.remarks) < self.MESSAGES:
                log.warning("sample %s: %s (said once; counted at the end)", self.samples.name(index), remark)
            self.remarks.setdefault(remark, set()).add(index)


def groups_of(config: TrainConfig, samples: SampleSet) -> Groups | None:
    """The samples that stay together, of ``--share_video``; None where none do."""
    if not config.share_video:
        return None
    return Groups.of_records(samples.records, config.question_order, config.dataloader_num_workers)


def training_loader(
    config: TrainConfig, samples: SampleSet, world: World, groups: Groups | None = None
) -> Loader[TrainingOrder]:
    """The batches of a training run.

    Args:
        config: `TrainConfig`.
        samples: `SampleSet` that fits the model (`SampleSet.fit`).
        world: `fastvid.dist.parallel.World`; all ranks call this.
        groups: `groups_of` these, where they are known already.

    Raises:
        ValueError: flags that contradict each other, or a sample longer than --tokens_per_batch.
    """
    packing = {
        "prefix": system_prefix(samples.tokenizer, config.version),
        "share": config.share_video,
        "frozen": config.trainable.adapter_only and config.neftune_noise_alpha is None,
    }
    if groups is None:
        groups = groups_of(config, samples)
    order = training_order(
        config,
        samples.counts,
        world.rank,
        world.size,
        groups=groups,
        name=samples.name,
        measure=partial(
            measure,
            samples,
            world,
            packing=packing,
            groups=groups,
            processes=config.dataloader_num_workers,
            progress=not config.disable_tqdm,
        ),
    )
    return Loader(
        samples, order, workers=config.dataloader_num_workers, pin=world.device.type == "cuda", packing=packing
    )


def evaluation_loader(config: TrainConfig, training: Loader[TrainingOrder], world: World) -> Loader[EvaluationOrder]:
    """The batches of the validation set, packed as those of `training`, the training run's `Loader`.

    Raises:
        ValueError: records or features that cannot be used.
    """
    trained = training.samples
    samples = SampleSet(config.eval_data_path, trained.tokenizer, trained.features, config, world)
    samples.fit(trained.channels, trained.rows_of.required)
    order = EvaluationOrder(len(samples), config.per_device_eval_batch_size, world.rank, world.size)
    loader = Loader(samples, order, workers=config.dataloader_num_workers, pin=training.pin, packing=training.packing)
    training.validation = loader
    return loader


def training_order(
    config: TrainConfig,
    counts: Sequence[int],
    rank: int,
    size: int,
    *,
    groups: Groups | None = None,
    measure: Callable[[], SampleRows] | None = None,
    name: Callable[[int], str] | None = None,
) -> TrainingOrder:
    """The order of a training run.

    Args:
        config: `TrainConfig`.
        counts: samples of each data file.
        rank, size: this process among all.
        groups: `fastvid.data.sharing.Groups` of samples that stay together; None where none do.
        measure: finds the samples' rows (`fastvid.data.order.tokens.SampleRows`); called for --tokens_per_batch alone.
        name: of a sample, by its index, for messages.

    Raises:
        ValueError: --data_weights that do not go with the files, a sample longer than --tokens_per_batch, or what the
            reference does not do with --parity reference.
    """
    weights = tuple(config.data_weights)
    if weights and len(weights) != len(counts):
        raise ValueError(
            f"--data_weights has {len(weights)} numbers for {len(counts)} --data_path files; give one each"
        )
    if config.policy.upstream_order:
        _check_upstream(config)
    if any(weight < 0 for weight in weights) or (weights and not epoch_length(counts, weights)):
        raise ValueError(f"--data_weights {' '.join(map(str, weights))} leave no sample; give a larger one")
    run: dict[str, Any] = {
        "epochs": config.num_train_epochs,
        "max_steps": config.max_steps,
        "rank": rank,
        "size": size,
        "seed": config.seed,
        "accumulation": config.gradient_accumulation_steps,
    }
    if config.policy.upstream_order:
        return UpstreamOrder(num_samples=sum(counts), batch_size=config.batch_size, **run)
    run |= {"counts": tuple(counts), "weights": weights}
    if config.token_budget:
        assert measure is not None, "batches of so many tokens need the samples' rows"
        return TokenOrder(rows=measure(), budget=config.token_budget, name=name, **run)
    return StreamOrder(batch_size=config.batch_size, groups=groups, **run)


def _check_upstream(config):
    for flag, given in (
        ("data_weights", config.data_weights),
        ("tokens_per_batch", config.tokens_per_batch),
        ("share_video", config.share_video),
        ("question_order", config.question_order != "reference"),
    ):
        if given:
            raise ValueError(f"--{flag}: the reference has none; leave it out with --parity reference")
