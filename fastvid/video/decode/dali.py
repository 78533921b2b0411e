"""Frames through NVIDIA DALI: the decoder of a GPU, or FFmpeg on a CPU for the few codecs that DALI takes there.

The colours are DALI's own: always BT.601, whatever the video says, and chroma between samples is interpolated. They
are not PyAV's, so features made of them do not go together with others (`conversion`).

DALI's own reading of files has traps: it counts packets rather than frames, and leaves out or confuses frames by their
times. So it gets a file made for it: the packets that are needed, with times that count up. It reports no damage
beyond what FFmpeg or its parser refuses; containers and first frames are looked at before (`read_bitstream`).
"""

from __future__ import annotations

import io
import threading
from contextlib import ExitStack
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fastvid.video.decode import nvcuvid
from fastvid.video.decode.bitstream import Bitstream, Unsuited
from fastvid.video.decode.nvcuvid import NoDecoder

if TYPE_CHECKING:
    from fastvid.video.encoder import FeatureEncoder

ON_CPU = ("vp8", "vp9", "mjpeg")  # codecs that DALI decodes on a CPU
_START_CODES = ("h264", "hevc")  # codecs whose parameter sets a container wants apart
_INTERVAL = 40  # milliseconds between frames: Matroska counts in milliseconds
_ALIGNED = (8, 16, 32, 64)  # pixels that a coded picture's sides may be multiples of


class DaliDecoder:
    """Decodes one video after another, in one thread, in a pipeline of its own: an error costs one pipeline.

    Args:
        device: torch device. A CUDA device decodes on its hardware; for any other, the CPU decodes.

    Attributes:
        conversion: "dali", what turned samples into RGB.
        cancelled: set from another thread, it makes every later video `Unsuited`; one that is decoded is not ended.

    Raises:
        NoDecoder: DALI is not installed, or cannot be loaded.
    """

    conversion = "dali"

    def __init__(self, device: str | torch.device):
        self.device = torch.device(device)
        self._on_gpu = self.device.type == "cuda"
        self.name, self._pipeline = f"dali {_dali().__version__}", None
        self.cancelled = False
        self._context = nvcuvid.context_of(self.device)

    def takes(self, codec: str, width: int, height: int) -> bool:
        """Whether pictures of a codec, by FFmpeg's name, and of a size are decoded."""
        return nvcuvid.takes(codec, width, height) if self._on_gpu else codec in ON_CPU

    def decode(self, stream: Bitstream) -> torch.Tensor:
        """The wanted frames [T, H, W, 3] of a video, uint8 RGB, upright, on the device that decodes.

        On a GPU they are there on the current stream.

        Raises:
            Unsuited: DALI does not take it, or fails on it.
        """
        if self.cancelled:
            raise Unsuited("decoding was cancelled")
        width, height = stream.stored_size
        nvcuvid.use_context(self._context)
        if not self.takes(stream.codec, width, height):
            raise Unsuited(f"DALI does not decode {stream.codec} of {width}×{height} here")
        if (stream.numbers < 0).any():
            raise Unsuited("some of its packets are not shown, and DALI would count them")
        if self._on_gpu:
            _seen.enter(stream)
        places = np.searchsorted(np.sort(stream.numbers), stream.wanted)
        once, which = np.unique(places, return_inverse=True)
        frames = self._run(as_matroska(stream), once.astype(np.int32))
        if frames.shape != (len(once), height, width, 3):
            raise Unsuited(f"DALI gives {list(frames.shape)} values for {len(once)} frames of {width}×{height}")
        if not np.array_equal(which, np.arange(len(once))):  # repeated, or in another order
            found = frames
            frames = found[torch.from_numpy(which).to(found.device)]
            if self._on_gpu:  # the memory of those found is DALI's, which takes it back when they are dropped
                torch.cuda.current_stream(self.device).synchronize()
        return stream.turn.upright(frames, 1)

    def patch_rows(self, stream: Bitstream, encoder: FeatureEncoder) -> torch.Tensor:
        """The patch rows [T, P, K] of a video's wanted frames, as `decode` gives them: see `FeatureEncoder`."""
        frames = self.decode(stream)
        rows_TPK = encoder.frame_rows(frames)
        if self._on_gpu:  # the memory of the frames is DALI's, which takes it back when they are dropped
            torch.cuda.current_stream(self.device).synchronize()
        return rows_TPK

    def close(self) -> None:
        """Give the pipeline back. The next video makes another."""
        self._pipeline = None

    def _run(self, data, places):
        """Frames at some places of a file in memory."""
        pipeline, self._pipeline = self._pipeline, None  # one that fails is not used again
        stream = torch.cuda.current_stream(self.device).cuda_stream if self._on_gpu else None
        try:
            pipeline = pipeline or self._built()
            (found,) = pipeline.run(stream, data=[np.frombuffer(data, np.uint8)], frames=[places])
            frames = torch.from_dlpack(found[0])
        except Exception as error:  # DALI raises many kinds; PyAV then decodes the video, or refuses it
            raise Unsuited(f"DALI fails: {_reason(error)}") from error
        self._pipeline = pipeline
        return frames

    def _built(self) -> Any:
        dali = _dali()
        fn, types = dali.fn, dali.types
        device_id = (self.device.index or 0) if self._on_gpu else None

        @dali.pipeline_def(batch_size=1, num_threads=1, device_id=device_id, exec_dynamic=True, prefetch_queue_depth=1)
        def decoding():
            data = fn.external_source(name="data", dtype=types.UINT8, ndim=1, device="cpu")
            frames = fn.external_source(name="frames", dtype=types.INT32, ndim=1, device="cpu")
            # Without pad_mode="none", frames that are not there would be black.
            return fn.decoders.video(
                data, frames=frames, device="mixed" if self._on_gpu else "cpu", pad_mode="none", affine=False
            )

        pipeline = decoding()
        pipeline.build()
        return pipeline


