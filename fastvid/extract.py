"""Videos to feature files: one file per video, one manifest line per video, and only what is missing.

Decoding runs ahead of the tower in processes of its own. Several ranks, or several runs, share the work: each begins
with its share and then takes over what others have not finished. They share nothing but the output folder, so they
need no process group, and any of them may die or join at any time.
"""

import contextlib
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass

from fastvid import signals
from fastvid.config import ExtractConfig
from fastvid.earlier_features import EarlierFeatures
from fastvid.extract_summary import Summary
from fastvid.files import remove_left_over
from fastvid.flags import parse
from fastvid.restarts import Watch, watched
from fastvid.video.dealing import Turns, deal, place
from fastvid.video.decode import DecodeError
from fastvid.video.encoder import make_current, open_device
from fastvid.video.leases import Leases
from fastvid.video.listing import find_videos
from fastvid.video.manifest import Manifest
from fastvid.video.pipeline import Prepared
from fastvid.video_features import TOWERS, VideoFeatures, default_device, why_not_written

__all__ = ["TOWERS", "EarlierFeatures", "ExtractConfig", "Leases", "Manifest", "Summary", "VideoFeatures", "extract",
           "find_videos", "main", "parse"]

_LOOK, _POLL = 1.0, 0.1  # seconds between looks at what others have written, and while there is nothing to do but wait
_GRACE = 30.0  # seconds that a decoder of this process may take to end
_SKIPS = 100  # videos that are passed over at once, before results and signals are looked at


@dataclass(frozen=True)
class _Piece:
    """One video, ready for the tower; or why nothing can be done (`failure`)."""

    source_bytes: int
    prepared: Prepared | None = None
    seconds: float = 0.0
    failure: str | None = None


