"""Records and feature files to packed batches, read ahead of the step that needs them.

Dimensions: R rows per video, C channels.
"""

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

from fastvid.data.annotations import check_record, read_records, record_videos
from fastvid.data.conversation import encode_sample
from fastvid.data.packing import pack

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
        feature_shape: (R, C) of every video; R is 0 where the set holds none.
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
        self.feature_shape = self._first_feature_shape()

    def _first_feature_shape(self):
        reason = None
        for record in self.records:
            for name in record_videos(record):
                try:
                    return tuple(self.features.load(name)[0].shape)
                except (ValueError, OSError) as error:
                    reason = reason or error
        if reason:
            raise ValueError(f"no feature file can be read; the first one: {reason}")
        return 0, 0

    def fit(self, channels, video_tokens=None):
        """Check the features' shape against the model's (and another set's), before any step is made.

        Raises:
            ValueError: it is another.
        """
        rows, found = self.feature_shape
        expected = video_tokens or self.config.num_video_tokens or rows
        if rows and (rows, found) != (expected, channels):
            raise ValueError(
                f"{self.features.folder}: features are [{rows}, {found}] per video, the model and --num_video_tokens "
                f"want [{expected}, {channels}]; extract them with this model's vision tower")
        self.feature_shape = expected, channels

    def survey(self, limit=64):
        """Tokens and supervised tokens of some samples spread over the set: [(length, supervised)].

        Raises:
            ValueError: none of them can be trained on.
        """
        spread = range(0, len(self), max(1, len(self) // limit))
        samples = [self.encode(index) for index in spread]
        usable = [s for s in samples if not s.refused]
        if not usable:
            raise ValueError(f"none of {len(samples)} samples looked at can be trained on; the first, {samples[0].id}: "
                             f"{samples[0].refused}")
        return [(len(s.token_ids), sum(end - start for start, end in s.supervised)) for s in usable]

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
            self.records[index], self.tokenizer, video_tokens=self.feature_shape[0], version=config.version,
            use_start_end=config.mm_use_vid_start_end, max_length=config.model_max_length, policy=config.policy)

    def read(self, index):
        """Tokens and features of one sample.

        Returns:
            (EncodedSample, list of [R, C] tensors)

        Raises:
            SampleSkipped: it cannot be trained on.
        """
        sample = self.encode(index)
        if sample.refused:
            raise SampleSkipped(f"{sample.id}: {sample.refused}")
        videos = []
        for name in sample.videos:
            try:
                features, _ = self.features.load(name)
            except (ValueError, OSError) as error:
                raise SampleSkipped(f"{sample.id}: {error}") from error
            if tuple(features.shape) != self.feature_shape:
                raise SampleSkipped(f"{sample.id}: {name} has shape {tuple(features.shape)}, expected "
                                    f"{self.feature_shape}; extract it again with this run's tower")
            videos.append(features)
        return sample, videos


class Loader:
    """Packed batches by step, read ahead on threads.

    Args:
        samples: `SampleSet`.
        order: which samples each step takes (`fastvid.data.order`).
        threads: steps read ahead, each on a thread of its own; 0 reads in line.
        pin: put batches into page-locked memory.

    Attributes:
        skipped: samples skipped so far.
    """

    MESSAGES = 10  # skipped samples and warnings shown one by one; the rest are only counted

    def __init__(self, samples, order, *, threads=2, pin=False):
        self.samples, self.order, self.threads, self.pin = samples, order, threads, pin
        self.skipped = 0
        self.warnings = set()

    def read(self, step):
        """This rank's packed micro-batches of one step, and (sample id, warning, why it was skipped) of odd samples."""
        samples, batches, odd = self.samples, [], []
        for indices in self.order.micro_batches(step):
            usable = []
            for index in indices:
                try:
                    usable.append(samples.read(index))
                except SampleSkipped as error:
                    odd.append(("", None, str(error)))
                else:
                    sample = usable[-1][0]
                    if sample.warning:
                        odd.append((sample.id, sample.warning, None))
            batch = pack(usable, samples.tokenizer.tokens, samples.feature_shape)
            batches.append(batch.pin_memory() if self.pin else batch)
        return batches, odd

    def iterate(self, first_step=0):
        """Yield (step, micro-batches) up to the order's end; say what was skipped, and each kind of warning once."""
        steps = range(first_step, self.order.total_steps)
        for step, (batches, odd) in zip(steps, self._read_ahead(steps)):
            for sample_id, warning, skipped in odd:
                self._report(sample_id, warning, skipped)
            yield step, batches

    def _report(self, sample_id, warning, skipped):
        if skipped:
            self.skipped += 1
            if self.skipped <= self.MESSAGES:
                last = " (further ones are counted, not shown)" if self.skipped == self.MESSAGES else ""
                log.warning("skipped sample %s%s", skipped, last)
        elif warning not in self.warnings and len(self.warnings) < self.MESSAGES:
            self.warnings.add(warning)
            log.warning("sample %s: %s (said once per kind)", sample_id, warning)

    def _read_ahead(self, steps):
        if not self.threads:
            yield from map(self.read, steps)
            return
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="loader")
        try:
            pending, ahead = deque(), iter(steps)
            while True:
                pending.extend(pool.submit(self.read, step) for step in islice(ahead, self.threads - len(pending)))
                if not pending:
                    return
                yield pending.popleft().result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
