"""Every feature file that records name: whether it is there, whole, of the video as it is now, and like the others."""

import os
from collections import Counter
from contextlib import suppress
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tqdm import tqdm

from fastvid.config import ValidateConfig
from fastvid.config.pooling import OF_AN_IMAGE, RECIPE
from fastvid.data.video_tokens import feature_channels, tower_geometry
from fastvid.features.cut_short import is_cut_short
from fastvid.features.file import describe_features, load_features
from fastvid.features.folder import MissingFeatures
from fastvid.features.names import medium, namesake
from fastvid.files import shown
from fastvid.online.folder import OnlineFeatures, training_features
from fastvid.online.start import frames_to_make, pooling_to_make, tower_to_make
from fastvid.provenance import (
    Provenance,
    decoders_of,
    in_fp8,
    is_of_an_image,
    same_tower,
    what_frames_mean,
    what_pooling_means,
)
from fastvid.validation.report import Report
from fastvid.validation.sources import Sources

READERS = 16  # threads that open feature files: on a network file system waiting is most of the work


def check_features(report: Report, config: ValidateConfig) -> dict[str, int]:
    """Look at the features of `report.videos`, and note in `report` what is wrong with them.

    Args:
        config: `fastvid.config.ValidateConfig` with a `video_folder`; with a `video_folder_2` videos have features of
            two vision towers.

    Returns:
        {video: rows} of those that can be used.

    Raises:
        ValueError: `video_folder`, `video_folder_2` or `video_dir_path` is no folder.
    """
    report.layouts = Counter()
    if config.video_folder_2 is None:
        assert config.video_folder is not None
        return _check_folder(report, config, OnlineFeatures(config))
    pair = training_features(config)
    assert pair is not None, "a second folder needs a first one, which was checked"
    first, second = (_check_folder(report, config, folder, i, two=True) for i, folder in enumerate(pair.towers))
    rows = {video: number + second[video] for video, number in first.items() if video in second}
    required = config.num_video_tokens
    for video, number in rows.items() if required is not None else ():
        if number != required:
            report.add(
                "features of another shape",
                f"video {video!r} has {first[video]} and {second[video]} rows instead of {required}; leave "
                f"--num_video_tokens {required} out",
                video=video,
            )
    return {video: number for video, number in rows.items() if number == (required or number)}


def _check_folder(report, config, features, number=0, *, two=False):
    """`check_features` of a folder of one vision tower, by its number from 0; `two`: there is another one."""
    paths, to_make, flag = {}, set(), "--video_folder_2" if number else "--video_folder"
    sources, made = Sources(features.folder, config.video_dir_path), features.cache and Sources(features.cache)
    if not report.videos and features.empty:
        report.add(
            "features missing",
            f"{flag} {shown(features.folder)} holds no feature file, and no record names a video",
        )
    for video, count in report.videos.items():
        try:
            path = features.resolve(video)
            if features.video_of(video) is None or path.exists():
                paths[video] = path
            elif failed := sources.failure(video) or (made and made.failure(video)):
                _add_failed(report, video, count, failed)
            else:
                to_make.add(video)
        except MissingFeatures as error:
            _add_missing(report, sources, video, count, error)
        except ValueError as error:
            report.add("features refused", str(error), video=video)

    def probe(video):
        """((layout, what made it, whether its video was compared), or (kind of problem, message))."""
        path = paths[video]
        try:
            if not config.quick:
                load_features(path)
            layout, header = describe_features(path)
            header = sources.header_of(features, video, path, header, config.quick)
        except (ValueError, OSError) as error:
            return None, ("features truncated" if is_cut_short(path) else "features unreadable", str(error))
        if fault := namesake(video, path, header):
            return None, ("features refused", f"{fault} (records: {report.videos[video]})")
        try:
            compared, why = sources.stale(video, path, header, config.quick)
        except OSError as error:
            return (layout, header, False), ("features stale", f"{shown(path)}: its video cannot be read ({error})")
        return (layout, header, compared), why and ("features stale", why)

    found, makers = {}, {}
    images = any(medium(video) == "image" for video in report.videos)
    with ThreadPool(READERS) as readers:
        results = readers.imap(probe, paths)
        for video, (made, problem) in zip(paths, tqdm(results, "features", len(paths), unit="file", disable=None)):
            if problem:
                report.add(*problem, video=video)
            if made is None:
                continue
            found[video], header, compared = made
            images |= "image" in header
            report.layouts[found[video]] += 1
            report.formats[paths[video].suffix] += 1
            report.not_compared += sources.given and not compared
            _note_maker(report, makers, video, header)
    report.unnamed = sources.unnamed(report.videos, images) if sources.given else None
    report.to_make |= to_make
    rows = dict.fromkeys(to_make, _rows_to_make(config, second=number > 0)) if to_make else {}
    if found:
        _check_makers(report, config, makers, "_2" if number else "")
        rows |= _usable(report, config, found, paths, number, None if two else config.num_video_tokens)
    return {video: number for video, number in rows.items() if number}


