"""From video files to what the tower takes: which decoder gets which file, several at a time.

Containers are read in processes of their own (`decode.worker`). Where a GPU has a decoder of its own, it gets what it
takes to the byte, and the CPU's cores decode the rest: files of other kinds, and those that come while it is busy.
DALI's colours are others than PyAV's: it gets all that it takes, however busy it is.

Decoders in this process, of hardware or DALI's, are alike in what is used of them: ``name``, ``conversion``,
``patch_rows(stream, encoder)``, ``cancelled`` and ``close()``.
"""

import logging
import os
import queue
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from fastvid_kernels.patch_rows import row_length

from fastvid.files import StrPath
from fastvid.video.decode import DecodeError, VideoInfo
from fastvid.video.decode.bitstream import Unsuited
from fastvid.video.decode.dali import DaliDecoder
from fastvid.video.decode.nvcuvid import NoDecoder, capabilities
from fastvid.video.decode.nvdec import NvDecoder
from fastvid.video.decode.still import is_still
from fastvid.video.decode.worker import DecodeWorker, limit
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.passes import Features, Passes

log = logging.getLogger("fastvid")

_MOST_WORKERS = 16
_READERS = 4  # processes that read containers for the GPU's decoder, which must not wait for those that decode
_MOST_HELD = 4 * 2**30  # bytes of decoded videos that wait for the tower
_NUMBERS = re.compile(r"\b[0-9][0-9,]*\b")  # not those of a codec's name
_EACH_ENGINE = 2  # videos that share an engine of the hardware decoder: one is decoded while the other waits


@dataclass(frozen=True)
class Prepared:
    """A decoded video: its frames on the CPU, or the patch rows of them on the tower's device.

    Attributes:
        frames: [T, N, N, 3] uint8 RGB, or None.
        patches: [T, P, K] float16, or None.
        info: what the video is.
        sha256: of the file, in hexadecimal; None where it was not asked for, or the file is mostly holes.
    """

    frames: np.ndarray | None
    patches: torch.Tensor | None
    info: VideoInfo
    sha256: str | None