def extract(config: ExtractConfig, watch: Watch | None = None) -> Summary:
    """Write the features of every video that has none yet.

    A feature file counts as done if it is whole and was made from the same file by the same tower with the same
    settings. One that is damaged, or whose video has changed, is made again; one that was made with other settings only
    with `config.overwrite`. A video that fails costs a line in the manifest. SIGINT, SIGTERM and SIGHUP end the run
    after the videos that are with the tower.

    It returns when all videos are done, by this process or by others (`config.take_over`: or when its share is).

    Args:
        watch: what the command has go on after a crash of the process (`fastvid.restarts`); default: nothing does.

    Raises:
        ValueError: no videos, an unusable tower or setting, or feature files made with other settings.
        OSError: the disk is full.
    """
    rank, world = place(config.shard)
    videos, others = find_videos(config.video_dir_path, config.clip_feat_path, f".{config.format}",
                                 follow_links=config.follow_links)
    features = VideoFeatures(config)
    features.open()
    leases, manifest = Leases(config.clip_feat_path), Manifest(config.clip_feat_path)
    watch = watch or Watch()
    watch.failed_since(manifest)
    earlier = EarlierFeatures(config, features.settings, features.shape, manifest)
    with contextlib.ExitStack() as stack:  # each is closed, whatever the closing of another raises
        for opened in (leases, manifest, features):
            stack.callback(opened.close)
        earlier.refuse_other_settings(videos)
        remove_left_over(config.clip_feat_path)
        leases.open()
        manifest.open(leases)
        summary = _Extraction(features, manifest, earlier, leases, watch).run(deal(videos, world), rank)
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

    def __init__(self, features, manifest, earlier, leases, watch):
        self.features, self.config, self.pipeline = features, features.config, features.pipeline
        self.manifest, self.earlier, self.leases, self.watch = manifest, earlier, leases, watch
        self.looked, self.among_others = time.monotonic(), False

    def run(self, shares, rank) -> Summary:
        summary = Summary(total=len(shares[rank]), max_failures=self.config.max_failures, notes=self.pipeline.notes)
        stop, decoding, finishing = [], {}, {}
        shares, start = self.watch.begin(shares, rank, summary, self.pipeline.counts)
        turns = Turns(shares, rank, self.config.take_over, self.watch.suspects)
        decoders = ThreadPoolExecutor(self.pipeline.at_a_time, thread_name_prefix="decode")
        finishers = ThreadPoolExecutor(self.pipeline.towers, thread_name_prefix="tower")
        with signals.noted(stop.append), _progress(summary) as bar:
            try:
                while not stop:
                    while self._has_room(turns, decoding, finishing) and (
                            piece := self._next(turns, stop, summary, bar)):
                        decoding[decoders.submit(self._prepare, *piece)] = piece[0]
                    if not (decoding or finishing):
                        if not turns.waits:
                            break
                        if not turns.ready:  # others have leased the rest
                            time.sleep(_POLL)
                        continue
                    passing_over = turns.ready and self._has_room(turns, decoding, finishing)
                    waited = wait([*decoding, *finishing], timeout=0 if passing_over else _POLL,
                                  return_when=FIRST_COMPLETED)
                    for future in waited.done:
                        if stop:
                            break
                        if video := decoding.pop(future, None):
                            finishing[finishers.submit(self._finish, video, future.result())] = video
                        else:
                            self._count(finishing.pop(future), *future.result(), summary, bar)
                    if late := self.pipeline.overdue():
                        self._end_now(late, decoding.values(), summary, bar)
                for future, video in finishing.items():  # they were with the tower when the signal came
                    self._count(video, *future.result(), summary, bar)
            finally:
                decoders.shutdown(wait=False, cancel_futures=True)
                until = time.monotonic() + _GRACE
                while not all(future.done() for future in decoding):
                    self.pipeline.kill()
                    if time.monotonic() > until:
                        self._end_now([], (), summary, bar, 128 + stop[0] if stop else 1)
                    time.sleep(0.01)
                finishers.shutdown(cancel_futures=True)
        summary.interrupted = stop[0] if stop else None
        summary.notes = [*summary.notes, *self.pipeline.told()]
        summary.seconds = time.perf_counter() - start
        return summary

    def _has_room(self, turns, *at_hand):
        """Whether one more can be begun. A suspect is alone.

        Beside each that is being decoded there is one that is ready; whichever is first goes on, so that none waits for
        a slow one.
        """
        names = [video.name for videos in at_hand for video in videos.values()]
        return len(names) < (1 if turns.has_first or self.watch.suspects & set(names) else self.pipeline.ahead)

    def _end_now(self, late, videos, summary, bar, code=1):
        """End the process with an exit code: a thread that waits for a GPU's decoder cannot be ended alone.

        Args:
            late: paths of videos that are past their time-out.
            videos: those that are being decoded.
        """
        if error := sys.exception():
            bar.write(f"error: {error}", file=sys.stderr)
        videos = [video for video in videos if os.fspath(video.path) in late]
        if late:
            self.watch.lost("the GPU's decoder does not answer", [video.name for video in videos])
        for video in videos:
            why = "the GPU's decoder does not answer; run it again with --decoder pyav"
            self._fail(video, why, 0.0, summary, bar)
        bar.write("the GPU's decoder does not answer, and ends with this process: "
                  + (", ".join(late) or "run it again to go on"), file=sys.stderr)
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
        """What a video's lease is called: two that would write the same file exclude each other."""
        return video.output.relative_to(self.config.clip_feat_path).as_posix()

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
            with video.file() as path, self.watch.at(video.name, "decoding"):
                prepared, failure = self.features.prepare(path, **self.watch.options(video.name)), None
        except DecodeError as error:
            prepared, failure = None, error.reason
        return _Piece(size, prepared, time.perf_counter() - start, failure)

    def _finish(self, video, piece):
        """Tower and feature file of one video, in a thread of the other pool: (piece, why not, seconds)."""
        start, failure = time.perf_counter(), piece.failure
        if failure is None:
            try:
                with self.watch.at(video.name, "in the tower"):
                    features_RC = self.features.encode(video.path, piece.prepared)
            except DecodeError as error:
                failure = error.reason
            else:
                failure = self._write(video, piece, features_RC, piece.seconds + time.perf_counter() - start)
        return piece, failure, round(piece.seconds + time.perf_counter() - start, 3)

    def _count(self, video, piece, failure, seconds, summary, bar):
        """Add one video's outcome to the summary."""
        if failure:
            self._fail(video, failure, seconds, summary, bar)
        else:
            summary.extracted += 1
            summary.padded += self._is_padded(piece)
            summary.damaged += piece.prepared.info.damaged > 0
        self.leases.release(self._named(video))
        bar.update()

    def _is_padded(self, piece):
        return piece.prepared.info.frames < self.config.num_frames

    def _fail(self, video, failure, seconds, summary, bar):
        summary.failures.append((video.name, failure))
        self.watch.settled(video.name, failure)
        self.manifest.append(video.name, "failed", reason=failure, seconds=seconds)
        bar.set_postfix(failed=len(summary.failures), refresh=False)

    def _write(self, video, piece, features_RC, seconds):
        """Write a video's feature file and its line in the manifest; the reason if it cannot be written.

        Raises:
            OSError: no other video's could be, either.
        """
        header = self.features.header(video.name, piece.source_bytes, piece.prepared)
        before = None
        if self.config.format == "pkl":  # it cannot say itself what it is, should this process die now
            def before(made):
                self.manifest.append(video.name, "writing", **made)
        try:
            made = self.features.save(video, features_RC, header, before)
            self.manifest.append(video.name, "ok", seconds=round(seconds, 3), **made)
            self.watch.settled(video.name, padded=self._is_padded(piece), damaged=piece.prepared.info.damaged > 0)
        except OSError as error:
            return why_not_written(error)
        return None


def _progress(summary):
    from tqdm import tqdm

    rank = int(os.environ.get("RANK", 0))
    return tqdm(total=summary.total, initial=summary.extracted + len(summary.failures), unit="video", desc="extract",
                disable=rank > 0, dynamic_ncols=True,
                mininterval=0.5 if sys.stderr.isatty() else 30)


def main(argv=None) -> int:
    """``fastvid extract``. Where a GPU's driver or DALI may crash it, in a process of its own (`fastvid.restarts`)."""
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


if __name__ == "__main__":
    from fastvid.cli import run

    run("extract")
