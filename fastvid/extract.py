"""Videos to feature files: one file per video, one manifest line per video, and only what is missing.

Decoding runs ahead of the tower in processes of its own. Under torchrun every rank takes its share of the videos;
ranks share nothing but the output folder, so they need no process group.
"""

import hashlib
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

import fastvid
from fastvid.config import ExtractConfig
from fastvid.data.features import load_features, save_features
from fastvid.flags import parse
from fastvid.video.decode import DecodeError, VideoInfo
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import FeatureEncoder, make_current, open_device
from fastvid.video.listing import find_videos
from fastvid.video.manifest import Manifest
from fastvid.video.sampling import frame_indices

TOWERS = {"1.1": "openai/clip-vit-large-patch14", "1.5": "openai/clip-vit-large-patch14-336"}


@dataclass
class Summary:
    """What an extraction did (under torchrun: this rank's share).

    Attributes:
        total: videos found; extracted, skipped: how many were made, or were there already.
        failures: (video, reason) of each that could not be extracted.
        seconds: wall time.
        interrupted: the signal that ended it early, or None.
        max_failures: the share of failures that is put up with.
    """

    total: int
    max_failures: float
    extracted: int = 0
    skipped: int = 0
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
    """One video, ready for the tower; or why there is nothing to do (`skip`) or to be done (`failure`)."""

    frames: np.ndarray | None = None
    info: VideoInfo | None = None
    source: dict | None = None
    seconds: float = 0.0
    redo: str | None = None
    skip: bool = False
    failure: str | None = None


def extract(config: ExtractConfig) -> Summary:
    """Write the features of every video below a folder that has none yet.

    A feature file counts as done if it is whole and was made from the same file by the same tower with the same
    settings. A video that fails costs a line in the manifest. SIGINT and SIGTERM end the run after the video in hand.

    Raises:
        ValueError: no videos, videos whose feature files would have one name, an unusable tower or setting.
    """
    if not 0 <= config.max_failures <= 1 or config.timeout <= 0:
        raise ValueError(f"--max_failures ({config.max_failures}) must lie in [0, 1] and --timeout ({config.timeout}) "
                         "must be above 0")
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    videos = find_videos(config.video_dir_path, config.clip_feat_path, f".{config.format}")[rank::world]
    encoder = FeatureEncoder(
        config.vision_tower or TOWERS[config.llava], device=config.device or _default_device(),
        dtype=getattr(torch, config.dtype) if config.dtype else None, batch_size=config.infer_batch,
        num_temporal=config.num_frames)
    Path(config.clip_feat_path).mkdir(parents=True, exist_ok=True)
    manifest = Manifest(config.clip_feat_path)
    try:
        return _Extraction(config, encoder, manifest).run(videos)
    finally:
        manifest.close()