class SizesSeen:
    """Keeps videos from DALI that its cache of hardware decoders would confuse with others, process by process.

    DALI 2.4 looks for a decoder by a video's coded size, and finds those that it stored by the size shown. So one of
    1280×534, which is coded as 1280×544, gets a decoder that shows 1280×544, and its picture is cropped wrongly.
    """

    def __init__(self):
        self._shown, self._lock = set(), threading.Lock()

    def enter(self, stream: Bitstream) -> None:
        """Note a video's size, or raise Unsuited."""
        shown = stream.stored_size
        coded = {tuple(-(-side // unit) * unit for side in shown) for unit in _ALIGNED} | {stream.coded_size or shown}
        with self._lock:
            if confused := (coded - {shown}) & self._shown:
                raise Unsuited("DALI would take a decoder for pictures of {}×{} for it".format(*min(confused)))
            self._shown.add(shown)


_seen = SizesSeen()


def as_matroska(stream: Bitstream) -> bytes:
    """A Matroska file of a bitstream's packets. Its frames follow each other at one interval, without gaps.

    Raises:
        Unsuited: FFmpeg does not write one of them.
    """
    import av

    try:
        return _written(stream)
    except av.FFmpegError as error:
        raise Unsuited(f"its packets cannot be written to a file ({error.strerror})") from error


def _written(stream):
    import av

    places = np.searchsorted(np.sort(stream.numbers), stream.numbers).tolist()
    file = io.BytesIO()
    with ExitStack() as opened:
        target = opened.enter_context(av.open(file, "w", format="matroska"))
        if stream.codec in _START_CODES:
            # FFmpeg finds the parameter sets in the first packet, and makes the container's form of them and of units.
            first = io.BytesIO(next(stream.packets())[0])
            template = opened.enter_context(av.open(first, format=stream.codec)).streams.video[0]
            if not template.codec_context.extradata:
                raise Unsuited("its first packet has no parameter sets")
            track = target.add_stream_from_template(template)
        else:
            width, height = stream.stored_size
            track = target.add_mux_stream(stream.codec, rate=Fraction(1000, _INTERVAL), width=width, height=height)
        track.time_base = Fraction(1, 1000)
        for number, ((data, _), place) in enumerate(zip(stream.packets(), places)):
            packet = av.Packet(bytes(data))
            packet.stream, packet.time_base = track, track.time_base
            packet.pts = _INTERVAL * place
            packet.dts = _INTERVAL * (number - len(places))  # rises, and comes before any frame is shown
            packet.is_keyframe = number == 0 or stream.codec == "mjpeg"  # nothing seeks among the others
            target.mux(packet)
    return file.getvalue()


def _dali() -> Any:
    """The package, whose stubs lack most of what is used of it.

    Raises:
        NoDecoder: it is not there.
    """
    try:
        import nvidia.dali
    except ImportError as error:
        raise NoDecoder(f"DALI cannot be loaded ({error}); pip install -c constraints.txt '.[gpu]'") from error
    return nvidia.dali


def _reason(error) -> str:
    """What DALI complains of, in a line: its messages begin with which operator of which pipeline it was."""
    text = str(error).rpartition("encountered:\n")[2].strip()
    return text.splitlines()[0] if text else type(error).__name__


__all__ = ["ON_CPU", "DaliDecoder", "as_matroska"]
