"""What an extraction does with its videos: decoders ahead of one tower, and a file for each video behind it.

Three stages overlap. Decoding has a thread for each video that is decoded at a time; the tower has one, which fills its
passes with frames of several videos; files have threads that wait for the features and write them. How many videos are
at hand is bounded, and with them the memory.
"""

from __future__ import annotations

import os
import sys
import time
from collections import Counter
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fastvid import signals
from fastvid.config.pooling import RECIPE
from fastvid.dist import host_memory
from fastvid.features.manifest import Manifest
from fastvid.files import shown
from fastvid.video.dealing import Turns
from fastvid.video.decode import DecodeError
from fastvid.video.earlier import EarlierFeatures
from fastvid.video.features import VideoFeatures, why_not_written
from fastvid.video.leases import Leases
from fastvid.video.listing import Video
from fastvid.video.passes import Features
from fastvid.video.pipeline import Pipeline, Prepared, decoded_by
from fastvid.video.restarts import Watch
from fastvid.video.summary import Summary

if TYPE_CHECKING:
    from tqdm import tqdm

_LOOK, _POLL = 1.0, 0.1  # seconds between looks at what others have written, and while there is nothing to do but wait
_GRACE = 30.0  # seconds that a decoder of this process may take to end
_SKIPS = 100  # videos that are passed over at once, before results and signals are looked at
_FILL = 1.0  # seconds that frames wait for others to fill a pass of the tower with
_WRITERS = 2  # threads that write files


@dataclass(frozen=True)
class _Piece:
    """One video, ready for the tower; or why nothing can be done (`failure`)."""

    source_bytes: int
    prepared: Prepared | None = None
    seconds: float = 0.0
    failure: str | None = None


@dataclass
class _AtHand:
    """Where the videos are that this process has begun with.

    Attributes:
        decoding, writing: {future: video}.
        computing: {future of the tower's thread: name of the video; None of a flush}.
        in_tower: those that were handed to the tower and have not come out of it, by name.
        waiting: of those whose last frames wait for others to fill a pass with: since when, by name.
    """

    decoding: dict = field(default_factory=dict)
    computing: dict = field(default_factory=dict)
    in_tower: dict = field(default_factory=dict)
    waiting: dict = field(default_factory=dict)
    writing: dict = field(default_factory=dict)

    @property
    def videos(self) -> list:
        return [*self.decoding.values(), *self.in_tower.values(), *self.writing.values()]

    @property
    def futures(self) -> list:
        return [*self.decoding, *self.computing, *self.writing]


