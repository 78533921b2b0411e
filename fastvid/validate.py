"""``fastvid validate``: checks records and their feature files before a training run does."""

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool

from fastvid import config as configs
from fastvid.data import annotations
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

    def add(self, kind, message):
        self.problems[kind] += 1
        if self.problems[kind] <= SHOWN:
            self.examples.setdefault(kind, []).append(message)


def validate(config: configs.ValidateConfig) -> Report:
    """Check every record, and every feature file that they name, without stopping at what is wrong.

    Features are looked at only with a `video_folder`: existence, size against the header, and that all have the same C.
    R may differ, but under `num_video_tokens`, which is then every video's, and under ``--parity reference``.

    Raises:
        ValueError: `video_folder` is no folder.
        OSError: a data file cannot be opened.
    """
    report, seen = Report(), set()
    for path in config.data_path:
        report.files += 1
        try:
            records = annotations.read_records(path)
        except ValueError as error:
            report.add("unreadable data file", str(error))
            continue
        for index, record in enumerate(records):
            _check_record(report, seen, record, index, path)
    if config.video_folder is not None:
        _check_features(report, config)
    return report


def _check_record(report, seen, record, index, path):
    report.records += 1
    fault = annotations.training_fault(record)
    if fault is not None:
        kind = f"malformed record, field '{fault[0]}'" if fault[0] else "malformed record"
        report.add(kind, f"{path}: record {index} (from 0): {annotations.describe(fault)}")
        return
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).digest()
    report.duplicates += digest in seen
    seen.add(digest)
    videos = annotations.record_videos(record)
    report.videos.update(videos)
    report.text_only += not videos
    placeholders = sum(turn["value"].count("<video>") for turn in record["conversations"])
    if placeholders != len(videos):
        report.add("<video> placeholders and videos differ in number",
                   f"{path}: record {index} (from 0, id {record['id']}): {placeholders} <video>, {len(videos)} videos")


def _check_features(report, config):
    from tqdm import tqdm

    from fastvid.data.features import FeatureFolder, MissingFeatures, feature_header, probe_features
    from fastvid.provenance import Provenance

    features, paths = FeatureFolder(config.video_folder), {}
    for video, count in report.videos.items():
        try:
            paths[video] = features.resolve(video)
        except MissingFeatures as error:
            report.add("features missing", f"{error} (records: {count})")
        except ValueError as error:
            report.add("features refused", str(error))

    def probe(path):
        try:
            return probe_features(path), Provenance.of(feature_header(path))
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
        return
    _check_towers(report)
    (C, _), = Counter(channels for _, channels, _ in found.values()).most_common(1)
    required = config.num_video_tokens
    if required is None and config.policy.one_video_length:
        (required, _), = Counter(rows for rows, channels, _ in found.values() if channels == C).most_common(1)
    for video, (rows, channels, _) in found.items():
        if channels != C or rows != (required or rows):
            report.add("features of another shape",
                       f"video {video!r}: {paths[video]} is {rows} × {channels} instead of {required or 'any number'} "
                       f"× {C}; extract all with one tower")


def _check_towers(report):
    """A model reads the features of one tower: several of them are a problem, counted as files of all but the most."""
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
        lines.append(f"features    {count:>9,} of {R} × {C} {str(dtype).removeprefix('torch.')}")
    if len(report.formats) > 1:
        counts = ", ".join(f"{count:,} {ending}" for ending, count in report.formats.most_common())
        lines.append(f"formats     {counts}")
    for (tower, revision, frames), count in report.makers.most_common(SHOWN):
        lines.append(f"made by     {count:>9,} {tower} ({revision[:19]}…), {frames} frames")
    if (others := len(report.layouts or ()) - SHOWN) > 0:
        rows = [R for R, _, _ in report.layouts]
        lines.append(f"            … and {others:,} more shapes; {min(rows):,} to {max(rows):,} rows in all")
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
