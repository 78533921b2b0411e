"""Records and feature files to packed batches, read ahead of the step that needs them.

Dimensions: R rows of one video, C channels of the vision tower.
"""

import logging
from functools import partial

from fastvid.data.annotations import check_record, read_records, record_videos
from fastvid.data.conversation import encode_sample, system_prefix
from fastvid.data.lengths import measure
from fastvid.data.order import EvaluationOrder, training_order
from fastvid.data.packing import pack
from fastvid.data.sharing import Groups
from fastvid.data.video_tokens import VideoRows
from fastvid.data.workers import Ahead

log = logging.getLogger("fastvid")


class SampleSkipped(ValueError):
    """Why one sample cannot be trained on: the sample's id, then the reason."""


class SampleSet:
    """The records of one or more data files, as tokens and features.

    Args:
        paths: JSON or JSONL files.
        tokenizer: `fastvid.data.conversation.VideoTokenizer`.
        features: `fastvid.data.features.FeatureFolder`, or None for text only.
        config: `TrainConfig`.

    Attributes:
        counts: samples of each file.
        rows_of: `VideoRows`: from a video's name to its rows.
    """

    def __init__(self, paths, tokenizer, features, config):
        self.tokenizer, self.features, self.config = tokenizer, features, config
        self.records, self.counts, bad = [], [], []
        for path in paths:
            kept = []
            for index, record in enumerate(read_records(path)):
                reason = check_record(record, index, path) or self._missing_feature(record, index, path)
                (bad if reason else kept).append(reason or record)
            self.records += kept
            self.counts.append(len(kept))
        if bad:
            self._report_bad(bad)
        if not self.records:
            raise ValueError(f"{', '.join(map(str, paths))}: no usable record")
        self.rows_of = VideoRows(features, self.records, required=config.num_video_tokens,
                                 same=config.policy.one_video_length)
        if self.rows_of.fault:
            raise ValueError(f"no feature file can be read; the first one: {self.rows_of.fault}")

    @property
    def channels(self):
        """C of all features: those of the first, or the model's since `fit`; 0 where neither is known."""
        return self.rows_of.channels

    def fit(self, channels, required=None):
        """Take features of the model's `channels` only, and check the first video's, before any step is made.

        Args:
            required: rows that the training set requires of every video, which then hold for this set; None: as it is.

        Raises:
            ValueError: that video has another shape.
        """
        self.rows_of.channels, self.rows_of.required = channels, required or self.rows_of.required
        if self.rows_of.first is not None:
            self.rows_of(self.rows_of.first[0])

    def check_some(self, limit=64):
        """Look at some samples spread over the set.

        Raises:
            ValueError: none of them can be trained on.
        """
        samples = [self.encode(index) for index in range(0, len(self), max(1, len(self) // limit))]
        if all(sample.refused for sample in samples):
            raise ValueError(f"none of {len(samples)} samples looked at can be trained on; the first, {samples[0].id}: "
                             f"{samples[0].refused}")

    def _missing_feature(self, record, index, path):
        try:
            for name in record_videos(record):
                if self.features is None:
                    return f"{path}: record {index} names a video ({name}); give its folder with --video_folder"
                self.features.resolve(name)
        except (ValueError, OSError) as error:
            return f"{path}: record {index}: {error}"

    def _report_bad(self, bad):
        shown = "\n  ".join(bad[:5]) + (f"\n  … and {len(bad) - 5} more" if len(bad) > 5 else "")
        if self.config.on_bad_sample == "error":
            raise ValueError(f"{len(bad)} records cannot be used; --on_bad_sample skip trains without them:\n  {shown}")
        log.warning("%d records left out:\n  %s", len(bad), shown)

    def __len__(self):
        return len(self.records)

    def encode(self, index):
        """Tokens of one sample; `fastvid.data.conversation.EncodedSample`."""
        config = self.config
        return encode_sample(
            self.records[index], self.tokenizer, rows_of=self.rows_of, version=config.version,
            use_start_end=config.mm_use_vid_start_end, max_length=config.model_max_length, policy=config.policy,
            question_order=config.question_order)

    def read(self, index, loaded=None):
        """Tokens and features of one sample.

        Args:
            loaded: features that were read before, by the name of their video; what is read is added to them.

        Returns:
            (EncodedSample, list of [R, C] tensors)

        Raises:
            SampleSkipped: it cannot be trained on.
        """
        sample = self.encode(index)
        if sample.refused:
            raise SampleSkipped(f"{sample.id}: {sample.refused}")
        loaded = {} if loaded is None else loaded
        for name in sample.videos:
            if name in loaded:
                continue
            try:
                features, _ = self.features.load(name)
            except (ValueError, OSError) as error:
                raise SampleSkipped(f"{sample.id}: {error}") from error
            if tuple(features.shape) != self.features.shape(name):
                raise SampleSkipped(f"{sample.id}: {self.features.resolve(name)} was {list(self.features.shape(name))} "
                                    f"when this run first looked, is {list(features.shape)} now; start the run again")
            loaded[name] = features
        return sample, [loaded[name] for name in sample.videos]


class Loader:
    """Packed batches by step, read ahead in processes.

    Args:
        samples: `SampleSet`.
        order: which samples each step takes (`fastvid.data.order`).
        workers: processes that read ahead; 0 reads in line. The batches are the same for any number.
        pin: put batches into page-locked memory.
        packing: keyword arguments of `fastvid.data.packing.pack`.

    Attributes:
        prefix: ids of the system prompt, which the batches leave out and whose keys and values the model must keep.
        skipped: samples skipped so far.
    """

    MESSAGES = 10  # skipped samples and warnings shown one by one; the rest are only counted

    def __init__(self, samples, order, *, workers=2, pin=False, packing=None):
        self.samples, self.order, self.pin, self.packing = samples, order, pin, packing or {}
        self.prefix = self.packing.get("prefix", ()) if self.packing.get("frozen") else ()
        self.skipped = 0
        self.warnings = set()
        self._ahead = Ahead(self.read, workers, pin=pin)

    def read(self, step):
        """This rank's packed micro-batches of one step, and (sample id, warning, why it was skipped) of odd samples."""
        samples, batches, odd = self.samples, [], []
        for indices in self.order.micro_batches(step):
            usable, loaded = [], {}
            for index in indices:
                try:
                    usable.append(samples.read(index, loaded))
                except SampleSkipped as error:
                    odd.append(("", None, str(error)))
                else:
                    sample = usable[-1][0]
                    if sample.warning:
                        odd.append((sample.id, sample.warning, None))
            batches.append(pack(usable, samples.tokenizer.tokens, samples.channels, **self.packing))
        return batches, odd

    def iterate(self, first_step=0, stopped=lambda: False):
        """Yield (step, micro-batches) up to the order's end; say what was skipped, and each kind of warning once.

        Args:
            stopped: ends a long wait, see `Ahead.map`.
        """
        steps = range(first_step, self.order.total_steps)
        for step, (batches, odd) in zip(steps, self._ahead.map(steps, stopped)):
            for sample_id, warning, skipped in odd:
                self._report(sample_id, warning, skipped)
            yield step, [batch.pin_memory() for batch in batches] if self.pin else batches

    def _report(self, sample_id, warning, skipped):
        if skipped:
            self.skipped += 1
            if self.skipped <= self.MESSAGES:
                last = " (further ones are counted, not shown)" if self.skipped == self.MESSAGES else ""
                log.warning("skipped sample %s%s", skipped, last)
        elif warning not in self.warnings and len(self.warnings) < self.MESSAGES:
            self.warnings.add(warning)
            log.warning("sample %s: %s (said once per kind)", sample_id, warning)


def training_loader(config, samples, world):
    """The batches of a training run.

    Args:
        config: `TrainConfig`.
        samples: `SampleSet` that fits the model (`SampleSet.fit`).
        world: `fastvid.parallel.World`; all ranks call this.

    Raises:
        ValueError: flags that contradict each other, or a sample longer than --rows_per_batch.
    """
    packing = dict(prefix=system_prefix(samples.tokenizer, config.version), share=config.share_video,
                   frozen=config.trainable <= {"projector", "boundary"})
    groups = Groups.of_records(samples.records, config.question_order) if config.share_video else None
    order = training_order(
        config, samples.counts, world.rank, world.size, groups=groups,
        measure=partial(measure, samples, world, packing=packing, groups=groups,
                        processes=config.dataloader_num_workers, progress=not config.disable_tqdm))
    return Loader(samples, order, workers=config.dataloader_num_workers, pin=world.device.type == "cuda",
                  packing=packing)


def evaluation_loader(config, training, world):
    """The batches of the validation set, packed as those of `training`, the training run's `Loader`.

    Raises:
        ValueError: records or features that cannot be used.
    """
    trained = training.samples
    samples = SampleSet(config.eval_data_path, trained.tokenizer, trained.features, config)
    samples.fit(trained.channels, trained.rows_of.required)
    order = EvaluationOrder(len(samples), config.per_device_eval_batch_size, world.rank, world.size)
    return Loader(samples, order, workers=config.dataloader_num_workers, pin=training.pin, packing=training.packing)
