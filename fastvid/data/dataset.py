"""Records and feature files as samples: tokens, labels and features.

Dimensions: R rows of one video, C channels of the vision tower.
"""

import logging
from collections.abc import Iterable
from dataclasses import replace

import torch

from fastvid import provenance
from fastvid.batch import Channels, FeaturePair, Features
from fastvid.config import TrainConfig
from fastvid.config.pooling import OF_AN_IMAGE, RECIPE
from fastvid.data.annotations import examine
from fastvid.data.conversation import TRAINING_TEMPLATES, EncodedSample, encode_sample, settled_version
from fastvid.data.table import RecordTable
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.data.video_tokens import VideoRows
from fastvid.dist.parallel import World
from fastvid.features.folder import FeatureFolder
from fastvid.files import StrPath, shown

log = logging.getLogger("fastvid")


class SampleSkipped(ValueError):
    """Why one sample cannot be trained on."""


class SampleSet:
    """The records of one or more data files, as tokens and features.

    Args:
        paths: JSON, JSONL or Parquet files.
        tokenizer: as `load_tokenizer` gives it.
        features: `fastvid.features.folder.FeatureFolder`, or None for text only.
        config: `TrainConfig`.
        world: ranks that all make this set; None: this process is alone.

    Attributes:
        records: `RecordTable`.
        counts: samples of each file.
        remarks: `Remarks` about the records, told by the first process that reads them.
        rows_of: `VideoRows`: from a video's name to its rows.
        provenance: `Provenance` of what is trained on this set; of its features since `fit`.
    """

    HEADERS = 64  # feature files whose headers are looked at before the first step, spread over the set

    def __init__(
        self,
        paths: Iterable[StrPath],
        tokenizer: ModelTokenizer,
        features: FeatureFolder | None,
        config: TrainConfig,
        world: World | None = None,
    ):
        self.tokenizer, self.features, self.config = tokenizer, features, config
        self.records = RecordTable(
            lambda record, number: examine(
                record, number, policy=config.policy, use_start_end=config.mm_use_vid_start_end
            ),
            self._missing_feature,
            config.dataloader_num_workers,
            world,
        )
        for path in paths:
            self.records.add(path)
        self.counts, self.remarks = self.records.counts, self.records.remarks
        for line in self.remarks.lines():
            log.warning("%s", line)
        if self.records.bad:
            self._report_bad()
        if not self.records:
            raise ValueError(f"{', '.join(map(shown, paths))}: no usable record")
        if features is not None:
            features.settle()
        self.rows_of = VideoRows(
            features, self.records.names, required=config.num_video_tokens, same=config.policy.one_video_length
        )
        if self.rows_of.fault:
            raise ValueError(f"no feature file can be read; the first one: {self.rows_of.fault}")
        self.provenance = provenance.Provenance(
            conv_mode=TRAINING_TEMPLATES[settled_version(config.version, tokenizer, config.policy)],
            question_order=config.question_order,
            use_start_end=config.mm_use_vid_start_end,
        )

    @property
    def _folder(self):
        """`features`, for the videos that records name: without a folder `_missing_feature` refuses such records."""
        assert self.features is not None
        return self.features

    @property
    def channels(self) -> Channels:
        """Of all features: those of the first, or the model's since `fit`; 0 where neither is known."""
        return self.rows_of.channels

    def fit(self, channels: Channels, required: int | None = None) -> None:
        """Take features of the model's `channels` only, and check the first video's, before any step is made.

        Args:
            required: rows that the training set requires of every video, which then hold for this set; None: as it is.

        Raises:
            ValueError: that video has another shape; the model takes features of two towers, and these are of one.
        """
        if isinstance(channels, tuple) and isinstance(self.channels, int) and self.channels:
            raise ValueError(
                f"the projectors to start from are of two vision towers, of {channels[0]} and {channels[1]} channels: "
                "give the second one's features with --video_folder_2"
            )
        if self.features is not None:
            self.features.check_channels(channels)
        self.rows_of.channels, self.rows_of.required = channels, required or self.rows_of.required
        if self.rows_of.first is not None:
            self.rows_of(self.rows_of.first[0])
        self._look_at_headers(log)

    def look_again(self) -> provenance.Provenance:
        """`provenance`, also of the features that were made since it was noted."""
        if self._unmade:
            self._look_at_headers(None)
        return self.provenance

    def _look_at_headers(self, log):
        """Note what some of the features were made with; say in `log` if several towers or decoders made them."""
        self._unmade = False
        folders = (None,) if self.features is None else self.features.towers
        found, *second = [self._look_at_headers_in(folder, log) for folder in folders]
        if second:
            rows = None if found.rows is None or second[0].rows is None else found.rows + second[0].rows
            found = replace(found, rows=rows, second=replace(second[0], rows=None))
        prompt = self.provenance
        self.provenance = replace(
            found, conv_mode=prompt.conv_mode, question_order=prompt.question_order, use_start_end=prompt.use_start_end
        )

    def _look_at_headers_in(self, folder, log):
        """The Provenance of the features in a folder of one vision tower; None: there is no folder."""
        names, looked_at = self.records.names, []
        step = max(1, len(names) // self.HEADERS)
        for name in names[::step]:
            try:
                looked_at.append((folder.shape(name)[0], folder.header(name)))
                self._unmade |= not folder.is_made(name)
            except (ValueError, OSError):  # reported where the record is used
                continue
        found, towers = provenance.of_features(looked_at, of_more=step > 1)
        poolings = set(found.pooling.split("; ")) - {RECIPE} if found.pooling else ()
        if poolings and self.config.policy.recipe_pooling:
            raise ValueError(
                f"features of --pooling {', '.join(sorted(poolings))}, and --parity reference takes {RECIPE} alone; "
                "extract them with that, or leave --parity reference out"
            )
        if found.tower is None and not towers and folder in (None, self.features):
            # Features without headers were made with the tower that the user names; without any video, what training
            # starts from goes on to hold. Of two towers nothing names one.
            started = provenance.of_weights(self.config.pretrain_mm_mlp_adapter or self.config.model_name_or_path)
            found = replace(found, tower=self.config.vision_tower) if names else started
        if len(towers) > 1 and log:
            log.warning(
                "features of %d vision towers: %s. A model reads those of one: `fastvid validate` counts them, "
                "`fastvid extract --overwrite True` makes them anew",
                len(towers),
                ", ".join(
                    f"{count} of {tower} ({revision[:19]}…)" for (tower, revision), count in towers.most_common()
                ),
            )
        remark, warning = provenance.what_decoders_mean(provenance.decoders_of(header for _, header in looked_at))
        some = f" ({len(looked_at)} of {len(names):,} files were looked at)"
        if (warning or remark) and log:
            log.log(
                logging.WARNING if warning else logging.INFO,
                "%s%s",
                warning or remark,
                some if len(looked_at) < len(names) else "",
            )
        if mixed := provenance.what_fp8_means(provenance.in_fp8(header for _, header in looked_at)):
            log.warning("%s%s", mixed, some if len(looked_at) < len(names) else "")
        made = [provenance.Provenance.of_header(header) for _, header in looked_at]
        frames = [each.num_frames for each in made if each.pooling != OF_AN_IMAGE]
        for unlike in (
            provenance.what_pooling_means(self.config.pooling, [each.pooling for each in made]),
            provenance.what_frames_mean(self.config.num_frames, frames),
        ):
            if unlike and log:
                log.warning("%s%s", unlike, some if len(looked_at) < len(names) else "")
        return found

    def check_some(self, limit: int = 64) -> None:
        """Look at some samples spread over the set.

        Raises:
            ValueError: none of them can be trained on.
        """
        samples = [self.encode(index) for index in range(0, len(self), max(1, len(self) // limit))]
        if all(sample.refused for sample in samples):
            raise ValueError(
                f"none of {len(samples)} samples looked at can be trained on; the first, {self.name(0)}: "
                f"{samples[0].refused}"
            )

    def name(self, index: int) -> str:
        """How messages name a sample: its id, and its record in its file."""
        return f"{shown(self.records[index]['id'])} ({self.records.place(index)})"

    def _missing_feature(self, name):
        """Why features of a video are not to be had, or None."""
        if self.features is None:
            return f"names a video ({shown(name)}); give its folder with --video_folder"
        try:
            self.features.resolve(name)
        except (ValueError, OSError) as error:
            return str(error)
        return None

    def _report_bad(self):
        count = self.records.unusable
        more = count - len(self.records.bad)
        first = "\n  ".join([*self.records.bad, *[f"… and {more} more"] * (more > 0)])
        if not self.records:
            raise ValueError(f"none of {count} records can be used (fastvid validate counts them by kind):\n  {first}")
        if self.config.on_bad_sample == "error":
            raise ValueError(f"{count} records cannot be used; --on_bad_sample skip trains without them:\n  {first}")
        log.warning("%d of %d records left out:\n  %s", count, count + len(self.records), first)

    def __len__(self) -> int:
        return len(self.records)

    def encode(self, index: int) -> EncodedSample:
        """Tokens of one sample."""
        config = self.config
        return encode_sample(
            self.records[index],
            self.tokenizer,
            rows_of=self.rows_of,
            version=config.version,
            use_start_end=config.mm_use_vid_start_end,
            max_length=config.model_max_length,
            policy=config.policy,
            question_order=config.question_order,
        )

    def read(
        self, index: int, loaded: dict[str, Features] | None = None, *, values: bool = True
    ) -> tuple[EncodedSample, list[Features]]:
        """Tokens and features of one sample.

        Args:
            loaded: features that were read before, by the name of their video; what is read is added to them.
            values: False takes zeros for features that are not made yet.

        Returns:
            (EncodedSample, list of `Features`)

        Raises:
            SampleSkipped: it cannot be trained on.
        """
        sample = self.encode(index)
        if sample.refused:
            raise SampleSkipped(sample.refused)
        loaded = {} if loaded is None else loaded
        for name in sample.videos:
            if name in loaded:
                continue
            if values:
                self._folder.await_made(name)
            try:
                features, header = (self._folder.load if values else self._folder.stand_in)(name)
            except (ValueError, OSError) as error:
                raise SampleSkipped(str(error)) from error
            if tuple(features.shape) != self._folder.shape(name):
                raise SampleSkipped(
                    f"{self._folder.resolve(name)} was {list(self._folder.shape(name))} when this "
                    f"run first looked, is {list(features.shape)} now; start the run again"
                )
            headers = header["towers"] if isinstance(features, FeaturePair) else [header]
            remarks = [
                remark
                for of_tower, known in zip(headers, self.provenance.towers)
                for remark in _unlike(provenance.Provenance.of_header(of_tower), known)
            ]
            sample = replace(sample, remarks=[*sample.remarks, *remarks]) if remarks else sample
            loaded[name] = features
        if any(self._folder.dtype(name) == torch.float64 for name in sample.videos):
            sample = replace(sample, remarks=[*sample.remarks, "its features are float64: rounded to float32"])
        return sample, [loaded[name] for name in sample.videos]


def _unlike(made, trained):
    """Remarks about features that were made otherwise than those that were looked at first."""
    known = (trained.conversion or "").split("; ")
    if made.conversion and known != [""] and made.conversion not in known:
        yield (
            f"its features are of the colour conversion {shown(made.conversion)}, not {' or '.join(map(shown, known))}"
        )
    if trained.tower_revision and made.tower_revision not in (None, trained.tower_revision):
        yield f"its features are of the tower {made.tower} ({made.tower_revision[:19]}…), not of {trained.tower}"
