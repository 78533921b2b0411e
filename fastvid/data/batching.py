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
        config: version, model_max_length, mm_use_vid_start_end, policy, on_bad_sample.
    """

    def __init__(self, paths, tokenizer, features, config):
        self.tokenizer, self.features, self.config = tokenizer, features, config
        self.video_tokens = self.channels = None
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
            self.records[index], self.tokenizer, video_tokens=self.video_tokens, version=config.version,
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
            if features.shape != (self.video_tokens, self.channels):
                raise SampleSkipped(f"{sample.id}: {name} has shape {tuple(features.shape)}, expected "
                                    f"{(self.video_tokens, self.channels)}; extract it again with this run's tower")
            videos.append(features)
        return sample, videos


def pack(samples, tokens, empty_shape):
    """Lay samples end to end.

    Args:
        samples: (EncodedSample, list of [R, C] tensors) pairs. Without any, the batch is one unsupervised row, so that
            a rank with nothing to train on still takes part in every collective.
        tokens: `VideoTokens`.
        empty_shape: (R, C) of the features of a batch without videos.
    """
    token_ids, positions, lengths, video_rows, boundary_rows, loss_rows, targets, features = ([] for _ in range(8))
    for sample, videos in samples:
        first = len(token_ids)
        ids = torch.as_tensor(sample.token_ids)
        token_ids += sample.token_ids
        positions.append(torch.arange(len(ids), dtype=torch.int32))
        lengths.append(len(ids))
        patches = (ids == tokens.patch).nonzero().flatten() + first
        assert patches.numel() == sum(len(video) for video in videos), f"{sample.id}: placeholders and features differ"
        video_rows.append(patches)
        features += videos
        if tokens.start is not None:
            for block in patches.view(len(videos), -1) if videos else ():
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
        features=_stack(features) if features else torch.empty(0, *empty_shape, dtype=torch.float16),
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
        micro_batches: function of the step that gives its lists of sample indices.
        threads: steps read ahead, each on a thread of its own; 0 reads in line.
        pin: put batches into page-locked memory.

    Attributes:
        skipped: samples skipped so far.
    """

    MESSAGES = 10  # skipped samples shown one by one; the rest are only counted

    def __init__(self, samples, micro_batches, *, threads=2, pin=False):
        self.samples, self.micro_batches, self.threads, self.pin = samples, micro_batches, threads, pin
        self.skipped = 0

    def read(self, step):
        """This rank's packed micro-batches of one step, and why samples were skipped."""
        samples, batches, reasons = self.samples, [], []
        for indices in self.micro_batches(step):
            usable = []
            for index in indices:
                try:
                    usable.append(samples.read(index))
                except SampleSkipped as error:
                    reasons.append(str(error))
            batch = pack(usable, samples.tokenizer.tokens, (samples.video_tokens, samples.channels))
            batches.append(batch.pin_memory() if self.pin else batch)
        return batches, reasons

    def iterate(self, steps):
        """Yield (step, micro-batches) for `steps`; report the samples that were skipped."""
        for step, (batches, reasons) in zip(steps, self._read_ahead(steps)):
            for reason in reasons:
                self.skipped += 1
                if self.skipped <= self.MESSAGES:
                    last = " (further ones are counted, not shown)" if self.skipped == self.MESSAGES else ""
                    log.warning("skipped sample %s%s", reason, last)
            yield step, batches

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
