"""Features of what requests are about: made once, by several processes that decode and one tower, and kept for a while.

Dimensions: R rows of a video, C channels, T frames.
"""

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from fastvid.batch import Features, by_tower
from fastvid.config import ServeConfig
from fastvid.features.names import SUFFIXES
from fastvid.inference.source import VideoSource, looks
from fastvid.serving.errors import ApiError
from fastvid.serving.media import MediaFile
from fastvid.serving.metrics import Metrics
from fastvid.video.decode import DecodeError, VideoInfo
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.listing import no_video
from fastvid.video.sampling import frame_indices

_VERBS = ("cannot", "does", "has", "holds", "is", "lasts")  # with which reasons begin that are the rest of a sentence


@dataclass(frozen=True)
class Look:
    """A video, decoded: what a page shows of it.

    Attributes:
        key: its name in the cache.
        frames: [T, N, N, 3] uint8 RGB.
        numbers, seconds: of each frame.
        info: `VideoInfo`.
        features_RC: its features.
    """

    key: str
    frames: np.ndarray
    numbers: list[int]
    seconds: list[float]
    info: VideoInfo
    features_RC: Features


class FeatureStore:
    """Features by content. Of one event loop.

    Args:
        source: whose tower makes them.
        config: its limits.
        metrics: which count.
        workers: processes that decode.
    """

    def __init__(self, source: VideoSource, config: ServeConfig, metrics: Metrics, workers: int):
        self._source, self._config, self._metrics = source, config, metrics
        self._looks, self._budget = looks(source.loaded_encoders()), config.feature_cache_mib << 20
        self._kept: OrderedDict[str, Features] = OrderedDict()
        self._jobs: dict[str, _Job] = {}
        self._workers = [DecodeWorker(config.decode_timeout) for _ in range(workers)]
        self._idle: asyncio.Queue[DecodeWorker] = asyncio.Queue()
        for worker in self._workers:
            self._idle.put_nowait(worker)
        self._threads = ThreadPoolExecutor(workers, "decode")
        self._tower = ThreadPoolExecutor(1, "tower")
        self.bytes = 0

    def known(self, key: str) -> Features | None:
        """The features of a key, if they are kept."""
        features_RC = self._kept.get(key)
        if features_RC is not None:
            self._kept.move_to_end(key)
        return features_RC

    async def of(self, key: str, files: list[MediaFile], pictures: bool) -> Features:
        """[R, C] features of a video, or of pictures, each a frame. Files that were made for this are removed.

        Several who ask for the same at a time wait for one job. It is given up when all of them are.

        Raises:
            ApiError: 400, what cannot be decoded.
        """
        features_RC, job = self.known(key), self._jobs.get(key)
        self._metrics.cache.labels("yes" if features_RC is not None or job is not None else "no").inc()
        if features_RC is not None or job is not None:
            _remove(files)
        if features_RC is not None:
            return features_RC
        if job is None:
            job = self._jobs[key] = _Job(asyncio.create_task(self._make(key, files, pictures)))
            job.task.add_done_callback(lambda _, job=job: self._forget(key, job))
        job.waiters += 1
        try:
            return await asyncio.shield(job.task)
        finally:
            job.waiters -= 1
            if not job.waiters and not job.task.done():
                self._forget(key, job)
                job.task.cancel()

    def _forget(self, key, job):
        """Nobody else waits for a job. While one that was given up ends, another may make the same."""
        if self._jobs.get(key) is job:
            del self._jobs[key]

    async def look(self, file: MediaFile) -> Look:
        """Decode a video to be shown, and keep its features. The file is removed, if it was made for this.

        Raises:
            ApiError: 400, what cannot be decoded.
        """
        try:
            async with self._worker() as worker:
                frames, info = await self._in_worker(worker, self._decode, worker, file)
                numbers = frame_indices(info.frames, self._source.num_frames)
                seconds = await self._in_worker(worker, worker.frame_times, file.path, numbers, info)
        except DecodeError as error:
            raise _told(error, file) from error
        finally:
            file.remove()
        key = video_key([file])
        features_RC = self.known(key)
        if features_RC is None:
            features_RC = await self._encoded(frames)
            self._keep(key, features_RC)
        return Look(key, frames[self._looks[0]], numbers, seconds, info, features_RC)

    async def _make(self, key, files, pictures):
        started = perf_counter()
        try:
            if files[0].path.suffix in SUFFIXES and not files[0].ours and not pictures:
                features_RC = await self._in_thread(self._threads, self._loaded, files[0])
            else:
                async with self._worker() as worker:
                    decode = self._pictures if pictures else self._decode
                    frames = await self._in_worker(worker, decode, worker, files if pictures else files[0])
                features_RC = await self._encoded(frames if pictures else frames[0])
        except DecodeError as error:
            raise _told(error, next((file for file in files if str(file.path) == error.path), files[0])) from error
        except (ValueError, OSError) as error:
            told = _reason(error).replace(str(files[0].path), files[0].path.name)  # where links lead is nobody's matter
            raise ApiError(400, f"{files[0].path.name}: its features cannot be used; {told}") from error
        finally:
            _remove(files)
        self._metrics.video_seconds.observe(perf_counter() - started)
        self._keep(key, features_RC)
        return features_RC

    async def _encoded(self, frames):
        features_RC = await self._in_thread(self._tower, self._source.encode, frames)
        if not all(each.isfinite().all() for each in by_tower(features_RC)):
            raise ApiError(400, "the video's features are not finite: it is not one that the tower can see")
        return features_RC

    def _keep(self, key, features_RC):
        size = _bytes(features_RC)
        if size > self._budget or key in self._kept:
            return
        self._kept[key] = features_RC
        self.bytes += size
        while self.bytes > self._budget:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])

    @asynccontextmanager
    async def _worker(self):
        worker = await self._idle.get()
        try:
            yield worker
        finally:
            self._idle.put_nowait(worker)

    def _decode(self, worker, file):
        if (why := no_video(file.path)) is not None:
            raise DecodeError(file.path, why)
        config, frames, info = self._config, {}, None
        for num_frames, size in self._looks:
            frames[num_frames, size], info = worker.decode(
                file.path,
                num_frames=num_frames,
                size=size,
                max_pixels=config.max_pixels,
                max_frames=config.max_frames,
                max_seconds=config.max_seconds,
            )
        file.check_unchanged()
        return frames, info

    def _pictures(self, worker, files):
        paths, most = [file.path for file in files], self._config.max_pixels
        frames = {look: worker.pictures(paths, size=look[1], max_pixels=most) for look in self._looks}
        for file in files:
            file.check_unchanged()
        return frames

    def _loaded(self, file):
        if len(self._source.towers) > 1:
            raise ValueError("the model takes those of two vision towers; send the video instead")
        features_RC = self._source.features(file.path)
        file.check_unchanged()
        return features_RC

    async def _in_worker(self, worker, function, *arguments):
        """Call what waits for a process that decodes. If nobody waits for the result any more, the process is ended."""
        return await self._in_thread(self._threads, function, *arguments, if_given_up=worker.kill)

    async def _in_thread(self, threads, function, *arguments, if_given_up: Callable[[], None] | None = None):
        future = asyncio.get_running_loop().run_in_executor(threads, function, *arguments)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            if if_given_up is not None and not future.done():
                if_given_up()
            await asyncio.wait([future])
            if not future.cancelled():
                future.exception()
            raise

    async def close(self) -> None:
        """Give up what is being made, and end the processes."""
        for job in list(self._jobs.values()):
            job.task.cancel()
        await asyncio.gather(*(job.task for job in self._jobs.values()), return_exceptions=True)
        for threads in (self._threads, self._tower):
            threads.shutdown()
        for worker in self._workers:
            worker.close()


@dataclass(eq=False)
class _Job:
    """Features that are being made, and how many wait for them."""

    task: asyncio.Task[Features]
    waiters: int = 0


def video_key(files: list[MediaFile], pictures: bool = False) -> str:
    """The name of some content in the cache."""
    if not pictures:
        return f"sha256:{files[0].digest}"
    return "pictures:" + hashlib.sha256(" ".join(file.digest for file in files).encode()).hexdigest()


def _bytes(features):
    return sum(each.nbytes for each in by_tower(features))


def _remove(files: Iterable[MediaFile]):
    for file in files:
        file.remove()


def _told(error, file):
    """A file that cannot be decoded, without the path of what was made here."""
    name = "the file" if file.ours else file.path.name
    says = error.reason.partition(" ")[0] in _VERBS
    return ApiError(400, f"{name} {error.reason}" if says else f"{name}: {error.reason}")


def _reason(error):
    return str(error.strerror) if isinstance(error, OSError) else str(error)
