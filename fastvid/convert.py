"""``fastvid convert``: VideoInstruct's and other trainers' records to training records, or to those with features."""

import itertools
import os
import sys
from collections.abc import Sequence

from fastvid import config as configs
from fastvid.data import instructions
from fastvid.data.conversion import Conversion, convert_any
from fastvid.data.on_disk import RecordFile, TooDeep
from fastvid.data.records import RecordWriter
from fastvid.features.names import SUFFIXES, stem
from fastvid.files import VIDEO_SUFFIXES, atomic_file, shown
from fastvid.flags import parse

_NONE = object()
LISTED = 20  # records left out that are named one by one


def convert(config: configs.ConvertConfig) -> Conversion:
    """Convert one file to another; the output appears whole or not at all.

    A file of training records keeps those whose videos have features.

    Raises:
        ValueError: a malformed record where that is an error; a file that is no JSON; a feature folder that is none; no
            record would be left.
    """
    path, folder = config.input_json_file, config.clip_feature_path
    ids = None if folder is None else instructions.feature_ids(folder)
    records = _records(path)
    if (first := next(records, _NONE)) is _NONE:
        raise ValueError(f"{shown(path)} holds no record; nothing was written")
    with atomic_file(config.output_json_file) as file:
        writer = RecordWriter(file, config.output_json_file)
        done = convert_any(
            itertools.chain([first], records),
            path=path,
            style=config.from_,
            on_bad=config.on_bad,
            feature_ids=ids,
            missing=None if folder is None else _missing(folder),
            media_root=config.media_root,
            into=writer,
        )
        count = sum(done.styles.values())
        if folder is None and done.unchanged == count:
            raise ValueError(
                f"{shown(path)} holds training records already, which need no conversion; with "
                "--clip_feature_path those are kept whose videos have features"
            )
        if not len(writer):
            raise ValueError(
                f"none of the {count:,} records of {shown(path)} is left, so nothing was written: "
                + _why_none(done, path, folder, ids)
            )
        writer.finish()
    return done


def _records(path):
    """The records of a file, which is held in memory a piece at a time; a `TooDeep` in the place of one that is."""
    file = RecordFile(path)
    for block in file.scan():
        for number in range(block.first, block.first + len(block.name_of)):
            try:
                yield file.examined(number)
            except TooDeep as fault:
                yield fault


def _missing(folder):
    """Whether the folder has no features of a video or an image."""
    from fastvid.features.folder import FeatureFolder, MissingFeatures

    features = FeatureFolder(folder)

    def missing(name):
        try:
            features.resolve(name)
        except MissingFeatures:
            return True
        return False

    return missing


def _why_none(done, path, folder, ids):
    """The likely reason for which every record was left out, and what to do."""
    if not done.absent:
        if not done.of_upstream:
            return "; ".join(done.kinds(path))
        index, name, reason = done.dropped[0]
        return f"all are malformed; record {index} (from 0): {instructions.describe((name, reason))}"
    wanted, files = shown(done.absent[0][1]), sorted(os.listdir(folder))
    if not ids:
        videos = [name for name in files if name.lower().endswith(VIDEO_SUFFIXES)]
        found = f"; it holds {shown((videos or files)[0])}" if files else "; it is empty"
        remedy = "; extract the features of the videos first (fastvid extract)" if videos else ""
        return f"--clip_feature_path {shown(folder)} holds no feature file ({', '.join(SUFFIXES)}){found}{remedy}"
    names = [name for name in files if stem(name) != name] or sorted(ids)
    return (
        f"--clip_feature_path {shown(folder)} holds features of other videos: the first wanted is {wanted}, the "
        f"first found {shown(names[0])}; give the folder that holds these records' features"
    )


def _tell(config, done):
    """What was left out or is unusual, on stderr."""
    lines = []
    if not done.of_upstream:
        styles = (f"{count:,} {style or 'of no known style'}" for style, count in done.styles.most_common())
        lines.append(f"{shown(config.input_json_file)}: {sum(done.styles.values()):,} records: {', '.join(styles)}")
        lines += done.remarks.lines() + done.kinds(config.input_json_file)
    elif done.dropped:
        lines.append(f"{shown(config.input_json_file)}: {len(done.dropped)} malformed records dropped:")
        lines += _listed(done.dropped, instructions.describe)
    if done.absent:
        lines.append(f"{len(done.absent)} records left out: no features in {shown(config.clip_feature_path)}:")
        lines += _listed(done.absent, lambda named: shown(named[0]))
    if done.shortened:
        lines.append(f'{done.shortened} records: the ending of "video_id" is left out, as names of features have none')
    for what, count in done.empty.items():
        if count:
            remedy = "; training leaves them out with --on_bad_sample skip" if what == "answer" else ""
            lines.append(f"{count} records have an empty {what}{remedy}")
    if done.placeholders:
        lines.append(
            f"{done.placeholders} records have <video> or another placeholder in their own text: training refuses "
            "them; take it out of the text, or leave them out with --on_bad_sample skip"
        )
    print(*lines, sep="\n", end="\n" if lines else "", file=sys.stderr)


def _listed(left_out, describe):
    lines = [f"  record {index} (from 0): {describe(why)}" for index, *why in left_out[:LISTED]]
    more = len(left_out) - LISTED
    return lines + [f"  … and {more} more"] * (more > 0)


def main(argv: Sequence[str] | None = None) -> int:
    config = parse(configs.ConvertConfig, argv)
    done = convert(config)
    _tell(config, done)
    print(f"Total annotations retained: {len(done.records)}")  # the reference's line
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("convert")
