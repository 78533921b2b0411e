"""NVIDIA's video decoder, NVDEC, by the driver's own library: the few calls that are used, through ctypes.

Names and layouts are those of ``nvcuvid.h`` and ``cuviddec.h`` of the Video Codec SDK. The library is part of the
driver, so that nothing has to be installed for it. Containers may lack it: it is there with the driver capability
"video" (``NVIDIA_DRIVER_CAPABILITIES=compute,utility,video``).
"""

import ctypes
import functools
from ctypes import (
    POINTER,
    Structure,
    c_int,
    c_longlong,
    c_short,
    c_ubyte,
    c_uint,
    c_ulong,
    c_ulonglong,
    c_ushort,
    c_void_p,
)

import torch

CODECS = {"mpeg2video": 1, "mpeg4": 2, "h264": 4, "hevc": 8, "vp8": 9, "vp9": 10, "av1": 11}  # cudaVideoCodec
YUV_420, NV12, WEAVE = 1, 0, 0  # cudaVideoChromaFormat, cudaVideoSurfaceFormat, cudaVideoDeinterlaceMode
END_OF_STREAM, TIMESTAMP, END_OF_PICTURE = 1, 2, 8  # CUvideopacketflags
IN_PROGRESS, SUCCESS = 1, 2  # cuvidDecodeStatus
BROKEN = {8: "decodes with errors", 9: "is concealed"}


class NoDecoder(RuntimeError):
    """There is no hardware decoder, or it cannot be used."""


class Rectangle(Structure):
    _fields_ = [(side, c_short) for side in ("left", "top", "right", "bottom")]


class Area(Structure):
    _fields_ = [(side, c_int) for side in ("left", "top", "right", "bottom")]


class Capabilities(Structure):
    """CUVIDDECODECAPS."""

    _fields_ = [
        ("codec", c_int),
        ("chroma", c_int),
        ("depth_minus_8", c_uint),
        ("reserved1", c_uint * 3),
        ("supported", c_ubyte),
        ("engines", c_ubyte),
        ("formats", c_ushort),
        ("max_width", c_uint),
        ("max_height", c_uint),
        ("max_macroblocks", c_uint),
        ("min_width", c_ushort),
        ("min_height", c_ushort),
        ("histogram", c_ubyte),
        ("counter_depth", c_ubyte),
        ("histogram_bins", c_ushort),
        ("reserved3", c_uint * 10),
    ]


class VideoFormat(Structure):
    """CUVIDEOFORMAT, what a parser has read of a sequence."""

    _fields_ = [
        ("codec", c_int),
        ("rate_numerator", c_uint),
        ("rate_denominator", c_uint),
        ("progressive_sequence", c_ubyte),
        ("depth_minus_8", c_ubyte),
        ("chroma_depth_minus_8", c_ubyte),
        ("surfaces", c_ubyte),
        ("coded_width", c_uint),
        ("coded_height", c_uint),
        ("display_area", Area),
        ("chroma", c_int),
        ("bit_rate", c_uint),
        ("aspect_x", c_int),
        ("aspect_y", c_int),
        ("signal", c_ubyte * 4),
        ("header_bytes", c_uint),
    ]


class CreateInfo(Structure):
    """CUVIDDECODECREATEINFO."""

    _fields_ = [
        ("width", c_ulong),
        ("height", c_ulong),
        ("surfaces", c_ulong),
        ("codec", c_int),
        ("chroma", c_int),
        ("flags", c_ulong),
        ("depth_minus_8", c_ulong),
        ("intra_only", c_ulong),
        ("max_width", c_ulong),
        ("max_height", c_ulong),
        ("reserved1", c_ulong),
        ("display_area", Rectangle),
        ("format", c_int),
        ("deinterlace", c_int),
        ("target_width", c_ulong),
        ("target_height", c_ulong),
        ("output_surfaces", c_ulong),
        ("lock", c_void_p),
        ("target", Rectangle),
        ("histogram", c_ulong),
        ("reserved2", c_ulong * 4),
    ]


class ReconfigureInfo(Structure):
    """CUVIDRECONFIGUREDECODERINFO."""

    _fields_ = [
        ("width", c_uint),
        ("height", c_uint),
        ("target_width", c_uint),
        ("target_height", c_uint),
        ("surfaces", c_uint),
        ("reserved1", c_uint * 12),
        ("display_area", Rectangle),
        ("target", Rectangle),
        ("reserved2", c_uint * 11),
    ]


class PictureParameters(Structure):
    """CUVIDPICPARAMS: its first members. The rest passes from the parser to the decoder unseen."""

    _fields_ = [
        ("width_in_blocks", c_int),
        ("height_in_blocks", c_int),
        ("surface", c_int),
        ("is_field", c_int),
        ("is_bottom", c_int),
        ("is_second", c_int),
    ]


class DisplayInfo(Structure):
    """CUVIDPARSERDISPINFO."""

    _fields_ = [
        ("surface", c_int),
        ("progressive", c_int),
        ("top_first", c_int),
        ("repeat_first", c_int),
        ("timestamp", c_longlong),
    ]


class MapParameters(Structure):
    """CUVIDPROCPARAMS."""

    _fields_ = [
        ("progressive", c_int),
        ("second_field", c_int),
        ("top_first", c_int),
        ("unpaired", c_int),
        ("reserved_flags", c_uint),
        ("reserved_zero", c_uint),
        ("raw_input", c_ulonglong),
        ("raw_input_pitch", c_uint),
        ("raw_input_format", c_uint),
        ("raw_output", c_ulonglong),
        ("raw_output_pitch", c_uint),
        ("reserved1", c_uint),
        ("stream", c_void_p),
        ("reserved", c_uint * 46),
        ("histogram", c_void_p),
        ("reserved2", c_void_p),
    ]