class _Extraction:
    """The pipeline: `workers` decoders ahead of one tower."""

    def __init__(self, config, encoder, manifest):
        self.config, self.encoder, self.manifest = config, encoder, manifest
        self.settings = {"tower_revision": encoder.revision, "image_size": encoder.image_size,
                         "patch_size": encoder.patch_size, "num_frames": config.num_frames}
        self.header = {"tower": config.vision_tower or TOWERS[config.llava], **self.settings,
                       "dtype": str(encoder.dtype).removeprefix("torch."), "fastvid": fastvid.__version__}
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        count = config.decode_workers or max(1, os.cpu_count() // 4 // processes)
        self.workers = [DecodeWorker(config.timeout) for _ in range(count)]
        self.idle = queue.SimpleQueue()
        for worker in self.workers:
            self.idle.put(worker)

    def run(self, videos) -> Summary:
        summary = Summary(total=len(videos), max_failures=self.config.max_failures)
        start, todo, ahead = time.perf_counter(), iter(videos), deque()
        pool = ThreadPoolExecutor(len(self.workers), thread_name_prefix="decode")

        def read_ahead(count):
            ahead.extend((video, pool.submit(self._prepare, video)) for video in islice(todo, count))

        with _stop_on_signal() as stop, _progress(len(videos)) as bar:
            try:
                read_ahead(len(self.workers))
                while ahead and not stop:
                    video, future = ahead[0]
                    if wait([future], timeout=0.1).done:
                        ahead.popleft()
                        read_ahead(1)
                        self._finish(video, future.result(), summary, bar)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                while not all(future.done() for _, future in ahead):
                    for worker in self.workers:
                        worker.kill()
                    time.sleep(0.01)
                for worker in self.workers:
                    worker.close()
        summary.interrupted = stop[0] if stop else None
        summary.seconds = time.perf_counter() - start
        return summary

    def _prepare(self, video) -> _Piece:
        """Runs in a thread of the pool."""
        start, worker = time.perf_counter(), self.idle.get()
        try:
            source = {"source": video.name, "source_bytes": video.path.stat().st_size}
            redo = self._why_again(video, source)
            if redo == "":
                return _Piece(skip=True)
            frames, info = worker.decode(video.path, num_frames=self.config.num_frames, size=self.encoder.image_size)
            with open(video.path, "rb") as file:
                source["source_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        except DecodeError as error:
            return _Piece(failure=error.reason, seconds=time.perf_counter() - start)
        except OSError as error:
            return _Piece(failure=f"cannot be read ({error.strerror})", seconds=time.perf_counter() - start)
        finally:
            self.idle.put(worker)
        return _Piece(frames, info, source, time.perf_counter() - start, redo)

    def _why_again(self, video, source):
        """Why an existing feature file does not do; "" if it does, None if there is none."""
        if not video.output.exists():
            return None
        try:
            features_RC, made = load_features(video.output)
        except ValueError as error:
            return str(error)
        made = made or self.manifest.entries.get(video.name, {})
        expected = {**self.settings, "source_bytes": source["source_bytes"]}
        for name, value in expected.items():
            if made.get(name) != value:
                return f"{video.output} was made with {name} {made.get(name, 'unknown')}, not {value}"
        rows = self.config.num_frames + self.encoder.num_patches
        if features_RC.shape != (rows, self.encoder.hidden_size):
            return f"{video.output} holds {list(features_RC.shape)} values"
        return ""

    def _finish(self, video, piece, summary, bar):
        """Tower, feature file, manifest line."""
        start, failure = time.perf_counter(), piece.failure
        if piece.redo:
            bar.write(f"{video.name}: extracted again: {piece.redo}", file=sys.stderr)
        if piece.frames is not None:
            features_RC = self.encoder.encode(piece.frames)
            if not features_RC.isfinite().all():
                failure = f"its features are not finite in {self.header['dtype']}; try another --dtype"
        seconds = round(piece.seconds + time.perf_counter() - start, 3)
        if piece.skip:
            summary.skipped += 1
            if self.manifest.entries.get(video.name, {}).get("status") not in ("ok", "skipped"):
                self.manifest.append(video.name, "skipped", reason=f"{video.output.name} is there already")
        elif failure:
            summary.failures.append((video.name, failure))
            self.manifest.append(video.name, "failed", reason=failure, seconds=seconds)
            bar.set_postfix(failed=len(summary.failures), refresh=False)
        else:
            video.output.parent.mkdir(parents=True, exist_ok=True)
            chosen = {"total_frames": piece.info.frames,
                      "frame_indices": frame_indices(piece.info.frames, self.config.num_frames)}
            header = {**self.header, **piece.source, **chosen, "video": asdict(piece.info)}
            save_features(video.output, features_RC, header)
            summary.extracted += 1
            self.manifest.append(video.name, "ok", frames=piece.info.frames, seconds=seconds, **self.settings,
                                 source_bytes=piece.source["source_bytes"])
        bar.update()


@contextmanager
def _stop_on_signal():
    """A list that SIGINT or SIGTERM puts itself into, once; the second one acts as ever."""
    stop, previous = [], {}

    def note(number, _frame):
        stop.append(number)
        for number, handler in previous.items():
            signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        previous.update({number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)})
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _progress(total):
    from tqdm import tqdm

    rank = int(os.environ.get("RANK", 0))
    return tqdm(total=total, unit="video", desc="extract", disable=rank > 0, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def _default_device():
    return f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"


def main(argv=None) -> int:
    """``fastvid extract``."""
    config = parse(ExtractConfig, argv)
    make_current(open_device(config.device or _default_device()))
    summary = extract(config)
    print(summary)
    return summary.exit_code


if __name__ == "__main__":
    from fastvid.cli import run

    run("extract")
