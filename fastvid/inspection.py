"""``fastvid inspect``: what the model will see of each record, and which of it is supervised; as text and as a page."""

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from typing import Any

from fastvid.config import InspectConfig
from fastvid.config.pooling import RECIPE
from fastvid.data.conversation import encode_sample
from fastvid.data.records import read_records
from fastvid.data.tokenizer import ModelTokenizer, load_tokenizer
from fastvid.data.video_tokens import TEMPORAL, VideoRows, feature_channels, named_videos, video_token_count
from fastvid.files import atomic_file, shown
from fastvid.flags import parse
from fastvid.online.folder import training_features

log = logging.getLogger("fastvid")

_SUPERVISED, _PLACEHOLDER, _RESET = "\033[32m", "\033[2m", "\033[0m"


def inspect_records(config: InspectConfig, tokenizer: ModelTokenizer | None = None) -> Iterator[dict[str, Any]]:
    """What training makes of each record of `config.data_path`, in order.

    Args:
        config: InspectConfig.
        tokenizer: as `load_tokenizer` gives it; None loads that of `config`.

    Yields:
        {"id", "input_ids": ids with the video's placeholders written out, "supervised": [start, end) spans of them,
        "warning": None, or what is unusual about the record and why training would refuse it}

    Raises:
        ValueError: files that cannot be read, or no way to tell how many tokens a video takes.
    """
    for line, _ in _looked_at(config, tokenizer):
        yield line


def _looked_at(config, tokenizer):
    """(what `inspect_records` yields, names of the record's videos) of each record."""
    tokenizer = tokenizer or load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    numbered = [numbered for path in config.data_path for numbered in enumerate(read_records(path))]
    records = [record for _, record in numbered]
    features = training_features(config, named_videos(records))
    otherwise = video_token_count(
        config.model_name_or_path, config.vision_tower, config.num_video_tokens, features, records
    )
    if features is None and config.num_video_tokens is None and otherwise:
        log.warning(
            "videos are shown with %d rows each, a guess from the vision tower and %d frames: --video_folder "
            "tells each one's own",
            otherwise,
            TEMPORAL,
        )
    video_rows = VideoRows(
        features, named_videos(records), required=config.num_video_tokens, same=config.policy.one_video_length
    )
    if config.pretrain_mm_mlp_adapter is None:  # whose own channels would count
        told = [feature_channels(config.model_name_or_path, second=second) for second in (False, True)]
        first, second = found if isinstance(found := video_rows.channels, tuple) else (found, None)
        first, second = told[0] or first, told[1] or second
        video_rows.channels = first if second is None else (first, second)

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
            record,
            tokenizer,
            rows_of=lambda name: look_at(name)[0],
            use_start_end=config.mm_use_vid_start_end,
            max_length=config.model_max_length,
            policy=config.policy,
            version=config.version,
            question_order=config.question_order,
            number=number,
        )
        remarks = [sample.warning, sample.refused, *(look_at(name)[1] for name in sample.videos)]
        yield (
            {
                "id": sample.id,
                "input_ids": sample.token_ids,
                "supervised": sample.supervised,
                "warning": "; ".join(filter(None, remarks)) or None,
            },
            sample.videos,
        )


def render(line: dict[str, Any], tokenizer: ModelTokenizer, colour: bool) -> str:
    """One record of `inspect_records` as text: a summary, its warning, and the tokens.

    Runs of placeholders are written as one, ``<vid_patch>×676``.
    """
    text = f"── {line['id']}: {_counted(line)}\n"
    if line["warning"]:
        text += f"   warning: {line['warning']}\n"
    styles = {"supervised": _SUPERVISED, "placeholder": _PLACEHOLDER, "": ""}
    return (
        text
        + "".join(
            f"{styles[kind]}{part}{_RESET}" if colour and kind else part for part, kind in pieces(line, tokenizer)
        )
        + "\n"
    )


def _counted(line):
    spans = line["supervised"]
    where = " ".join(f"[{start},{end})" for start, end in spans)
    count = sum(end - start for start, end in spans)
    return f"{len(line['input_ids'])} tokens, {count} supervised {where}".rstrip()


