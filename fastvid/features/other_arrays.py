"""Features as other programs store them: numpy's .npy and a tensor that torch.save wrote (.pt). Nothing is executed.

Dimensions: R rows of one video, C channels of the vision tower.
"""

import os
import pickle
import warnings
import zipfile
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastvid.features.pickled_array import OtherContent
from fastvid.files import StrPath

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_ZIP = b"PK\x03\x04"  # how torch.save has written since 1.6
_OLD_PT = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # before


def probe_npy(file: BinaryIO) -> tuple[int, int, np.dtype]:
    """(R, C, dtype) of an open .npy file at its beginning; leaves `file` at the first value.

    Raises:
        ValueError: damaged, cut short, or no [R, C] array of floats (`OtherContent`).
    """
    return _npy_header(file)[:3]


def read_npy(file: BinaryIO) -> Tensor:
    """The array [R, C] in an open .npy file, in its dtype and this machine's byte order.

    Raises:
        ValueError: as `probe_npy`.
    """
    R, C, dtype, order = _npy_header(file)
    values = np.fromfile(file, dtype, R * C)
    if values.size != R * C:
        raise ValueError("it was cut short while it was read")
    return torch.from_numpy(np.array(values.reshape(R, C, order=order), dtype=dtype.newbyteorder("="), order="C"))


def probe_pt(file: BinaryIO) -> tuple[int, int, torch.dtype]:
    """(R, C, dtype) of the tensor in an open .pt file; mostly without reading its values.

    Raises:
        ValueError: damaged, or no plain [R, C] tensor of floats (`OtherContent`).
    """
    tensor = _pt_tensor(file, mapped=True)
    return *tensor.shape, tensor.dtype


def read_pt(file: BinaryIO) -> Tensor:
    """The tensor [R, C] in an open .pt file, read by torch's weights-only unpickler.

    Raises:
        ValueError: as `probe_pt`.
    """
    return _pt_tensor(file, mapped=False).detach().clone(memory_format=torch.contiguous_format)


def ending_by_content(path: StrPath) -> str | None:
    """The ending that a file's content asks for: .safetensors, .pkl, .npy, .npz or .pt; None where it does not tell."""
    with open(path, "rb") as file:
        head = file.read(16)
    if head[8:9] == b"{" and head[5:8] == b"\0\0\0":  # ahead of pickles: a header's length may begin as these do
        return ".safetensors"
    if head.startswith(b"\x93NUMPY"):
        return ".npy"
    if head.startswith(_ZIP):
        try:
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
        except (zipfile.BadZipFile, OSError, ValueError):
            return None
        return ".npz" if names and all(name.endswith(".npy") for name in names) else ".pt"
    if head.startswith(b"\x80"):
        return ".pt" if head.startswith(_OLD_PT) else ".pkl"
    return None


def _npy_header(file):
    """(R, C, dtype, order of the values) of an open .npy file."""
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read(file)
    except (ValueError, TypeError, SyntaxError, RecursionError, OverflowError) as error:
        raise ValueError("it is no .npy file, or its header is damaged") from error
    if dtype.kind != "f" or dtype.itemsize not in (2, 4, 8):
        raise OtherContent(f"its dtype is {dtype}, not float16, float32 or float64")
    match shape:
        case (int(R), int(C)) if min(R, C) > 0:
            size = os.fstat(file.fileno()).st_size - file.tell()
            if size != R * C * dtype.itemsize:
                raise ValueError(f"it holds {size} bytes of values instead of {R * C * dtype.itemsize}")
            return R, C, dtype, "F" if fortran else "C"
    raise OtherContent(f"its shape is {list(shape)}, not [rows, channels]")


def _pt_tensor(file, mapped):
    zipped = file.read(len(_ZIP)) == _ZIP
    file.seek(0)
    options = {"mmap": True} if mapped and zipped else {}
    try:
        with warnings.catch_warnings(action="ignore"):  # torch's remarks about what it then refuses
            value = torch.load(file.name if options else file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        raise OtherContent("its pickle is damaged, or asks for more than a tensor; refused") from error
    except Exception as error:  # whatever torch meets in a damaged file
        raise ValueError("it is no file of torch.save, or is damaged") from error
    if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.device.type != "cpu":
        what = "a dict" if isinstance(value, dict) else f"a {type(value).__name__}"
        raise OtherContent(f"it holds {what}, not a plain tensor")
    if value.dim() != 2 or not value.numel() or value.dtype not in _DTYPES:
        raise OtherContent(
            f"it holds {list(value.shape)} in {str(value.dtype).removeprefix('torch.')}, not [rows, "
            "channels] in float16, bfloat16, float32 or float64"
        )
    if value.nbytes > os.fstat(file.fileno()).st_size:  # strides can make much of little
        raise ValueError("it holds fewer values than its shape says")
    return value