class DecodeStatus(Structure):
    """CUVIDGETDECODESTATUS."""

    _fields_ = [("status", c_int), ("reserved", c_uint * 31), ("pointers", c_void_p * 8)]


class SourcePacket(Structure):
    """CUVIDSOURCEDATAPACKET."""

    _fields_ = [("flags", c_ulong), ("size", c_ulong), ("payload", c_void_p), ("timestamp", c_longlong)]


Sequence = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(VideoFormat))
Decode = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(PictureParameters))
Display = ctypes.CFUNCTYPE(c_int, c_void_p, POINTER(DisplayInfo))


class ParserParameters(Structure):
    """CUVIDPARSERPARAMS."""

    _fields_ = [
        ("codec", c_int),
        ("surfaces", c_uint),
        ("clock_rate", c_uint),
        ("error_threshold", c_uint),
        ("display_delay", c_uint),
        ("bits", c_uint),
        ("reserved1", c_uint * 4),
        ("user", c_void_p),
        ("sequence", Sequence),
        ("decode", Decode),
        ("display", Display),
        ("operating_point", c_void_p),
        ("messages", c_void_p),
        ("reserved2", c_void_p * 5),
        ("extended_format", c_void_p),
    ]


_SIGNATURES = {
    "cuvidGetDecoderCaps": [POINTER(Capabilities)],
    "cuvidCreateDecoder": [POINTER(c_void_p), POINTER(CreateInfo)],
    "cuvidReconfigureDecoder": [c_void_p, POINTER(ReconfigureInfo)],
    "cuvidDestroyDecoder": [c_void_p],
    "cuvidDecodePicture": [c_void_p, POINTER(PictureParameters)],
    "cuvidGetDecodeStatus": [c_void_p, c_int, POINTER(DecodeStatus)],
    "cuvidMapVideoFrame64": [c_void_p, c_int, POINTER(c_ulonglong), POINTER(c_uint), POINTER(MapParameters)],
    "cuvidUnmapVideoFrame64": [c_void_p, c_ulonglong],
    "cuvidCreateVideoParser": [POINTER(c_void_p), POINTER(ParserParameters)],
    "cuvidParseVideoData": [c_void_p, POINTER(SourcePacket)],
    "cuvidDestroyVideoParser": [c_void_p],
}
_OUT_OF_MEMORY = 2  # CUDA_ERROR_OUT_OF_MEMORY
# CUresults after which every further call of the process fails: the driver or the context is gone, memory or a link
# cannot be corrected, or a kernel wrote outside of its memory, did not end, and the like.
_BREAKING = {4, 214, 220, 700, 702, 709, 710, *range(714, 720)}


@functools.lru_cache(maxsize=2)
def library(name: str = "libnvcuvid.so.1") -> ctypes.CDLL:
    """The driver's library.

    Raises:
        NoDecoder: it is not there.
    """
    try:
        found = ctypes.CDLL(name)
    except OSError as error:
        raise NoDecoder(
            f"the driver's {name} cannot be loaded ({error}); in a container, "
            "NVIDIA_DRIVER_CAPABILITIES must name video"
        ) from error
    for function, arguments in _SIGNATURES.items():
        getattr(found, function).argtypes = arguments
    return found


@functools.lru_cache(maxsize=1)
def _driver():
    return ctypes.CDLL("libcuda.so.1")


def context_of(device: torch.device) -> c_void_p | None:
    """The CUDA context of a torch device, for `use_context`; None of one that is no GPU."""
    if device.type != "cuda":
        return None
    found = c_void_p()
    with torch.cuda.device(device):
        torch.cuda.synchronize()  # there is a context afterwards
        check(_driver().cuCtxGetCurrent(ctypes.byref(found)), "asking for the CUDA context")
    return found


def use_context(context: c_void_p | None) -> None:
    """Make a context this thread's current one: a new thread has none until it calls CUDA's runtime."""
    if context is not None:
        check(_driver().cuCtxSetCurrent(context), "setting the CUDA context")


def check(code: int, what: str) -> None:
    """Raise NoDecoder if a call gave an error, a CUresult other than 0; RuntimeError if the process can do no more."""
    if code in _BREAKING:
        raise RuntimeError(f"CUDA error {code}: {what} failed, and so will all else that this process asks of the GPU")
    if code:
        raise NoDecoder(
            f"{what} failed with CUDA error {code}" + (" (out of memory)" if code == _OUT_OF_MEMORY else "")
        )


def capabilities(codec: str, lib: ctypes.CDLL | None = None) -> Capabilities | None:
    """What the current device's decoder does with a codec in 8-bit 4:2:0, by FFmpeg's name; None: nothing.

    Raises:
        NoDecoder: it cannot be asked.
    """
    if codec not in CODECS:
        return None
    asked = Capabilities(codec=CODECS[codec], chroma=YUV_420)
    check((lib or library()).cuvidGetDecoderCaps(ctypes.byref(asked)), "asking for the decoder's capabilities")
    return asked if asked.supported and asked.formats >> NV12 & 1 else None


def takes(codec: str, width: int, height: int, lib: ctypes.CDLL | None = None) -> bool:
    """Whether the current device's decoder takes 8-bit 4:2:0 pictures of a codec, by FFmpeg's name, and of a size."""
    able = capabilities(codec, lib)
    return (
        able is not None
        and able.min_width <= width <= able.max_width
        and able.min_height <= height <= able.max_height
        and width * height // 256 <= able.max_macroblocks
    )
