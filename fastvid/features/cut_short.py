"""Whether a feature file that cannot be read is the beginning of one: a copy or a download that was interrupted."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np

from fastvid.files import StrPath

_LONGEST_HEADER = 100_000_000  # bytes, as the safetensors library has it


def is_cut_short(path: StrPath) -> bool:
    """Whether a feature file ends before its own content says. Of one that can be read, False.

    Looks at beginning and end, and not at the values. A file that begins as nothing known is damaged in another way.

    Raises:
        OSError: it cannot be opened.
    """
    look = {".safetensors": _safetensors, ".pkl": _pkl, ".npy": _npy, ".pt": _pt}.get(Path(path).suffix)
    if look is None or not os.path.isfile(path):
        return False
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        try:
            return size > 0 and look(file, size)
        except (ValueError, KeyError, TypeError, AttributeError, SyntaxError, RecursionError, OverflowError):
            return False


def _safetensors(file, size):
    length = int.from_bytes(file.read(8), "little")
    if file.read(1) != b"{" or length > _LONGEST_HEADER:
        return False
    if length > size - 8:
        return True
    file.seek(8)
    tensors = json.loads(file.read(length))
    return size - 8 - length < max(
        tensor["data_offsets"][1] for name, tensor in tensors.items() if name != "__metadata__"
    )


def _pkl(file, size):
    begins = file.read(2)
    file.seek(-1, io.SEEK_END)
    return begins[:1] == b"\x80" and file.read(1) != b"."  # with which every pickle ends


def _npy(file, size):
    version = np.lib.format.read_magic(file)
    width = 2 if version == (1, 0) else 4  # bytes of the header's length
    if size < file.tell() + width + int.from_bytes(file.read(width), "little"):
        return True
    file.seek(-width, io.SEEK_CUR)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read(file)
    return size - file.tell() < int(np.prod(shape)) * dtype.itemsize


def _pt(file, size):
    return file.read(4) == b"PK\x03\x04" and not zipfile.is_zipfile(file)  # a zip's list of members is its end