class Pipeline:
    """Decoders of one rank.

    Args:
        encoder: `FeatureEncoder`, whose pictures' size and device they decode for.
        decoder: "auto", "pyav", "nvdec" or "dali" (what these cannot take is still PyAV's).
        workers: processes that read containers and decode on the CPU; None: one for each core, at most 16.
        timeout: seconds after which a video is given up.
        allow_damaged: take damaged videos.

    Attributes:
        at_a_time: videos that can be decoded side by side, each by a thread that calls `prepare`.
        ahead: videos to have at hand, decoded or not: where a GPU computes, two for each decoder, and no more than
            4 GiB hold. On a CPU one for each: the tower needs the very cores that would decode meanwhile.
        towers: threads that `encode` serves at a time: on a GPU one video is copied back while another is computed.
        notes: what a user should know, a line each.
        counts: how many videos what decoded, where there was a choice.

    Raises:
        ValueError: "nvdec" or "dali" is asked for and cannot be had.
    """

    def __init__(
        self,
        encoder: FeatureEncoder,
        *,
        decoder: str = "auto",
        workers: int | None = None,
        timeout: float = 600.0,
        allow_damaged: bool = False,
    ):
        self.encoder, self.allow_damaged, self.timeout, self.notes = encoder, allow_damaged, timeout, []
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        count = workers or min(_MOST_WORKERS, cores)
        self._threads = max(1, cores // count)
        self._workers = [DecodeWorker(timeout) for _ in range(count)]
        self._hardware = _hardware_decoders(encoder.device, decoder, count, self.notes)
        self._same_colours = all(held.conversion == "swscale" for held, _ in self._hardware)  # as PyAV's
        self._readers = [DecodeWorker(timeout) for _ in range(_READERS if self._hardware else 0)]
        self._idle, self._idle_readers, self._idle_hardware = (queue.SimpleQueue() for _ in range(3))
        for worker in self._workers:
            self._idle.put(worker)
        for reader in self._readers:
            self._idle_readers.put(reader)
        for held in self._hardware:
            self._idle_hardware.put(held)
        self.at_a_time = len(self._workers) + len(self._hardware)
        self.ahead = ahead(self.at_a_time, self._piece_bytes(), encoder.device)
        self.towers, self._streams = 2 if encoder.device.type == "cuda" else 1, queue.SimpleQueue()
        for _ in range(self.towers):
            self._streams.put(self._new_stream())
        self._passes, self._stream = Passes(encoder), self._new_stream()
        if encoder.device.type == "cuda":  # other streams do not wait for the one that the tower was made on
            torch.cuda.synchronize(encoder.device)
        self.counts, self._begun, self._lock = Counter(), {}, threading.Lock()

    def _new_stream(self):
        device = self.encoder.device
        return torch.cuda.Stream(device) if device.type == "cuda" else None

    def _piece_bytes(self):
        """Bytes of a video that is decoded and waits for the tower."""
        rows = self.encoder.num_temporal * self.encoder.num_patches
        return rows * (2 * row_length(self.encoder.patch_size) if self._hardware else 3 * self.encoder.patch_size**2)

    def prepare(self, path: StrPath, *, name: str | None = None, hardware: bool = True) -> Prepared:
        """Decode the frames that stand for a video. From any thread, `at_a_time` of them.

        Args:
            name: what `overdue` calls it; default: its path.
            hardware: False: not by a decoder of this process, which the video may crash.

        Raises:
            DecodeError: it cannot be decoded.
        """
        held, digest = self._hardware_for_one() if hardware and not is_still(path) else None, None
        if not hardware and self._hardware:
            self._note("PyAV, for a crash")
        if held is not None:
            try:
                found, digest = self._by_hardware(path, name or os.fspath(path), held)
                if found is not None:
                    return found
            finally:
                self._idle_hardware.put(held)
        with _one_of(self._idle) as worker:
            frames, info, own = worker.decode_and_hash(
                path,
                size=self.encoder.image_size,
                threads=self._threads,
                allow_damaged=self.allow_damaged,
                num_frames=self.encoder.num_temporal,
                digest=digest is None,
            )
        return Prepared(frames, None, info, digest or own)

    def _hardware_for_one(self):
        """A decoder of this process and its stream; None where there is none, or all are busy and PyAV does as well."""
        if not self._hardware:
            return None
        if not self._same_colours:  # whether they are busy must not decide on the colours
            return self._idle_hardware.get()
        try:
            return self._idle_hardware.get_nowait()
        except queue.Empty:
            self._note("PyAV, as the GPU's decoder was busy")
            return None

    def _by_hardware(self, path, name, held):
        """(Prepared or None where the video is PyAV's, SHA-256 of the file or None)."""
        decoder, on_stream = held
        digest = None
        try:
            with _one_of(self._idle_readers) as reader:
                stream, digest = reader.read_bitstream(path, num_frames=self.encoder.num_temporal)
            with self._timed(name, stream.info.duration), self._current(on_stream):
                patches_TPK = decoder.patch_rows(stream, self.encoder)
                if on_stream is not None:
                    on_stream.synchronize()
        except DecodeError:
            if not self.allow_damaged:
                raise
            return None, digest
        except Unsuited as error:
            self._note(f"PyAV: {_NUMBERS.sub('n', str(error))}")
            return None, digest
        except (NoDecoder, torch.OutOfMemoryError) as error:
            self._note(f"PyAV: {str(error).splitlines()[0]}")
            log.warning("%s: %s; PyAV decodes it", name, str(error).splitlines()[0])
            return None, digest
        self._note(decoder.name)
        info = replace(stream.info, decoder=decoder.name, conversion=decoder.conversion)
        return Prepared(None, patches_TPK, info, digest), digest

    @contextmanager
    def _timed(self, name, duration):
        """Note that a video is with a decoder of this process, and until when it should be done (`overdue`)."""
        key = threading.get_ident()
        with self._lock:
            self._begun[key] = name, time.monotonic() + limit(self.timeout, duration)
        try:
            yield
        finally:
            with self._lock:
                del self._begun[key]

    def overdue(self) -> list[str]:
        """Names of videos that a decoder of this process has had for longer than the time-out: it cannot be ended
        alone."""
        with self._lock:
            return [name for name, until in self._begun.values() if time.monotonic() > until]

    def _note(self, what):
        with self._lock:
            self.counts[what] += 1

    def told(self) -> list[str]:
        """Lines on what decoded how many videos, where there was a choice, and on the tower's passes."""
        with self._lock:
            return decoded_by(self.counts) + self._passes.notes

    @contextmanager
    def _current(self, on_stream):
        """Have a stream be the one that this thread's work is queued on."""
        if on_stream is None:
            yield
            return
        with torch.cuda.device(self.encoder.device), torch.cuda.stream(on_stream):
            yield

    def add(self, key: Any, prepared: Prepared) -> list[Features]:
        """Hand a prepared video to the tower, whose passes hold frames of several. From one thread, as `flush`.

        Args:
            key: returned with the features.

        Returns:
            those videos whose features are on their way now.
        """
        with self._current(self._stream):
            return self._passes.add(key, prepared.frames, self._own(prepared), still=prepared.info.still)

    def flush(self) -> list[Features]:
        """Compute what does not fill a pass; the videos whose features are on their way now."""
        with self._current(self._stream):
            return self._passes.flush()

    def encode(self, prepared: Prepared) -> torch.Tensor:
        """The features of a prepared video alone, as `FeatureEncoder.encode` gives them. From `towers` threads."""
        on_stream = self._streams.get()
        try:
            with self._current(on_stream):
                patches_TPK = self._own(prepared)
                if patches_TPK is not None:
                    return self.encoder.encode_patches(patches_TPK)
                assert prepared.frames is not None
                return self.encoder.encode(prepared.frames, still=prepared.info.still)
        finally:
            self._streams.put(on_stream)

    def _own(self, prepared) -> torch.Tensor | None:
        """A prepared video's patch rows, if it has any, for the stream of this thread. Another's made them."""
        if prepared.patches is not None and prepared.patches.is_cuda:
            prepared.patches.record_stream(torch.cuda.current_stream(self.encoder.device))
        return prepared.patches

    def kill(self) -> None:
        """End the processes, and what decoders of this process do: a `prepare` in another thread fails."""
        for decoder, _ in self._hardware:
            decoder.cancelled = True
        for worker in (*self._workers, *self._readers):
            worker.kill()

    def close(self) -> None:
        """Give everything back, once no thread is in `prepare`."""
        for worker in (*self._workers, *self._readers):
            worker.close()
        for decoder, _ in self._hardware:
            decoder.close()


def decoded_by(counts: Counter[str]) -> list[str]:
    """A line for the summary on what decoded how many videos; none where nothing was counted."""
    counted = "; ".join(f"{what}: {count}" for what, count in counts.most_common(6))
    return [f"decoded by {counted}"] if counted else []


def ahead(at_a_time: int, piece_bytes: int, device: torch.device) -> int:
    """Videos to have at hand at a time: see `Pipeline`."""
    return at_a_time if device.type == "cpu" else max(2, min(2 * at_a_time, _MOST_HELD // piece_bytes))


@contextmanager
def _one_of(idle):
    """Something out of a queue, while it is needed."""
    taken = idle.get()
    try:
        yield taken
    finally:
        idle.put(taken)


def _hardware_decoders(device, decoder, workers, notes):
    """[(decoder of this process, CUDA stream)]: two for each engine of a GPU; none where they are not wanted.

    Without a GPU DALI decodes on the CPU, a thread for each worker. Its streams are None.
    """
    if decoder == "pyav":
        return []
    if decoder == "dali" and device.type != "cuda":
        try:
            return [(DaliDecoder("cpu"), None) for _ in range(workers)]
        except NoDecoder as error:
            raise ValueError(f"--decoder {decoder}: {error}") from error
    if device.type != "cuda":
        if decoder != "auto":
            raise ValueError(
                f"--decoder {decoder} needs a CUDA device, not {device.type}; auto and pyav decode anywhere"
            )
        return []
    try:
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # a CUDA context, without which the library answers nothing
            able = capabilities("h264")
            if able is None:
                raise NoDecoder("the GPU does not decode H.264")
            count = _EACH_ENGINE * max(able.engines, 1)
            kind = {"auto": NvDecoder, "nvdec": NvDecoder, "dali": DaliDecoder}[decoder]
            return [(kind(device), torch.cuda.Stream(device)) for _ in range(count)]
    except NoDecoder as error:
        if decoder != "auto":
            raise ValueError(f"--decoder {decoder}: {error}") from error
        notes.append(f"no hardware decoder: {error}")
        return []
