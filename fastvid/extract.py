"""Videos to feature files: one file per video, one manifest line per video, and only what is missing.

Decoding runs ahead of the tower in processes of its own. Under torchrun every rank takes its share of the videos;
ranks share nothing but the output folder, so they need no process group.
"""

import errno
import hashlib
import os
import signal
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

import fastvid
from fastvid import signals
from fastvid.config import ExtractConfig
from fastvid.data.features import feature_bytes
from fastvid.earlier_features import EarlierFeatures, settings_of, written
from fastvid.files import atomic_file, remove_left_over
from fastvid.flags import parse
from fastvid.video.decode import DecodeError
from fastvid.video.encoder import FeatureEncoder, make_current, open_device
from fastvid.video.listing import find_videos, no_video
from fastvid.video.manifest import Manifest
from fastvid.video.pipeline import Pipeline, Prepared
from fastvid.video.sampling import frame_indices

_DAMAGED = ("is damaged", "does not decode to its end")  # how the reasons begin that --allow_damaged puts up with
# A full disk costs every video that is still to come.
_NOTHING_MORE_FITS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
TOWERS = {"1.1": "openai/clip-vit-large-patch14", "1.5": "openai/clip-vit-large-patch14-336"}


@dataclass
class Summary:
    """What an extraction did (under torchrun: this rank's share).

    Attributes:
        total: videos found; extracted, skipped: how many were made, or were there already.
        padded: videos of fewer than --num_frames frames.
        damaged: videos that were taken although frames of them are missing or decode with errors.
        failures: (video, reason) of each that could not be extracted.
        notes: what a user should know of the job, a line each.
        seconds: wall time.
        interrupted: the signal that ended it early, or None.
        max_failures: the share of failures that is put up with.
    """

    total: int
    max_failures: float
    extracted: int = 0
    skipped: int = 0
    padded: int = 0
    damaged: int = 0
    notes: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + signal after an interrupt, 1 with too many failures, else 0."""
        if self.interrupted:
            return 128 + self.interrupted
        return int(len(self.failures) > self.max_failures * self.total)

    def __str__(self):
        rate = self.extracted / max(self.seconds, 1e-9)
        lines = [f"{self.extracted} extracted, {self.skipped} there already, {len(self.failures)} failed of "
                 f"{self.total} videos in {self.seconds:.1f} s ({rate:.2f} videos/s)"]
        lines += self.notes
        if self.padded:
            lines.append(f"{self.padded} of them have fewer frames than --num_frames: the rest of their temporal rows "
                         "is zero")
        if self.damaged:
            lines.append(f"{self.damaged} of them are damaged, and were taken as they are (--allow_damaged)")
        if self.exit_code == 1:
            lines.append(f"more than --max_failures {self.max_failures:g} of them failed: the exit code is 1")
        if self.interrupted:
            lines.append(f"stopped by {signal.Signals(self.interrupted).name}; run it again to go on")
        if self.failures:
            # A name of several lines, or one that would colour the terminal, is shown with its characters escaped.
            named = [(video if video.isprintable() else ascii(video), reason) for video, reason in self.failures]
            width = min(60, max(len(video) for video, _ in named))
            lines += ["failed:"] + [f"  {video:<{width}}  {reason}" for video, reason in named]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Piece:
    """One video, ready for the tower; or why nothing can be done (`failure`)."""

    source: dict
    prepared: Prepared | None = None
    seconds: float = 0.0
    failure: str | None = None


def extract(config: ExtractConfig) -> Summary:
    """Write the features of every video below a folder that has none yet.

    A feature file counts as done if it is whole and was made from the same file by the same tower with the same
    settings. One that is damaged, or whose video has changed, is made again; one that was made with other settings only
    with `config.overwrite`. A video that fails costs a line in the manifest. SIGINT, SIGTERM and SIGHUP end the run
    after the video in hand.

    Raises:
        ValueError: no videos, an unusable tower or setting, or feature files made with other settings.
        OSError: the disk is full.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    videos, others = find_videos(config.video_dir_path, config.clip_feat_path, f".{config.format}",
                                 follow_links=config.follow_links)
    encoder = FeatureEncoder(
        _tower(config), device=config.device or _default_device(),
        dtype=getattr(torch, config.dtype) if config.dtype else None, batch_size=config.infer_batch,
        num_temporal=config.num_frames)
    manifest = Manifest(config.clip_feat_path)
    earlier = EarlierFeatures(config, settings_of(config, encoder),
                              (config.num_frames + encoder.num_patches, encoder.hidden_size), manifest)
    earlier.refuse_other_settings(videos)
    remove_left_over(config.clip_feat_path)
    try:
        manifest.open()
        summary = _Extraction(config, encoder, manifest, earlier).run(videos[rank::world])
    finally:
        manifest.close()
    if rank == 0 and others:
        links = others.pop("links", 0)
        if links:
            summary.notes.append(f"{links} links were left out; --follow_links True follows them")
        kinds = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
        if others:
            summary.notes.append(f"{others.total()} files are no videos by their endings and were left out ({kinds})")
    if rank == 0 and config.llava is not None and config.vision_tower is not None:
        summary.notes.append(f"--llava {config.llava} has no effect beside --vision_tower")
    return summary


