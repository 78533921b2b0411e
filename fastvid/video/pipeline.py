"""From video files to what the tower takes: which decoder gets which file, several at a time.

Containers are read in processes of their own (`decode.worker`). Where a GPU has a decoder of its own, it gets what it
takes to the byte, and the CPU's cores decode the rest: files of other kinds, and those that come while it is busy.
DALI's colours are others than PyAV's: it gets all that it takes, however busy it is, lest chance choose the colours.

Decoders in this process, of hardware or DALI's, are alike in what is used of them: ``name``, ``conversion``,
``patch_rows(stream, encoder)`` and ``close()``.
"""

import os
import queue
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastvid.video.decode import DecodeError, VideoInfo
from fastvid.video.decode.bitstream import Unsuited
from fastvid.video.decode.dali import DaliDecoder
from fastvid.video.decode.nvcuvid import NoDecoder, capabilities
from fastvid.video.decode.nvdec import NvDecoder
from fastvid.video.decode.worker import DecodeWorker

_MOST_WORKERS = 16
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
        notes: what a user should know, a line each.

    Raises:
        ValueError: "nvdec" or "dali" is asked for and cannot be had.
    """

    def __init__(self, encoder, *, decoder="auto", workers=None, timeout=600.0, allow_damaged=False):
        self.encoder, self.allow_damaged, self.notes = encoder, allow_damaged, []
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        count = workers or min(_MOST_WORKERS, cores)
        self._threads = max(1, cores // count)
        self._workers = [DecodeWorker(timeout) for _ in range(count)]
        self._hardware = _hardware_decoders(encoder.device, decoder, count, self.notes)
        self._same_colours = all(held.conversion == "swscale" for held, _ in self._hardware)  # as PyAV's
        self._idle, self._idle_hardware = queue.SimpleQueue(), queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        for held in self._hardware:
            self._idle_hardware.put(held)
        self.at_a_time = len(self._workers) + len(self._hardware)

    def prepare(self, path) -> Prepared:
        """Decode the frames that stand for a video. From any thread, `at_a_time` of them.

        Raises:
            DecodeError: it cannot be decoded.
        """
        options, worker = {"num_frames": self.encoder.num_temporal}, self._idle.get()
        try:
            if self._hardware:
                try:
                    stream, digest = worker.read_bitstream(path, **options)
                    if self._same_colours:
                        decoder, on_stream = self._idle_hardware.get_nowait()
                except (Unsuited, queue.Empty):
                    pass
                except DecodeError:
                    if not self.allow_damaged:
                        raise
                else:
                    self._idle.put(worker)
                    worker = None
                    if not self._same_colours:
                        decoder, on_stream = self._idle_hardware.get()
                    try:
                        return self._on_hardware(decoder, on_stream, stream, digest)
                    except (Unsuited, NoDecoder, torch.OutOfMemoryError):
                        worker = self._idle.get()
            frames, info, digest = worker.decode_and_hash(
                path, size=self.encoder.image_size, threads=self._threads, allow_damaged=self.allow_damaged, **options)
            return Prepared(frames, None, info, digest)
        finally:
            if worker is not None:
                self._idle.put(worker)

    def _on_hardware(self, decoder, on_stream, stream, digest):
        """A video by a decoder of this process, which is put back in any case; `on_stream`: None where there is no GPU.
        """
        try:
            with self._current(on_stream):
                patches_TPK = decoder.patch_rows(stream, self.encoder)
                if on_stream is not None:
                    on_stream.synchronize()
                    patches_TPK.record_stream(torch.cuda.default_stream(self.encoder.device))  # whose the tower is
        finally:
            self._idle_hardware.put((decoder, on_stream))
        info = replace(stream.info, decoder=decoder.name, conversion=decoder.conversion)
        return Prepared(None, patches_TPK, info, digest)

    @contextmanager
    def _current(self, on_stream):
        """Have a stream be the one that this thread's work is queued on."""
        if on_stream is None:
            yield
            return
        with torch.cuda.device(self.encoder.device), torch.cuda.stream(on_stream):
            yield

    def encode(self, prepared) -> torch.Tensor:
        """The features of a prepared video, as `FeatureEncoder.encode` gives them."""
        if prepared.patches is not None:
            return self.encoder.encode_patches(prepared.patches)
        return self.encoder.encode(prepared.frames)

    def kill(self):
        """End the processes, whatever they are doing: a `prepare` that waits for one in another thread fails."""
        for worker in self._workers:
            worker.kill()

    def close(self):
        """Give everything back, once no thread is in `prepare`."""
        for worker in self._workers:
            worker.close()
        for decoder, _ in self._hardware:
            decoder.close()


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
        if decoder == "nvdec":
            raise ValueError(f"--decoder nvdec needs a CUDA device, not {device.type}; auto and pyav decode anywhere")
        return []
    try:
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # a CUDA context, without which the library answers nothing
            able = capabilities("h264")
            if able is None:
                raise NoDecoder("the GPU does not decode H.264")
            count = _EACH_ENGINE * max(able.engines, 1)
            kind = DaliDecoder if decoder == "dali" else NvDecoder
            return [(kind(device), torch.cuda.Stream(device)) for _ in range(count)]
    except NoDecoder as error:
        if decoder != "auto":
            raise ValueError(f"--decoder {decoder}: {error}") from error
        notes.append(f"no hardware decoder: {error}")
        return []
