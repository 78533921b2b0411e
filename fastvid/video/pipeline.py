"""From video files to what the tower takes: which decoder gets which file, several at a time.

Containers are read in processes of their own (`decode.worker`). Where a GPU has a decoder of its own, it gets what it
takes to the byte, and the CPU's cores decode the rest: files of other kinds, and those that come while it is busy.
"""

import os
import queue
import threading
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch

from fastvid.video.decode import VideoInfo
from fastvid.video.decode.bitstream import Unsuited
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
        decoder: "auto", "pyav", or "nvdec" (what that cannot take is still PyAV's).
        workers: processes that read containers and decode on the CPU; None: one for each core, at most 16.
        timeout: seconds after which a video is given up.
        allow_damaged: take damaged videos.

    Attributes:
        at_a_time: videos that can be decoded side by side, each by a thread that calls `prepare`.
        towers: threads that may call `encode`: on a GPU one is copied back and written while another is computed.
        notes: what a user should know, a line each.

    Raises:
        ValueError: "nvdec" is asked for and cannot be had.
    """

    def __init__(self, encoder, *, decoder="auto", workers=None, timeout=600.0, allow_damaged=False):
        self.encoder, self.allow_damaged, self.notes = encoder, allow_damaged, []
        cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        count = workers or min(_MOST_WORKERS, cores)
        self._threads = max(1, cores // count)
        self._workers = [DecodeWorker(timeout) for _ in range(count)]
        self._hardware = _hardware_decoders(encoder.device, decoder, self.notes)
        self._idle, self._idle_hardware = queue.SimpleQueue(), queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        for held in self._hardware:
            self._idle_hardware.put(held)
        self.at_a_time = len(self._workers) + len(self._hardware)
        self.towers, self._of_thread = 2 if encoder.device.type == "cuda" else 1, threading.local()

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
                    decoder, on_stream = self._idle_hardware.get_nowait()
                except (Unsuited, queue.Empty):
                    pass
                else:
                    self._idle.put(worker)
                    worker = None
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
        """A video by the GPU's decoder, which is put back in any case."""
        patches_TPK = None
        try:
            with torch.cuda.device(self.encoder.device), torch.cuda.stream(on_stream):
                patches_TPK = self.encoder.empty_patch_rows(len(stream.wanted))

                def take(pictures):
                    rows_FPK = self.encoder.patch_rows([planes for _, planes in pictures], stream.factors)
                    for (places, _), row_PK in zip(pictures, rows_FPK):
                        for place in places:
                            patches_TPK[place].copy_(row_PK)

                decoder.decode(stream, take)
                on_stream.synchronize()
        finally:
            self._idle_hardware.put((decoder, on_stream))
        return Prepared(None, patches_TPK, replace(stream.info, decoder=decoder.name), digest)

    def encode(self, prepared) -> torch.Tensor:
        """The features of a prepared video, as `FeatureEncoder.encode` gives them. From `towers` threads."""
        with self._stream_of_thread():
            if prepared.patches is None:
                return self.encoder.encode(prepared.frames)
            prepared.patches.record_stream(torch.cuda.current_stream(self.encoder.device))
            return self.encoder.encode_patches(prepared.patches)

    def _stream_of_thread(self):
        """Make a CUDA stream of its own the thread's current one."""
        if self.encoder.device.type != "cuda":
            return nullcontext()
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(self.encoder.device)
        return torch.cuda.stream(self._of_thread.stream)

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


def _hardware_decoders(device, decoder, notes):
    """[(NvDecoder, CUDA stream)] of a GPU: two for each engine; none where it has none, or they are not wanted."""
    if decoder == "pyav":
        return []
    if device.type != "cuda":
        if decoder == "nvdec":
            raise ValueError(f"--decoder nvdec needs a CUDA device, not {device.type}; auto and pyav decode anywhere")
        return []
    try:
        with torch.cuda.device(device):
            torch.empty(1, device=device)  # a CUDA context, without which the library answers nothing
            able = capabilities("h264")
            count = _EACH_ENGINE * max(able.engines, 1) if able else 0
            return [(NvDecoder(device), torch.cuda.Stream(device)) for _ in range(count)]
    except NoDecoder as error:
        if decoder == "nvdec":
            raise ValueError(f"--decoder nvdec: {error}") from error
        notes.append(f"no hardware decoder: {error}")
        return []
