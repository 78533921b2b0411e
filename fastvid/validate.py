"""``fastvid validate``: checks records and their feature files before a training run does."""

import hashlib
import json
import os
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

from fastvid import config as configs
from fastvid.data.annotations import Remarks, examine
from fastvid.data.records import place, read_records
from fastvid.data.styles import record_videos
from fastvid.files import shown
from fastvid.flags import parse

SHOWN = 3  # examples of each kind of problem
READERS = 16  # threads that open feature files: on a network file system waiting is most of the work


@dataclass
class Report:
    """What was found.

    Attributes:
        records: records read; `text_only` of them name no video; `duplicates` of them repeat an earlier one.
        videos: records by video.
        layouts: feature files by (R, C, dtype); None if they were not looked at.
        makers: feature files by (tower, its revision, frames per video), as far as their headers tell.
        formats: feature files by ending.
        problems: by kind, how many; and the first few, in words.
        remarks: what training leaves out, changes or makes up in records that it takes.
    """

    files: int = 0
    records: int = 0
    text_only: int = 0
    duplicates: int = 0
    videos: Counter = field(default_factory=Counter)
    layouts: Counter | None = None
    makers: Counter = field(default_factory=Counter)
    formats: Counter = field(default_factory=Counter)
    problems: Counter = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    remarks: Remarks = field(default_factory=Remarks)

    def add(self, kind, message):
        self.problems[kind] += 1
        if self.problems[kind] <= SHOWN:
            self.examples.setdefault(kind, []).append(message)


def validate(config: configs.ValidateConfig) -> Report:
    """Check every record, and every feature file that they name, without stopping at what is wrong.

    A record is a problem where training would refuse it or skip it. Features are read only with a `video_folder`, and
    under `quick` their headers alone: all must have the same C. R may differ, but under `num_video_tokens`, which is
    then every video's, and under ``--parity reference``. Where there is a model's folder, C is that of its config.json.

    Raises:
        ValueError: `video_folder` is no folder.
    """
    report, seen, kept = Report(), set(), []
    counts_tokens = (config.video_folder is not None and config.model_name_or_path is not None and not config.quick
                     and Path(config.model_name_or_path).is_dir())
    for path in config.data_path:
        report.files += 1
        try:
            records = read_records(path)
        except ValueError as error:
            report.add("unreadable data file", str(error))
            continue
        if not records:
            report.add("data file without a record", shown(path))
        for number, record in enumerate(records):
            read = _check_record(report, seen, record, number, path, config)
            if read is not None and counts_tokens:
                kept.append((path, number, read))
    if config.video_folder is not None:
        rows = _check_features(report, config)
        if counts_tokens:
            _check_lengths(report, config, kept, rows)
    return report


def _check_record(report, seen, record, number, path, config):
    """The record as training reads it; None where it is at fault."""
    report.records += 1
    found = examine(record, number, policy=config.policy, use_start_end=config.mm_use_vid_start_end)
    if found.fault is not None:
        report.add(found.fault.kind, f"{place(path, number)}: {found.fault.text}")
        return None
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).digest()
    report.duplicates += digest in seen
    seen.add(digest)
    videos = record_videos(found.record)
    report.videos.update(videos)
    report.text_only += not videos
    report.remarks.add(found.remarks, path, number)
    return found.record


def _check_features(report, config):
    """Rows of the videos whose features can be used."""
    from tqdm import tqdm

    from fastvid.data.features import FeatureFolder, MissingFeatures, describe_features, load_features
    from fastvid.data.video_tokens import feature_channels
    from fastvid.provenance import Provenance

    features, paths = FeatureFolder(config.video_folder), {}
    if not report.videos and features.empty:
        report.add("features missing", f"--video_folder {shown(config.video_folder)} holds no feature file, and no "
                                       "record names a video")
    for video, count in report.videos.items():
        try:
            paths[video] = features.resolve(video)
        except MissingFeatures as error:
            report.add("features missing", f"{error} (records: {count})")
        except ValueError as error:
            report.add("features refused", str(error))

    def probe(path):
        try:
            if not config.quick:
                load_features(path)
            layout, header = describe_features(path)
            return layout, Provenance.of(header)
        except (ValueError, OSError) as error:
            return error

    found, report.layouts = {}, Counter()
    with ThreadPool(READERS) as readers:
        results = readers.imap(probe, paths.values())
        for video, result in zip(paths, tqdm(results, "features", len(paths), unit="file", disable=None)):
            if isinstance(result, Exception):
                report.add("features unreadable", str(result))
            else:
                found[video], made = result
                report.layouts[found[video]] += 1
                report.formats[paths[video].suffix] += 1
                if made.tower_revision is not None:
                    report.makers[made.tower, made.tower_revision, made.num_frames] += 1
    if not found:
        return {}
    _check_towers(report, config.vision_tower)
    (C, _), = Counter(channels for _, channels, _ in found.values()).most_common(1)
    if config.model_name_or_path is not None and Path(config.model_name_or_path).is_dir():
        with suppress(ValueError):  # told where its tokenizer is read
            C = feature_channels(config.model_name_or_path) or C
    required = config.num_video_tokens
    if required is None and config.policy.one_video_length:
        rows_of_C = Counter(rows for rows, channels, _ in found.values() if channels == C)
        required = max(rows_of_C, key=rows_of_C.get, default=None)
    usable, remedy = {}, "extract all with one tower"
    if config.num_video_tokens is not None:
        remedy += f", or leave --num_video_tokens {config.num_video_tokens} out"
    for video, (rows, channels, _) in found.items():
        if channels == C and rows == (required or rows):
            usable[video] = rows
        else:
            report.add("features of another shape",
                       f"video {video!r}: {paths[video]} is {rows} × {channels} instead of {required or 'any number'} "
                       f"× {C}; {remedy}")
    return usable


