"""``fastvid validate``: joins records, features and videos before a training run does."""

import hashlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from fastvid import config as configs
from fastvid.data.annotations import examine
from fastvid.data.records import place, read_records, write_records
from fastvid.data.styles import record_videos
from fastvid.files import atomic_file, shown
from fastvid.flags import parse
from fastvid.validation.report import Report, as_json, summary


def validate(config: configs.ValidateConfig) -> Report:
    """Check every record, and every feature file that they name, without stopping at what is wrong.

    A record is a problem where training would refuse it or skip it. Features are read only with a `video_folder`, and
    under `quick` their headers alone: all must have the same C. R may differ, but under `num_video_tokens`, which is
    then every video's, and under ``--parity reference``. Where there is a model's folder, C is that of its config.json.
    With a `video_dir_path` features are compared with the videos that they were made of.

    With `drop` the records that no problem was found with are written there, in their order, whole or not at all.

    Raises:
        ValueError: `video_folder` or `video_dir_path` is no folder; `drop` or `json` is there already, without
            `overwrite`; a data file cannot be read, or no record would be left, where `drop` is to be written.
        OSError: `drop` cannot be written.
    """
    report, kept = _validated(config)
    if kept is not None:
        _write_kept(config, report, kept)
    return report


def _validated(config):
    """(Report, records that nothing is wrong with) of `validate`; the latter is None without `drop`."""
    _refuse_to_replace(config)
    report, seen, read_all = Report(), set(), []
    counts_tokens = (
        config.video_folder is not None
        and config.model_name_or_path is not None
        and not config.quick
        and Path(config.model_name_or_path).is_dir()
    )
    for file, path in enumerate(config.data_path):
        report.files += 1
        report.absent += not os.path.exists(path)
        try:
            records = read_records(path)
        except ValueError as error:
            report.add("unreadable data file", str(error))
            continue
        if not records:
            report.add("data file without a record", shown(path))
        for number, record in enumerate(records):
            read = _check_record(report, seen, record, (file, number), path, config)
            if read is not None and (counts_tokens or config.drop is not None):
                read_all.append((file, number, read, None if config.drop is None else record))
    if config.video_folder is not None or config.video_folder_2 is not None:
        from fastvid.validation.features import check_features

        rows = check_features(report, config)
        if counts_tokens:
            _check_lengths(report, config, read_all, rows)
    if config.drop is None:
        return report, None
    kept = [
        record
        for file, number, read, record in read_all
        if (file, number) not in report.bad_records
        and not any(video in report.bad_videos for video in record_videos(read))
    ]
    return report, kept


def _why_nothing_is_kept(report, kept):
    """Why no filtered file can be written; None if it can."""
    if report.problems["unreadable data file"]:
        return "a data file cannot be read"
    return None if kept else f"a problem was found with each of the {report.records:,} records"


def _write_kept(config, report, kept):
    if why := _why_nothing_is_kept(report, kept):
        raise ValueError(f"{why}: nothing was written to --drop {shown(config.drop)}")
    write_records(config.drop, kept)


def _refuse_to_replace(config):
    """Refuse to write over what is there: data files always, others without ``--overwrite``."""
    outputs = {flag: path for flag, path in (("--drop", config.drop), ("--json", config.json)) if path is not None}
    for flag, path in outputs.items():
        if any(os.path.realpath(path) == os.path.realpath(data) for data in config.data_path):
            raise ValueError(f"{flag} {shown(path)} is a --data_path itself, which stays as it is; give another file")
        if os.path.isfile(path) and not config.overwrite:
            raise ValueError(
                f"{flag} {shown(path)} is there already; give another file, or replace it with --overwrite True"
            )
    if len({os.path.realpath(path) for path in outputs.values()}) < len(outputs):
        raise ValueError(f"--drop and --json are both {shown(config.drop)}; give each a file of its own")


def _check_record(report, seen, record, number, path, config):
    """The record as training reads it; None where it is at fault."""
    report.records += 1
    found = examine(record, number[1], policy=config.policy, use_start_end=config.mm_use_vid_start_end)
    if found.fault is not None:
        report.add(found.fault.kind, f"{place(path, number[1])}: {found.fault.text}", record=number)
        return None
    assert found.record is not None
    digest = hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).digest()
    report.duplicates += digest in seen
    seen.add(digest)
    videos = record_videos(found.record)
    report.videos.update(videos)
    report.text_only += not videos
    report.remarks.add(found.remarks, path, number[1])
    return found.record


def _check_lengths(report, config, read_all, rows):
    """Encode the samples, as training does, whose videos have `rows`: what is too long is cut, or skipped."""
    from tqdm import tqdm

    from fastvid.data.conversation import encode_sample
    from fastvid.data.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    except ValueError as error:
        report.add("no tokenizer", str(error))
        return
    told = set(report.remarks.counts)
    for file, number, record, _ in tqdm(read_all, "tokens", unit=" samples", disable=None):
        if not all(video in rows for video in record_videos(record)):
            continue  # told already
        path = config.data_path[file]
        sample = encode_sample(
            record,
            tokenizer,
            rows_of=rows.__getitem__,
            use_start_end=config.mm_use_vid_start_end,
            max_length=config.model_max_length,
            policy=config.policy,
            version=config.version,
            question_order=config.question_order,
        )
        if sample.refused:
            report.add(
                "samples longer than --model_max_length",
                f"{place(path, number)}: {sample.refused}",
                record=(file, number),
            )
        report.remarks.add([each for each in sample.remarks if each not in told], path, number)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code.

    That is 0 where nothing is wrong, and where ``--drop`` has left out all that is; 1 with problems; 2 where a data
    file is not there, as other commands end.
    """
    config = parse(configs.ValidateConfig, argv)
    report, kept = _validated(config)
    print(summary(report))
    if config.json is not None:
        written = (
            None
            if kept is None or _why_nothing_is_kept(report, kept)
            else {"file": config.drop, "kept": len(kept), "left_out": report.records - len(kept)}
        )
        with atomic_file(config.json) as file:
            file.write(json.dumps({**as_json(report), "drop": written}, indent=1).encode() + b"\n")
    if kept is None:
        return report.exit_code
    _write_kept(config, report, kept)
    print(f"{len(kept):,} of {report.records:,} records were written to {shown(config.drop)}", file=sys.stderr)
    return 1 if report.elsewhere else 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("validate")