def _rows_to_make(config, *, second=False):
    """Rows of features that training will make; None where nothing tells."""
    tower = tower_to_make(config, second=True) if second else config.vision_tower
    folder = tower if second else config.model_name_or_path or tower
    if folder is None:
        return None
    try:
        image_size, patch_size = tower_geometry(folder, None if tower is None else str(tower))
    except ValueError:
        return None
    frames, pooling = frames_to_make(config, second=second), pooling_to_make(config, second=second)
    return pooling.rows(frames, (image_size // patch_size) ** 2)


def _add_missing(report, sources, video, count, error):
    """A video without features: its extraction failed, or it was never made."""
    if failed := sources.failure(video):
        _add_failed(report, video, count, failed)
        return
    lies = ""
    if sources.given:
        lies = (
            "; its video lies in --video_dir_path"
            if sources.video_of(video)
            else ("; nor does its video lie in --video_dir_path")
        )
    report.add("features missing", f"{error}{lies} (records: {count})", video=video)


def _add_failed(report, video, count, why):
    report.add("extraction failed", f"video {video!r} has no features: {why} (records: {count})", video=video)


def _note_maker(report, makers, video, header):
    made = Provenance.of_header(header)
    if made.tower_revision is not None:
        rows = OF_AN_IMAGE if is_of_an_image(header) else made.pooling
        report.makers[made.tower, made.tower_revision, made.num_frames, rows] += 1
        makers[video] = made
    report.decoders += decoders_of([header])
    report.in_fp8 += in_fp8([header])
    of = header.get("video")
    report.damaged += isinstance(of, dict) and isinstance(of.get("damaged"), int) and of["damaged"] > 0


def _usable(report, config, found, paths, number, required):
    """{video: rows} of those whose shape fits the model or the most of them."""
    ((C, _),) = Counter(channels for _, channels, _ in found.values()).most_common(1)
    if config.model_name_or_path is not None and Path(config.model_name_or_path).is_dir():
        with suppress(ValueError):  # told where its tokenizer is read
            C = feature_channels(config.model_name_or_path, second=number > 0) or C
    if required is None and config.policy.one_video_length:
        rows_of_C = Counter(rows for rows, channels, _ in found.values() if channels == C)
        required = max(rows_of_C, key=rows_of_C.__getitem__, default=None)
    usable, remedy = {}, "extract all with one tower"
    if required is not None and required == config.num_video_tokens:
        remedy += f", or leave --num_video_tokens {config.num_video_tokens} out"
    for video, (rows, channels, _) in found.items():
        if channels == C and rows == (required or rows):
            usable[video] = rows
        else:
            report.add(
                "features of another shape",
                f"video {video!r}: {paths[video]} is {rows} × {channels} instead of {required or 'any number'} "
                f"× {C}; {remedy}",
                video=video,
            )
    return usable


def _check_makers(report, config, makers, which):
    """A model reads the features of one tower: several of them are a problem, counted as files of all but the most.

    So are those of another one than ``--vision_tower``, where that is a folder; and under ``--parity reference`` those
    of another pooling than the recipe's.

    Args:
        makers: {video: Provenance of its features}, of those that tell their tower.
        which: how the flags of their tower end.
    """
    wanted, flag = getattr(config, f"vision_tower{which}"), f"--vision_tower{which}"
    towers = {}
    for video, made in makers.items():
        towers.setdefault(made.tower_revision, []).append(video)
    names = {made.tower_revision: made.tower for made in makers.values()}
    unlike = [video for video, made in makers.items() if made.pooling not in (None, RECIPE)]
    if config.policy.recipe_pooling and unlike:
        report.add_files(
            "features of another pooling",
            f"{len(unlike):,} are not of {RECIPE}, which is all that --parity reference takes: extract them with that "
            "(fastvid extract --overwrite True), or leave --parity reference out",
            unlike,
        )
    frames = [made.num_frames for made in makers.values() if made.pooling != OF_AN_IMAGE]
    told = [
        what_pooling_means(config.pooling, [made.pooling for made in makers.values()]),
        what_frames_mean(config.num_frames, frames),
    ]
    report.unlike_pooling += [line for line in told if line is not None]
    if wanted is not None and os.path.isdir(wanted):
        from fastvid.video.towers.choice import revisions

        known = revisions(wanted)
        for revision, videos in towers.items():
            if same_tower(revision, known) is False:
                report.add_files(
                    f"features of another tower than {flag}",
                    f"{len(videos):,} of {names[revision]} ({revision[:19]}…): leave {flag} {shown(wanted)} "
                    "out, or give that one",
                    videos,
                )
    most, *others = sorted(towers, key=lambda revision: -len(towers[revision])) or [None]
    for revision in others:
        report.add_files(
            "features of another vision tower",
            f"{len(towers[revision]):,} of {names[revision]} ({revision[:19]}…), {len(towers[most]):,} of "
            f"{names[most]} ({most[:19]}…): extract all with one tower (fastvid extract --overwrite True)",
            towers[revision],
        )
