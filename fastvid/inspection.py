"""``fastvid inspect``: what the model will see of each record, and which of it is supervised."""

import json
import logging
import os
import sys
from functools import cache
from itertools import groupby

from fastvid.config import InspectConfig
from fastvid.data.conversation import encode_sample, load_tokenizer
from fastvid.data.features import FeatureFolder
from fastvid.data.records import read_records
from fastvid.data.video_tokens import TEMPORAL, VideoRows, feature_channels, video_token_count
from fastvid.flags import parse

log = logging.getLogger("fastvid")

_SUPERVISED, _PLACEHOLDER, _RESET = "\033[32m", "\033[2m", "\033[0m"


def inspect_records(config, tokenizer=None):
    """What training makes of each record of `config.data_path`, in order.

    Args:
        config: InspectConfig.
        tokenizer: `fastvid.data.conversation.VideoTokenizer`; None loads that of `config`.

    Yields:
        {"id", "input_ids": ids with the video's placeholders written out, "supervised": [start, end) spans of them,
        "warning": None, or what is unusual about the record and why training would refuse it}

    Raises:
        ValueError: files that cannot be read, or no way to tell how many tokens a video takes.
    """
    tokenizer = tokenizer or load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    numbered = [numbered for path in config.data_path for numbered in enumerate(read_records(path))]
    records = [record for _, record in numbered]
    features = None if config.video_folder is None else FeatureFolder(config.video_folder)
    otherwise = video_token_count(
        config.model_name_or_path, config.vision_tower, config.num_video_tokens, features, records)
    if features is None and config.num_video_tokens is None and otherwise:
        log.warning("videos are shown with %d rows each, a guess from the vision tower and %d frames: --video_folder "
                    "tells each one's own", otherwise, TEMPORAL)
    video_rows = VideoRows(features, records, required=config.num_video_tokens, same=config.policy.one_video_length)
    if config.pretrain_mm_mlp_adapter is None:  # whose own channels would count
        video_rows.channels = feature_channels(config.model_name_or_path) or video_rows.channels

    @cache
    def look_at(name):
        """(rows of a video, why its features cannot be used): the rows are known, or what they might be."""
        if features is None:
            return otherwise, None
        rows = otherwise
        try:
            rows = video_rows(name)
            features.load(name)  # as training does: values may be damaged, or NaN
        except (ValueError, OSError) as error:
            return rows, str(error)
        return rows, None

    if config.index is not None:
        if config.index >= len(records):
            raise ValueError(f"--index {config.index}: the data hold records 0 to {len(records) - 1}")
        numbered = [numbered[config.index]]
    for number, record in numbered:
        sample = encode_sample(
            record, tokenizer, rows_of=lambda name: look_at(name)[0], use_start_end=config.mm_use_vid_start_end,
            max_length=config.model_max_length, policy=config.policy, version=config.version,
            question_order=config.question_order, number=number)
        remarks = [sample.warning, sample.refused, *(look_at(name)[1] for name in sample.videos)]
        yield {"id": sample.id, "input_ids": sample.token_ids, "supervised": sample.supervised,
               "warning": "; ".join(filter(None, remarks)) or None}


def render(line, tokenizer, colour):
    """One record of `inspect_records` as text: a summary, its warning, and the tokens.

    Runs of placeholders are written as one, ``<vid_patch>×676``.
    """
    ids, spans = line["input_ids"], line["supervised"]
    where = " ".join(f"[{start},{end})" for start, end in spans)
    count = sum(end - start for start, end in spans)
    text = f"── {line['id']}: {len(ids)} tokens, {count} supervised {where}".rstrip() + "\n"
    if line["warning"]:
        text += f"   warning: {line['warning']}\n"
    shown = []
    supervised = [False] * len(ids)
    for start, end in spans:
        supervised[start:end] = [True] * (end - start)
    for name, run in groupby(zip(ids, supervised), key=lambda token: tokenizer.name(token[0])):
        run = list(run)
        if name is not None:
            repeated = f"{name}×{len(run)}" if len(run) > 1 else name
            shown.append((repeated, _SUPERVISED if run[0][1] else _PLACEHOLDER))
            continue
        # A stretch of text is decoded as it was encoded, whole; what is decoded alone loses its leading space.
        whole, done, at = tokenizer.decode([i for i, _ in run]), 0, 0
        for is_supervised, part in groupby(run, key=lambda token: token[1]):
            at += len(list(part))
            end = len(tokenizer.decode([i for i, _ in run[:at]])) if at < len(run) else len(whole)
            shown.append((whole[done:end], _SUPERVISED if is_supervised else ""))
            done = end
    return text + "".join(f"{style}{part}{_RESET}" if colour and style else part for part, style in shown) + "\n"


def main(argv=None):
    """The command line; returns the exit code."""
    from tqdm import tqdm

    config = parse(InspectConfig, argv)
    tokenizer = load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = inspect_records(config, tokenizer)
    hidden = config.disable_tqdm or sys.stdout.isatty() or not sys.stderr.isatty()
    for line in tqdm(lines, desc="inspect", unit=" records", disable=hidden, file=sys.stderr):
        print(json.dumps(line) if config.json else render(line, tokenizer, colour))
    return 0


if __name__ == "__main__":
    from fastvid.cli import run

    run("inspect")
