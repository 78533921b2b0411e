"""Frames' raw planes through NVDEC, the video decoder of an NVIDIA GPU.

H.264 and HEVC define to the bit what a decoder gives, so the planes are FFmpeg's own. Nothing is copied: a picture is
handed on where the decoder put it, and given back when the GPU has read it. Pictures that nobody wants are decoded, as
others refer to them, and never mapped.

The hardware tells the status of every picture of these two codecs, and of no others. One that decodes with errors, or
does not come, makes the video `Unsuited`: PyAV then decodes it, or refuses it. So does one that is interlaced, or
changes its size. Not every damage is noticed: some wrong bits decode to a wrong picture without an error.
"""

from __future__ import annotations

import ctypes
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from fastvid.video.decode import nvcuvid
from fastvid.video.decode.bitstream import Bitstream, Unsuited
from fastvid.video.decode.nvcuvid import NoDecoder, check

if TYPE_CHECKING:
    from fastvid.video.encoder import FeatureEncoder

_TOGETHER = 4  # pictures that are handed on in one piece; as many again are decoded meanwhile
_AHEAD = 4  # surfaces beyond those that the video needs, so that decoding goes on while pictures are shown
_DELAY = 0  # frames that the parser holds back beyond what display order asks for
CODECS = "h264", "hevc"  # that the hardware tells the status of (cuvidGetDecodeStatus)
_WAITS = 2000  # milliseconds for the status of a picture

Planes = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # Y, U, V of a picture, uint8
Piece = tuple[list[int], Planes]  # a picture, and its places among the wanted ones