class Extraction:
    """One rank's part of an extraction."""

    def __init__(
        self, features: VideoFeatures, manifest: Manifest, earlier: EarlierFeatures, leases: Leases, watch: Watch
    ):
        self.features, self.config = features, features.config
        self.pipeline: Pipeline | None = None  # these two: from the first video that needs them on
        self._decoders: ThreadPoolExecutor | None = None
        self.manifest, self.earlier, self.leases, self.watch = manifest, earlier, leases, watch
        self.looked, self.among_others = time.monotonic(), False

    def run(self, shares: list[list[Video]], rank: int) -> Summary:
        """Extract a share of the videos, then what others have not finished.

        Args:
            shares: as `fastvid.video.dealing.deal` gives them.
            rank: whose share is this process's.
        """
        summary = Summary(total=len(shares[rank]), max_failures=self.config.max_failures)
        stop, at_hand = [], _AtHand()
        shares, start = self.watch.begin(shares, rank, summary)
        self.began, self.before = time.perf_counter(), summary.frames
        turns = Turns(shares, rank, self.config.take_over, self.watch.suspects)
        with (
            signals.noted(stop.append),
            progress(summary) as bar,
            ThreadPoolExecutor(1, "tower") as self._tower,
            ThreadPoolExecutor(_WRITERS, "write") as self._writers,
        ):
            try:
                while not stop:
                    while self._has_room(turns, at_hand) and (piece := self._next(turns, stop, summary, bar)):
                        start += self._open(summary)
                        assert self._decoders is not None
                        at_hand.decoding[self._decoders.submit(self._prepare, *piece)] = piece[0]
                    if not at_hand.videos:
                        if not turns.waits:
                            break
                        if not turns.ready:  # others have leased the rest
                            time.sleep(_POLL)
                        continue
                    passing_over = turns.ready and self._has_room(turns, at_hand)
                    self._collect(at_hand, 0 if passing_over else _POLL, stop, summary, bar)
                    if self.pipeline is not None and (late := self.pipeline.overdue()):
                        self._end_now(late, at_hand.decoding.values(), summary, bar)
                for future in at_hand.decoding:
                    future.cancel()
                while at_hand.in_tower or at_hand.writing:  # they were with the tower when the signal came
                    self._collect(at_hand, _POLL, (), summary, bar, decoding=False)
            finally:
                if self._decoders is not None:
                    self._decoders.shutdown(wait=False, cancel_futures=True)
                until = time.monotonic() + _GRACE
                while not all(future.done() for future in at_hand.decoding):
                    if self.pipeline is not None:
                        self.pipeline.kill()
                    if time.monotonic() > until:
                        self._end_now([], (), summary, bar, 128 + stop[0] if stop else 1)
                    time.sleep(0.01)
                for stage in (self._tower, self._writers):
                    stage.shutdown(cancel_futures=True)
        summary.interrupted = stop[0] if stop else None
        if self.pipeline is not None:
            summary.notes += self.pipeline.told()
        else:  # there may have been processes before this one, whose work is told here
            before = Counter()
            self.watch.decodes(before)
            summary.notes += decoded_by(before)
        summary.seconds = time.perf_counter() - start
        return summary

    def _open(self, summary) -> float:
        """Load the tower and make the decoders, for the first video that needs them; the seconds that it took.

        Where all is done already, that need not be.
        """
        if self.pipeline is not None:
            return 0.0
        start = time.perf_counter()
        self.pipeline = self.features.open()
        if self.pipeline.encoder.device.type == "cpu":
            host_memory.keep_freed(True)
        self._decoders = ThreadPoolExecutor(self.pipeline.at_a_time, "decode")
        summary.notes += self.pipeline.notes
        self.watch.decodes(self.pipeline.counts)
        self.began = time.perf_counter()
        return self.began - start

    def _has_room(self, turns, at_hand):
        """Whether one more can be begun. A suspect is alone."""
        names = [video.name for video in at_hand.videos]
        if self.pipeline is None or turns.has_first or self.watch.suspects & set(names):
            return not names
        return len(names) < self.pipeline.ahead

    def _collect(self, at_hand, timeout, stop, summary, bar, decoding=True):
        """Wait for a stage to be done with something, and hand it on to the next one; whichever video is first goes on.

        Args:
            decoding: whether what is decoded is still of use.
        """
        futures = at_hand.futures if decoding else [*at_hand.computing, *at_hand.writing]
        for future in wait(futures, timeout, FIRST_COMPLETED).done:
            if stop:
                return
            if video := at_hand.decoding.pop(future, None):
                piece = future.result()
                if piece.failure is None:
                    at_hand.in_tower[video.name] = video
                    at_hand.computing[self._tower.submit(self._compute, video, piece)] = video.name
                else:
                    self._count(video, piece, piece.failure, piece.seconds, summary, bar)
            elif future in at_hand.computing:
                name = at_hand.computing.pop(future)
                if name in at_hand.in_tower:  # a later one, looked at first, may have taken its last frames along
                    at_hand.waiting[name] = time.monotonic()
                for features in future.result():
                    video, piece = features.key
                    del at_hand.in_tower[video.name]
                    at_hand.waiting.pop(video.name, None)
                    at_hand.writing[self._writers.submit(self._finish, video, piece, features)] = video
            else:
                piece, failure, seconds = future.result()
                self._count(at_hand.writing.pop(future), piece, failure, seconds, summary, bar)
        if at_hand.waiting and None not in at_hand.computing.values():
            others_come = at_hand.computing or (decoding and at_hand.decoding)
            if not others_come or time.monotonic() - min(at_hand.waiting.values()) > _FILL:
                at_hand.computing[self._tower.submit(self._flush, list(at_hand.waiting))] = None

    def _end_now(self, late, videos, summary, bar, code=1):
        """End the process with an exit code: a thread that waits for a GPU's decoder cannot be ended alone.

        Args:
            late: names of videos that are past their time-out.
            videos: those that are being decoded.
        """
        if error := sys.exception():
            bar.write(f"error: {error}", file=sys.stderr)
        videos = [video for video in videos if video.name in late]
        if late:
            self.watch.lost("the GPU's decoder does not answer", [video.name for video in videos])
        for video in videos:
            why = "the GPU's decoder does not answer; run it again with --decoder pyav"
            self._fail(video, why, 0.0, summary, bar)
        bar.write(
            "the GPU's decoder does not answer, and ends with this process: "
            + (", ".join(map(shown, late)) or "run it again to go on"),
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(code)

    def _next(self, turns, stop, summary, bar):
        """(video, bytes of it) of the next one that has no features yet, leased; None if there is none now.

        It is also None after `_SKIPS` videos and once there is something in `stop`.
        """
        for _ in range(_SKIPS):
            if stop or not (turn := turns.next()):
                return None
            video, own, first = turn
            if not own and not self.among_others:
                self.among_others = True
                self.earlier.look_again()
            size, redo, fault = self.earlier.judge(video)
            if first and fault is None and redo == "":
                self._skip(video, own, summary, bar)
                continue
            if not self.leases.take(self._named(video)):
                turns.defer(video, own)
                continue
            # From now on no other can do it, and the entry of one that did stays as it is.
            if not (first and self._is_done(video)) or time.monotonic() - self.looked > _LOOK:
                self.manifest.look_again()
                self.looked = time.monotonic()
            size, redo, fault = self.earlier.judge(video, fresh=True)
            if video.name in self.manifest.failed_elsewhere:
                summary.total -= own
                bar.update(own)
            elif fault is None and redo == "":
                summary.skipped += own
                bar.update(own)
            else:
                if not own:
                    summary.total, summary.taken_over = summary.total + 1, summary.taken_over + 1
                    bar.total += 1
                if fault is None:
                    if redo:
                        bar.write(f"{video.name}: extracted again: {redo}", file=sys.stderr)
                    return video, size
                self._fail(video, fault, 0.0, summary, bar)
                bar.update()
            self.leases.release(self._named(video))
        return None

    def _named(self, video):
        return video.lease(self.config.clip_feat_path)

    def _skip(self, video, own, summary, bar):
        """Pass over a video whose features were there when this began, or are another's work since."""
        if own:
            if not self._is_done(video):
                self.manifest.look_again()
            if not self._is_done(video):
                self.manifest.append(video.name, "skipped", reason=f"{video.output.name} is there already")
            summary.skipped += 1
            bar.update()

    def _is_done(self, video):
        """Whether a video's entry says that it has features."""
        return self.manifest.entries.get(video.name, {}).get("status") in ("ok", "skipped")

    def _prepare(self, video, size) -> _Piece:
        """Decode one video; runs in a thread of the pool."""
        start = time.perf_counter()
        try:
            with video.file() as path, self.watch.at("decoding", video.name):
                prepared, failure = self.features.prepare(path, name=video.name, **self.watch.options(video.name)), None
        except DecodeError as error:
            prepared, failure = None, error.reason
        return _Piece(size, prepared, time.perf_counter() - start, failure)

    def _compute(self, video, piece) -> list[Features]:
        """Hand one video to the tower, in its thread; those whose features are on their way now."""
        assert self.pipeline is not None
        with self.watch.at("in the tower", video.name, on=True):
            return self.pipeline.add((video, piece), piece.prepared)

    def _flush(self, names) -> list[Features]:
        """Have the tower compute what does not fill a pass, of videos of these names."""
        assert self.pipeline is not None
        with self.watch.at("in the tower", *names, on=True):
            return self.pipeline.flush()

    def _finish(self, video, piece, features):
        """Wait for one video's features, and write them, in a thread of the last stage: (piece, why not, seconds)."""
        try:
            with self.watch.at("in the tower", video.name):
                features_RC = self.features.finished(video.path, piece.prepared, features)
            failure = self._write(video, piece, features_RC, piece.seconds + features.seconds)
        except DecodeError as error:
            failure = error.reason
        return piece, failure, round(piece.seconds + features.seconds, 3)

    def _count(self, video, piece, failure, seconds, summary, bar):
        """Add one video's outcome to the summary."""
        if failure:
            self._fail(video, failure, seconds, summary, bar)
        else:
            summary.extracted += 1
            summary.frames += self._frames(piece)
            summary.padded += self._is_padded(piece)
            summary.damaged += piece.prepared.info.damaged > 0
        self.leases.release(self._named(video))
        rate = (summary.frames - self.before) / (time.perf_counter() - self.began)
        failed = summary.failed()
        bar.set_postfix_str(f"{rate:.0f} frames/s" + (f", failed: {failed}" if failed else ""), refresh=False)
        bar.update()

    def _frames(self, piece):
        return min(piece.prepared.info.frames, self.config.num_frames)

    def _is_padded(self, piece):
        info = piece.prepared.info
        return self.config.pooling == RECIPE and not info.still and info.frames < self.config.num_frames

    def _fail(self, video, failure, seconds, summary, bar):
        summary.fail(video.name, failure)
        self.watch.settled(video.name, failure)
        self.manifest.append(video.name, "failed", reason=failure, seconds=seconds)

    def _write(self, video, piece, features_RC, seconds):
        """Write a video's feature file and its line in the manifest; the reason if it cannot be written.

        Raises:
            OSError: no other video's could be, either.
        """
        header = self.features.header(video.name, piece.source_bytes, piece.prepared)

        def before(made):
            if self.config.format == "pkl":  # it cannot say itself what it is, should this process die now
                self.manifest.append(video.name, "writing", **made)

        try:
            made = self.features.save(video, features_RC, header, before)
            self.manifest.append(video.name, "ok", seconds=round(seconds, 3), **made)
            self.watch.settled(
                video.name,
                frames=self._frames(piece),
                padded=self._is_padded(piece),
                damaged=piece.prepared.info.damaged > 0,
            )
        except OSError as error:
            return why_not_written(error)
        return None


def progress(summary: Summary) -> tqdm:
    """A bar that counts videos."""
    from tqdm import tqdm

    rank = int(os.environ.get("RANK", 0))
    return tqdm(
        total=summary.total,
        initial=summary.extracted + len(summary.failures),
        unit="video",
        desc="extract",
        disable=rank > 0,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 30,
    )