def _check_lengths(report, config, kept, rows):
    """Encode the samples, as training does, whose videos have `rows`: what is too long is cut, or skipped."""
    from tqdm import tqdm

    from fastvid.data.conversation import encode_sample, load_tokenizer

    try:
        tokenizer = load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    except ValueError as error:
        report.add("no tokenizer", str(error))
        return
    told = set(report.remarks.counts)
    for path, number, record in tqdm(kept, "tokens", unit=" samples", disable=None):
        if not all(video in rows for video in record_videos(record)):
            continue  # told already
        sample = encode_sample(
            record, tokenizer, rows_of=rows.__getitem__, use_start_end=config.mm_use_vid_start_end,
            max_length=config.model_max_length, policy=config.policy, version=config.version,
            question_order=config.question_order)
        if sample.refused:
            report.add("samples longer than --model_max_length", f"{place(path, number)}: {sample.refused}")
        report.remarks.add([each for each in sample.remarks if each not in told], path, number)


def _check_towers(report, wanted):
    """A model reads the features of one tower: several of them are a problem, counted as files of all but the most.

    So are those of another one than `wanted`, where that is a folder.
    """
    if wanted is not None and os.path.isdir(wanted):
        from fastvid.provenance import same_tower
        from fastvid.video.towers.choice import revisions

        known = revisions(wanted)
        for (tower, revision, _), count in report.makers.items():
            if same_tower(revision, known) is False:
                kind = "features of another tower than --vision_tower"
                report.problems[kind] += count
                report.examples.setdefault(kind, []).append(
                    f"{count:,} of {tower} ({revision[:19]}…): leave --vision_tower {shown(wanted)} out, or give that "
                    "one")
    towers = Counter()
    for (tower, revision, _), count in report.makers.items():
        towers[revision] += count
    (most, _), *others = towers.most_common() or [(None, 0)]
    names = {revision: tower for tower, revision, _ in report.makers}
    for revision, count in others:
        report.problems["features of another vision tower"] += count
        report.examples.setdefault("features of another vision tower", []).append(
            f"{count:,} of {names[revision]} ({revision[:19]}…), {towers[most]:,} of {names[most]} ({most[:19]}…): "
            "extract all with one tower (fastvid extract --overwrite True)")


def summary(report: Report) -> str:
    """The report on one screen."""
    lines = [
        f"records     {report.records:>9,} in {report.files} file{'s' * (report.files != 1)}",
        f"  text only {report.text_only:>9,}",
        f"  repeated  {report.duplicates:>9,}",
        f"videos      {len(report.videos):>9,}",
    ]
    if report.layouts is None:
        lines.append("features    not looked at: no --video_folder")
    for (R, C, dtype), count in (report.layouts or Counter()).most_common(SHOWN):
        rounded = ", rounded to float32" * (str(dtype) == "torch.float64")
        lines.append(f"features    {count:>9,} of {R} × {C} {str(dtype).removeprefix('torch.')}{rounded}")
    if len(report.formats) > 1:
        counts = ", ".join(f"{count:,} {ending}" for ending, count in report.formats.most_common())
        lines.append(f"formats     {counts}")
    for (tower, revision, frames), count in report.makers.most_common(SHOWN):
        lines.append(f"made by     {count:>9,} {tower} ({revision[:19]}…), {frames} frames")
    if (others := len(report.layouts or ()) - SHOWN) > 0:
        rows = [R for R, _, _ in report.layouts]
        lines.append(f"            … and {others:,} more shapes; {min(rows):,} to {max(rows):,} rows in all")
    lines += [f"remark      {line}" for line in report.remarks.lines()]
    for kind, count in report.problems.items():
        lines.append(f"{kind}: {count:,}")
        lines += [f"    {example}" for example in report.examples[kind]]
        if count > len(report.examples[kind]) >= SHOWN:
            lines.append(f"    … and {count - SHOWN:,} more")
    total = sum(report.problems.values())
    return "\n".join([*lines, f"{total:,} problem{'s' * (total != 1)}" if total else "nothing wrong"])


def main(argv=None) -> int:
    report = validate(parse(configs.ValidateConfig, argv))
    print(summary(report))
    return 1 if report.problems else 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("validate")