class NvDecoder:
    """Decodes one video after another, from any one thread at a time. The hardware decoder is kept for the next video.

    Args:
        device: torch device. Its GPU decodes; with "cpu" the library must be one that gives host addresses.
        lib: the library, for tests; default: the driver's.

    Attributes:
        conversion: "swscale", PyAV's: the planes become its bytes.
        cancelled: set from another thread, it ends the video that is being decoded, and every later one, as `Unsuited`.

    Raises:
        NoDecoder: the driver's library is missing.
    """

    conversion = "swscale"

    def __init__(self, device: str | torch.device, lib: ctypes.CDLL | None = None):
        self.device, self.lib = torch.device(device), lib or nvcuvid.library()
        self._decoder = self._created = None
        self.cancelled = False
        self._context = nvcuvid.context_of(self.device)
        self._callbacks = (
            nvcuvid.Sequence(self._guarded(self._begin_sequence)),
            nvcuvid.Decode(self._guarded(self._decode_picture)),
            nvcuvid.Display(self._guarded(self._show)),
        )
        self.name = "nvdec" + (f", CUDA {torch.version.cuda}" if torch.version.cuda else "")

    def takes(self, codec: str, width: int, height: int) -> bool:
        """Whether the hardware decodes 8-bit 4:2:0 pictures of a codec, by FFmpeg's name, and of a size."""
        return codec in CODECS and nvcuvid.takes(codec, width, height, self.lib)

    def decode(self, stream: Bitstream, take: Callable[[list[Piece]], object]) -> None:
        """Hand the wanted frames of a video to `take`, in display order.

        Args:
            stream: its packets.
            take: called with [(places among `stream.wanted`, (Y, U, V))]: uint8 planes of any strides, upright, on the
                device. They are there on the current stream, and only until what `take` has queued on it is done.

        Raises:
            Unsuited: the hardware does not take it, or not all of it decodes without errors.
            NoDecoder: the driver refuses.
        """
        nvcuvid.use_context(self._context)
        if not self.takes(stream.codec, *stream.stored_size):
            raise Unsuited(f"the GPU does not decode {stream.codec} of {stream.stored_size[0]}×{stream.stored_size[1]}")
        self._stream, self._take, self._error = stream, take, None
        self._places, self._came, self._area = {}, 0, None
        for place, number in enumerate(stream.wanted):
            self._places.setdefault(number, []).append(place)
        self._last = stream.info.frames - 1
        self._decoded, self._mapped, self._read = set(), [], deque()
        try:
            self._feed()
            self._hand_on()
            self._give_back(0)
            for surface in self._decoded:
                self._refuse_broken(surface)
            expected = int((stream.numbers >= 0).sum())
            if self._came != expected or self._places:
                raise Unsuited(f"{self._came} of {expected} frames came from the GPU's decoder")
        except BaseException:
            self.close()  # it may be in the middle of a picture
            raise
        finally:
            del self._stream, self._take  # they hold the packets, and what is made of them

    def patch_rows(self, stream: Bitstream, encoder: FeatureEncoder) -> torch.Tensor:
        """The patch rows [T, P, K] of a video's wanted frames: see `FeatureEncoder`. Raises as `decode`."""
        rows_TPK = encoder.empty_patch_rows(len(stream.wanted))

        def take(pictures):
            made_FPK = encoder.patch_rows([planes for _, planes in pictures], stream.factors)
            for (places, _), made_PK in zip(pictures, made_FPK):
                for place in places:
                    rows_TPK[place].copy_(made_PK)

        self.decode(stream, take)
        return rows_TPK

    def close(self) -> None:
        """Give the hardware decoder back. The next video makes another."""
        self._mapped, self._read = [], deque()
        if self._decoder is not None:
            nvcuvid.use_context(self._context)
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            self.lib.cuvidDestroyDecoder(self._decoder)
            self._decoder = self._created = None

    def _feed(self):
        """Send all packets through a parser, which calls back."""
        parser = ctypes.c_void_p()
        about = nvcuvid.ParserParameters(
            codec=nvcuvid.CODECS[self._stream.codec],
            surfaces=1,
            display_delay=_DELAY,
            sequence=self._callbacks[0],
            decode=self._callbacks[1],
            display=self._callbacks[2],
        )
        check(self.lib.cuvidCreateVideoParser(ctypes.byref(parser), ctypes.byref(about)), "making a parser")
        try:
            base = ctypes.cast(ctypes.c_char_p(self._stream.data), ctypes.c_void_p).value or 0
            start = 0
            for end, number in zip(self._stream.ends.tolist(), self._stream.numbers.tolist()):
                if self.cancelled:
                    raise Unsuited("decoding was cancelled")
                self._parse(parser, nvcuvid.SourcePacket(nvcuvid.TIMESTAMP, end - start, base + start, number))
                start = end
            self._parse(parser, nvcuvid.SourcePacket(nvcuvid.END_OF_STREAM, 0, None, 0))
        finally:
            self.lib.cuvidDestroyVideoParser(parser)

    def _parse(self, parser, packet):
        failed = self.lib.cuvidParseVideoData(parser, ctypes.byref(packet))
        if self._error is not None:
            raise self._error
        if failed:
            raise Unsuited(f"the GPU's parser refuses a packet (CUDA error {failed})")

    def _guarded(self, call):
        """A callback that keeps its exception, which ctypes would print and forget."""

        def called(_, about):
            try:
                return call(about) if about and self._error is None else 0
            except BaseException as error:  # raised again by _parse
                self._error = error
                return 0

        return called

    def _begin_sequence(self, about):
        """The parser has read what a sequence of pictures is like."""
        form, (width, height) = about.contents, self._stream.stored_size
        area = form.display_area
        if form.depth_minus_8 or form.chroma_depth_minus_8 or form.chroma != nvcuvid.YUV_420:
            raise Unsuited("its pictures are not 4:2:0 of 8 bits")
        if not form.progressive_sequence:
            raise Unsuited("it is interlaced")
        if (area.right - area.left, area.bottom - area.top) != (width, height) or area.left % 2 or area.top % 2:
            raise Unsuited(f"the GPU's parser finds pictures of {area.right - area.left}×{area.bottom - area.top}")
        place = area.left, area.top, form.coded_width, form.coded_height
        if self._area not in (None, place):
            raise Unsuited("its pictures change their size")
        if self._area is None:
            self._area = place
            self._make_decoder(form, form.surfaces + _AHEAD)
        return form.surfaces + _AHEAD

    def _make_decoder(self, form, surfaces):
        """A hardware decoder for pictures of this form: the one at hand, set anew if need be, or another."""
        width, height, codec = form.coded_width, form.coded_height, form.codec
        whole = nvcuvid.Rectangle(0, 0, width, height)
        if (
            self._created
            and self._created[0] == codec
            and (width <= self._created[1] and height <= self._created[2] and surfaces <= self._created[3])
        ):
            if (width, height) != self._size:
                check(
                    self.lib.cuvidReconfigureDecoder(
                        self._decoder,
                        ctypes.byref(
                            nvcuvid.ReconfigureInfo(
                                width=width,
                                height=height,
                                target_width=width,
                                target_height=height,
                                surfaces=self._created[3],
                                display_area=whole,
                            )
                        ),
                    ),
                    "setting the decoder to another size",
                )
        else:
            most = (width, height, surfaces)
            if self._created and self._created[0] == codec:
                most = tuple(map(max, most, self._created[1:]))
            self.close()
            decoder = ctypes.c_void_p()
            check(
                self.lib.cuvidCreateDecoder(
                    ctypes.byref(decoder),
                    ctypes.byref(
                        nvcuvid.CreateInfo(
                            width=width,
                            height=height,
                            surfaces=most[2],
                            codec=codec,
                            chroma=nvcuvid.YUV_420,
                            max_width=most[0],
                            max_height=most[1],
                            display_area=whole,
                            format=nvcuvid.NV12,
                            deinterlace=nvcuvid.WEAVE,
                            target_width=width,
                            target_height=height,
                            output_surfaces=2 * _TOGETHER,
                        )
                    ),
                ),
                "making a hardware decoder",
            )
            self._decoder, self._created = decoder, (codec, *most)
        self._size = width, height

    def _decode_picture(self, about):
        """A picture is complete: let the hardware decode it."""
        picture = about.contents
        if picture.is_field:
            raise Unsuited("it is interlaced")
        if picture.surface in self._decoded:
            self._refuse_broken(picture.surface)
        check(self.lib.cuvidDecodePicture(self._decoder, about), "decoding a picture")
        self._decoded.add(picture.surface)
        return 1

    def _refuse_broken(self, surface):
        """Raise Unsuited if the picture in a surface is not right. Waits until it is decoded."""
        found = nvcuvid.DecodeStatus()
        for _ in range(_WAITS):
            failed = self.lib.cuvidGetDecodeStatus(self._decoder, surface, ctypes.byref(found))
            if failed or found.status != nvcuvid.IN_PROGRESS:
                break
            time.sleep(1e-3)
        if failed or found.status != nvcuvid.SUCCESS:
            raise Unsuited(f"a picture {nvcuvid.BROKEN.get(found.status, 'has no status')}")

    def _show(self, about):
        """It is a picture's turn to be shown."""
        shown = about.contents
        if not shown.progressive:
            raise Unsuited("it is interlaced")
        number = shown.timestamp
        if number >= 0:
            self._came += 1
            places = self._places.pop(number, None)
            if places or number == self._last:
                self._map(shown.surface, places)
        return 1

    def _map(self, surface, places):
        """Wait for a picture, and keep it if it is wanted."""
        if len(self._mapped) == _TOGETHER:
            self._hand_on()
        cuda = self.device.type == "cuda"
        address, pitch = ctypes.c_ulonglong(), ctypes.c_uint()
        check(
            self.lib.cuvidMapVideoFrame64(
                self._decoder,
                surface,
                ctypes.byref(address),
                ctypes.byref(pitch),
                ctypes.byref(
                    nvcuvid.MapParameters(
                        progressive=1, stream=torch.cuda.current_stream(self.device).cuda_stream if cuda else None
                    )
                ),
            ),
            "mapping a picture",
        )
        self._mapped.append((address.value, places and (places, self._planes(address.value, pitch.value))))
        self._refuse_broken(surface)

    def _planes(self, address, pitch):
        """(Y, U, V) of a mapped picture, upright."""
        assert self._area is not None, "a sequence begins before its pictures"
        left, top, _, coded_height = self._area
        width, height = self._stream.stored_size
        half = -(-height // 2), -(-width // 2)
        y = _view(address + top * pitch + left, (height, width), (pitch, 1), self.device)
        uv = _view(address + (coded_height + top // 2) * pitch + left, (*half, 2), (pitch, 2, 1), self.device)
        return tuple(self._stream.turn.upright(plane) for plane in (y, uv[..., 0], uv[..., 1]))

    def _hand_on(self):
        """Give the pictures at hand to `take`, and those before back to the decoder."""
        if wanted := [piece for _, piece in self._mapped if piece]:
            self._take(wanted)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        self._read.append((event, [address for address, _ in self._mapped]))
        self._mapped = []
        self._give_back(1)

    def _give_back(self, kept):
        """Unmap all pieces but the newest `kept`, once the GPU has read them."""
        while len(self._read) > kept:
            event, addresses = self._read.popleft()
            if event is not None:
                event.synchronize()
            for address in addresses:
                check(self.lib.cuvidUnmapVideoFrame64(self._decoder, address), "giving a picture back")


class _Memory:
    """Bytes at an address, as torch takes them."""

    def __init__(self, address, shape, strides):
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "strides": strides,
            "typestr": "|u1",
            "version": 3,
        }


def _view(address, shape, strides, device):
    """A uint8 tensor of what lies at an address."""
    if device.type == "cuda":
        return torch.as_tensor(_Memory(address, shape, strides), device=device)
    size = 1 + sum((length - 1) * stride for length, stride in zip(shape, strides))
    held = torch.frombuffer((ctypes.c_ubyte * size).from_address(address), dtype=torch.uint8)
    return held.as_strided(shape, strides)


__all__ = ["NoDecoder", "NvDecoder"]
