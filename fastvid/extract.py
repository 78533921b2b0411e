"""Videos to feature files: one file per video, one manifest line per video, and only what is missing.

Decoding runs ahead of the tower in processes of its own. Several ranks, or several runs, share the work: each begins
with its share and then takes over what others have not finished. They share nothing but the output folder, so they
need no process group, and any of them may die or join at any time.
"""

import contextlib
from collections.abc import Sequence

from fastvid import callable_command
from fastvid.config import ExtractConfig
from fastvid.dist import host_memory
from fastvid.features.manifest import Manifest
from fastvid.files import IMAGE_SUFFIXES, remove_left_over
from fastvid.flags import parse
from fastvid.video.dealing import deal, place
from fastvid.video.earlier import EarlierFeatures
from fastvid.video.encoder import make_current, open_device
from fastvid.video.extraction import Extraction
from fastvid.video.features import TOWERS, VideoFeatures, default_device
from fastvid.video.leases import Leases
from fastvid.video.listing import find_videos
from fastvid.video.restarts import Watch, watched
from fastvid.video.summary import Summary

__all__ = [
    "TOWERS",
    "EarlierFeatures",
    "ExtractConfig",
    "Leases",
    "Manifest",
    "Summary",
    "VideoFeatures",
    "extract",
    "find_videos",
    "main",
    "parse",
]


def extract(config: ExtractConfig, watch: Watch | None = None) -> Summary:
    """Write the features of every video that has none yet.

    A feature file counts as done if it is whole and was made from the same file by the same tower with the same
    settings. One that is damaged, or whose video has changed, is made again; one that was made with other settings only
    with `config.overwrite`. A video that fails costs a line in the manifest. SIGINT, SIGTERM and SIGHUP end the run
    after the videos that are with the tower.

    It returns when all videos are done, by this process or by others (`config.take_over`: or when its share is).

    Args:
        watch: what the command has go on after a crash of the process (`fastvid.video.restarts`); default:
            nothing does.

    Raises:
        ValueError: no videos, an unusable tower or setting, or feature files made with other settings.
        OSError: the disk is full.
    """
    rank, world = place(config.shard)
    with host_memory.collecting_later():
        videos, others = find_videos(
            config.video_dir_path,
            config.clip_feat_path,
            f".{config.format}",
            follow_links=config.follow_links,
            images=config.images,
        )
        manifest = Manifest(config.clip_feat_path)
    features = VideoFeatures(config)
    features.describe()
    leases, watch = Leases(config.clip_feat_path), watch or Watch()
    watch.failed_since(manifest)
    earlier = EarlierFeatures(config, features.settings, features.shape, manifest)
    with contextlib.ExitStack() as stack:  # each is closed, whatever the closing of another raises
        for opened in (leases, manifest, features):
            stack.callback(opened.close)
        with host_memory.collecting_later():
            earlier.refuse_other_settings(videos)
            shares = deal(videos, world)
        remove_left_over(config.clip_feat_path)
        leases.open()
        manifest.open(leases)
        summary = Extraction(features, manifest, earlier, leases, watch).run(shares, rank)
        summary.notes += features.told()
    if rank == 0 and others:
        links = others.pop("links", 0)
        if links:
            summary.notes.append(f"{links} links were left out; --follow_links True follows them")
        kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        if others:
            pictures = sum(others[ending] for ending in IMAGE_SUFFIXES)
            summary.notes.append(
                f"{others.total()} files are no videos by their endings and were left out ({kinds})"
                + "; --images True takes images" * bool(pictures)
            )
    if rank == 0 and config.llava is not None and config.vision_tower is not None:
        summary.notes.append(f"--llava {config.llava} has no effect beside --vision_tower")
    return summary


def main(argv: Sequence[str] | None = None) -> int:
    """``fastvid extract``. Where a GPU's driver or DALI may crash it, in a child (`fastvid.video.restarts`)."""
    config = parse(ExtractConfig, argv)
    watch = watched(config)
    if watch.code is not None:
        return watch.code
    make_current(open_device(config.device or default_device()))
    summary = extract(config, watch)
    rank, ranks = place(config.shard)
    print(f"rank {rank} of {ranks}: {summary}" if ranks > 1 else summary, flush=True)
    watch.done(summary.exit_code)
    return summary.exit_code


callable_command(__name__)

if __name__ == "__main__":
    from fastvid.cli import run

    run("extract")
