"""Records and feature files to packed batches, read ahead of the step that needs them.

Dimensions: R rows per video, C channels.
"""

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import torch

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.data.annotations import check_record, read_records, record_videos
from fastvid.data.conversation import encode_sample

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


def pack(samples, tokens, feature_shape):
    """Lay samples end to end.

    Args:
        samples: (EncodedSample, list of [R, C] tensors) pairs. Without any, the batch is one unsupervised row, so that
            a rank with nothing to train on still takes part in every collective.
        tokens: `VideoTokens`.
        feature_shape: (R, C) of a video's features.
    """
    token_ids, positions, lengths, video_rows, boundary_rows, loss_rows, targets, features = ([] for _ in range(8))
    for sample, videos in samples:
        first = len(token_ids)
        ids = torch.as_tensor(sample.token_ids)
        token_ids += sample.token_ids
        positions.append(torch.arange(len(ids), dtype=torch.int32))
        lengths.append(len(ids))
        patches = (ids == tokens.patch).nonzero().flatten() + first
        assert len(patches) == len(videos) * feature_shape[0], f"{sample.id}: placeholders and features differ"
        video_rows.append(patches)
        features += videos
        if tokens.start is not None:
            for block in patches.view(-1, feature_shape[0]) if videos else ():
                boundary_rows += [int(block[0]) - 1, int(block[-1]) + 1]
        for start, end in sample.supervised:
            loss_rows += range(first + start - 1, first + end - 1)  # a row predicts the token after it
            targets += sample.token_ids[start:end]
    if not samples:
        token_ids, positions, lengths = [0], [torch.zeros(1, dtype=torch.int32)], [1]
    return PackedBatch(
        token_ids=torch.tensor(token_ids, dtype=torch.int64),
        positions=torch.cat(positions),
        layout=AttentionLayout.of_lengths(lengths),
        video_rows=torch.cat([torch.empty(0, dtype=torch.int64), *video_rows]),
        features=_stack(features) if features else torch.empty(0, *feature_shape, dtype=torch.float16),
        boundary_rows=torch.tensor(boundary_rows, dtype=torch.int64),
        loss_rows=torch.tensor(loss_rows, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        sample_ids=[sample.id for sample, _ in samples],
    )


def _stack(features):
    """[R, C] tensors to [V, R, C]; mixed precisions (pkl beside safetensors, say) meet in fp32."""
    if len({f.dtype for f in features}) > 1:
        features = [f.float() for f in features]
    return torch.stack(features)


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