class _Extraction:
    """Decoders ahead of one tower, and a file for each video behind it."""

    def __init__(self, config, encoder, manifest, earlier):
        self.config, self.encoder, self.manifest, self.earlier = config, encoder, manifest, earlier
        self.folder, self.settings = Path(config.clip_feat_path), settings_of(config, encoder)
        tower = _tower(config)
        self.header = {"tower": os.path.abspath(tower) if os.path.isdir(tower) else tower, **self.settings,
                       "dtype": str(encoder.dtype).removeprefix("torch."), "fastvid": fastvid.__version__}
        self.pipeline = Pipeline(encoder, decoder=config.decoder, workers=config.decode_workers,
                                 timeout=config.timeout, allow_damaged=config.allow_damaged)

    def run(self, videos) -> Summary:
        summary = Summary(total=len(videos), max_failures=self.config.max_failures, notes=self.pipeline.notes)
        start, stop, decoding, finishing = time.perf_counter(), [], {}, {}
        decoders = ThreadPoolExecutor(self.pipeline.at_a_time, thread_name_prefix="decode")
        finishers = ThreadPoolExecutor(self.pipeline.towers, thread_name_prefix="tower")

        def read_ahead(count):
            decoding.update((decoders.submit(self._prepare, *piece), piece[0]) for piece in islice(todo, count))

        with signals.noted(stop.append), _progress(len(videos)) as bar:
            todo = self._to_do(videos, summary, bar)
            try:
                # One that is ready beside each that is being decoded; whichever is first goes on, so that none waits
                # for a slow one.
                read_ahead(2 * self.pipeline.at_a_time)
                while (decoding or finishing) and not stop:
                    waited = wait([*decoding, *finishing], timeout=0.1, return_when=FIRST_COMPLETED)
                    for future in waited.done:
                        if stop:
                            break
                        if video := decoding.pop(future, None):
                            finishing[finishers.submit(self._finish, video, future.result())] = video
                        else:
                            self._count(finishing.pop(future), *future.result(), summary, bar)
                            read_ahead(1)
                for future, video in finishing.items():  # in hand when the signal came
                    self._count(video, *future.result(), summary, bar)
            finally:
                decoders.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for future in decoding):
                    self.pipeline.kill()
                    time.sleep(0.01)
                finishers.shutdown(cancel_futures=True)
                self.pipeline.close()
        summary.interrupted = stop[0] if stop else None
        summary.seconds = time.perf_counter() - start
        return summary

    def _to_do(self, videos, summary, bar):
        """(video, its source, why it is made again) of those that have no features yet."""
        for video in videos:
            fault = video.fault
            if fault is None:
                try:
                    source = {"source": video.name, "source_bytes": video.path.stat().st_size}
                    redo, foreign = self.earlier.why_again(video, source["source_bytes"])
                except OSError as error:
                    fault = f"cannot be read ({error.strerror})"
                else:
                    if foreign and not self.config.overwrite:
                        fault = f"{redo}; remove it, or replace such files with --overwrite True"
            if fault is not None:
                self._fail(video, fault, 0.0, summary, bar)
            elif redo == "":
                summary.skipped += 1
                if self.manifest.entries.get(video.name, {}).get("status") not in ("ok", "skipped"):
                    self.manifest.append(video.name, "skipped", reason=f"{video.output.name} is there already")
            else:
                if redo:
                    bar.write(f"{video.name}: extracted again: {redo}", file=sys.stderr)
                yield video, source
                continue
            bar.update()

    def _prepare(self, video, source) -> _Piece:
        """Decode one video; runs in a thread of the pool."""
        start = time.perf_counter()
        try:
            prepared = self.pipeline.prepare(video.path)
        except DecodeError as error:
            return _Piece(source, failure=self._reason(video, error), seconds=time.perf_counter() - start)
        return _Piece(source | {"source_sha256": prepared.sha256}, prepared, time.perf_counter() - start)

    @staticmethod
    def _reason(video, error):
        """What is wrong with a video that cannot be decoded."""
        hint = "; --allow_damaged True takes it as it is" if error.reason.startswith(_DAMAGED) else ""
        return (no_video(video.path) if video.path.is_file() else None) or error.reason + hint

    def _finish(self, video, piece):
        """Tower and feature file of one video, in a thread of the other pool: (piece, why not, seconds)."""
        start = time.perf_counter()
        if piece.failure:
            return piece, piece.failure, round(piece.seconds, 3)
        features_RC = self.pipeline.encode(piece.prepared)
        if not features_RC.isfinite().all():
            # They are kept in float16: what is too large for that is so in whatever the tower computes in.
            dtype = self.header["dtype"]
            remedy = "give another --vision_tower" if dtype == "float32" else "try --dtype float32"
            failure = f"its features are not finite in {dtype}; {remedy}"
        else:
            failure = self._write(video, piece, features_RC, piece.seconds + time.perf_counter() - start)
        return piece, failure, round(piece.seconds + time.perf_counter() - start, 3)

    def _count(self, video, piece, failure, seconds, summary, bar):
        """What became of one video, in the summary."""
        if failure:
            self._fail(video, failure, seconds, summary, bar)
        else:
            summary.extracted += 1
            summary.padded += piece.prepared.info.frames < self.config.num_frames
            summary.damaged += piece.prepared.info.damaged > 0
        bar.update()

    def _fail(self, video, failure, seconds, summary, bar):
        summary.failures.append((video.name, failure))
        self.manifest.append(video.name, "failed", reason=failure, seconds=seconds)
        bar.set_postfix(failed=len(summary.failures), refresh=False)

    def _write(self, video, piece, features_RC, seconds):
        """A video's feature file and its line in the manifest; why it cannot be written, if that is the video's own.

        Raises:
            OSError: nothing more can be written.
        """
        chosen = {"total_frames": piece.prepared.info.frames,
                  "frame_indices": frame_indices(piece.prepared.info.frames, self.config.num_frames)}
        header = {**self.header, **piece.source, **chosen, "video": asdict(piece.prepared.info)}
        content = feature_bytes(video.output, features_RC, header)
        made = {"file": video.output.relative_to(self.folder).as_posix(), "format": self.config.format,
                "tower": self.header["tower"], **self.settings, "source_bytes": piece.source["source_bytes"],
                "sha256": hashlib.sha256(content).hexdigest()}
        try:
            video.output.parent.mkdir(parents=True, exist_ok=True)
            if self.config.format == "pkl":  # it cannot say itself what it is, should this process die now
                self.manifest.append(video.name, "writing", **made)
            with atomic_file(video.output) as file:
                file.write(content)
            self.manifest.append(video.name, "ok", frames=piece.prepared.info.frames, seconds=round(seconds, 3), **made,
                                 shape=list(features_RC.shape), written=written(video.output))
        except OSError as error:
            if error.errno in _NOTHING_MORE_FITS:
                raise
            return f"its features cannot be written ({error.strerror}: {error.filename})"
        return None


def _progress(total):
    from tqdm import tqdm

    rank = int(os.environ.get("RANK", 0))
    return tqdm(total=total, unit="video", desc="extract", disable=rank > 0, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def _tower(config):
    return config.vision_tower or TOWERS[config.llava or "1.5"]


def _default_device():
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main(argv=None) -> int:
    """``fastvid extract``."""
    config = parse(ExtractConfig, argv)
    make_current(open_device(config.device or _default_device()))
    summary = extract(config)
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    print(f"rank {os.environ.get('RANK', 0)} of {ranks}: {summary}" if ranks > 1 else summary)
    return summary.exit_code


if __name__ == "__main__":
    from fastvid.cli import run

    run("extract")