def pieces(line: dict[str, Any], tokenizer: ModelTokenizer) -> list[tuple[str, str]]:
    """The text of one record of `inspect_records`, parted: (text, "supervised", "placeholder" or "")."""
    ids, spans, parts = line["input_ids"], line["supervised"], []
    supervised = [False] * len(ids)
    for start, end in spans:
        supervised[start:end] = [True] * (end - start)
    for name, run in groupby(zip(ids, supervised), key=lambda token: tokenizer.name(token[0])):
        run = list(run)
        if name is not None:
            repeated = f"{name}×{len(run)}" if len(run) > 1 else name
            parts.append((repeated, "supervised" if run[0][1] else "placeholder"))
            continue
        # A stretch of text is decoded as it was encoded, whole; what is decoded alone loses its leading space.
        whole, done, at = tokenizer.decode([i for i, _ in run]), 0, 0
        for is_supervised, piece in groupby(run, key=lambda token: token[1]):
            at += len(list(piece))
            end = len(tokenizer.decode([i for i, _ in run[:at]])) if at < len(run) else len(whole)
            parts.append((whole[done:end], "supervised" if is_supervised else ""))
            done = end
    return parts


def page_of_record(
    config: InspectConfig, line: dict[str, Any], videos: Sequence[str], tokenizer: ModelTokenizer
) -> bytes:
    """The HTML page of one record of `inspect_records`.

    Args:
        config: InspectConfig.
        videos: names of its videos.

    Raises:
        ValueError: `video_dir_path` is no folder, or holds no video; `video` is one file for several videos.
    """
    from fastvid.page.document import document
    from fastvid.page.view import view_record

    if config.video is not None and len(videos) > 1:
        raise ValueError(
            f"--video {shown(config.video)} is one file, and record {line['id']} has {len(videos)} "
            "videos; give their folder with --video_dir_path instead"
        )
    features = training_features(config, videos)
    views = [
        view_record(name, folder, _video_of(config, folder, name), num_frames=config.num_frames)
        for name in videos
        for folder in ((None,) if features is None else features.towers)
    ]
    return document(
        views,
        title=f"Record {line['id']}",
        prompt=(f"{_counted(line)}.", pieces(line, tokenizer)),
        warning=line["warning"],
    )


def _video_of(config, features, name):
    """The file of a record's video; None where it is not at hand."""
    from fastvid.validation.sources import Sources

    if config.video is not None:
        return config.video
    if config.video_dir_path is None:
        with suppress(ValueError, OSError):
            return features and (video := features.video_of(name)) and video.path
        return None
    header = {}
    if features is not None:
        with suppress(ValueError, OSError):  # told on the page, where they are read
            header = features.header(name)
    folder = config.video_dir_path if features is None else features.folder
    return Sources(folder, config.video_dir_path).path_of(name, header)


def page_of_video(config: InspectConfig) -> bytes:
    """The HTML page of the video, or of the feature file, that `config.video` names.

    Raises:
        ValueError: it is neither, or damaged; the tower cannot be used.
        OSError: it cannot be read.
    """
    from fastvid.page.document import document
    from fastvid.page.view import view_file

    assert config.video is not None
    view = view_file(
        config.video, tower=config.vision_tower, num_frames=config.num_frames, pooling=config.pooling or RECIPE
    )
    return document([view], title=f"Video {view.name}")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    from tqdm import tqdm

    config = parse(InspectConfig, argv)
    if not config.data_path:
        _write_page(config, page_of_video(config))
        return 0
    assert config.model_name_or_path is not None  # the parser refuses --data_path without it
    tokenizer = load_tokenizer(config.model_name_or_path, config.mm_use_vid_start_end)
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    lines = _looked_at(config, tokenizer)
    hidden = config.disable_tqdm or sys.stdout.isatty() or not sys.stderr.isatty()
    for line, videos in tqdm(lines, desc="inspect", unit=" records", disable=hidden, file=sys.stderr):
        print(json.dumps(line) if config.json else render(line, tokenizer, colour))
        if config.html is not None:
            _write_page(config, page_of_record(config, line, videos, tokenizer))
    return 0


def _write_page(config, page):
    with atomic_file(config.html) as file:
        file.write(page)
    print(f"page written: {shown(config.html)}", file=sys.stderr)


if __name__ == "__main__":
    from fastvid.cli import run

    run("inspect")
