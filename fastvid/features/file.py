"""Feature files: one video's [R, C] rows (temporal, then spatial) on disk.

Formats, by ending:
    .safetensors  tensor "features" and, as JSON in the metadata, a header that says what they were made of and with.
    .pkl          the reference's: a pickled numpy array, float16, without a header.
    .npy, .pt     of other programs: a numpy array, a tensor that torch.save wrote. Read, never written.

Values are float16, bfloat16 or float32; float64 is rounded to float32.

Dimensions: R rows of one video (extraction: num_temporal + patches; any number is read), C channels of the vision
tower.
"""

import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastvid.features.names import SUFFIXES
from fastvid.features.other_arrays import ending_by_content, probe_npy, probe_pt, read_npy, read_pt
from fastvid.features.pickled_array import OtherContent, probe_array, read_array, write_array
from fastvid.files import StrPath, atomic_file, shown, wrong_content

_TENSOR = "features"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_READ = {**_DTYPES, "F64": torch.float64}
_REMEDY = "remove it and extract it again (fastvid extract)"
_STORE = f"store the [rows, channels] array itself (numpy.save writes .npy, torch.save of the tensor .pt), or {_REMEDY}"


def feature_bytes(path: StrPath, features_RC: Tensor, header: dict) -> bytes:
    """What `save_features` writes to `path`."""
    from safetensors.torch import save

    if features_RC.dim() != 2 or not features_RC.numel() or features_RC.dtype not in _DTYPES.values():
        raise ValueError(
            f"{path}: features must be [R, C] in float16, bfloat16 or float32, "
            f"not {list(features_RC.shape)} in {str(features_RC.dtype).removeprefix('torch.')}"
        )
    features_RC = features_RC.detach().cpu().contiguous()
    if _suffix(path, (".safetensors", ".pkl")) == ".pkl":
        return write_array(features_RC.to(torch.float16).numpy())
    return save({_TENSOR: features_RC}, metadata={"header": json.dumps(header)})


def save_features(path: StrPath, features_RC: Tensor, header: dict) -> None:
    """Write one video's features; `path` leads to the old file or to the whole new one, never to a part.

    Args:
        path: ends in .safetensors, or in .pkl for the reference's format, which is float16 and keeps no header.
        features_RC: [R, C] float16, bfloat16 or float32, on any device.
        header: what JSON can hold; None of it is interpreted here.

    Raises:
        ValueError: another ending, or no such tensor.
    """
    content = feature_bytes(path, features_RC, header)
    with atomic_file(path) as file:
        file.write(content)


def load_features(path: StrPath) -> tuple[Tensor, dict[str, Any]]:
    """Read a feature file; nothing that it holds is executed.

    The values are read, not mapped: a file that is cut short while training runs is an error instead of a crash.

    Returns:
        [R, C] tensor in the stored dtype, but float32 for float64; and the header ({} but for .safetensors).

    Raises:
        ValueError: no [R, C] features of floats; NaN or infinity; damaged, cut short or malicious. Names the file.
        OSError: the file cannot be opened.
    """
    features_RC, header = _read_file(path, _load)
    if features_RC.dtype == torch.float64:
        features_RC = features_RC.float()
    # NaN and infinity show in the least or the largest value; asking each value takes 15 times as long.
    if not all(limit.isfinite() for limit in features_RC.aminmax()):
        row = int((~features_RC.isfinite()).any(1).nonzero()[0, 0])
        raise ValueError(f"{shown(path)} holds NaN or infinity, first in row {row} (from 0); {_REMEDY}")
    return features_RC, header


def probe_features(path: StrPath) -> tuple[int, int, torch.dtype]:
    """R, C and stored dtype of a feature file, mostly without reading its values.

    Raises:
        ValueError, OSError: as `load_features`, but for values.
    """
    return describe_features(path)[0]


def describe_features(path: StrPath) -> tuple[tuple[int, int, torch.dtype], dict[str, Any]]:
    """What `probe_features` and `feature_header` tell of a feature file, which is opened once.

    Raises:
        ValueError, OSError: as `probe_features`.
    """
    return _read_file(path, _describe)


def _load(file, suffix):
    if suffix == ".safetensors":
        dtype, shape, header = _read_header(file)
        features_RC = torch.empty(shape, dtype=dtype)
        if file.readinto(features_RC.view(torch.uint8).numpy()) != features_RC.nbytes:
            raise ValueError("it was cut short while it was read")
        return features_RC, header
    if suffix == ".pkl":
        return torch.from_numpy(read_array(file.read())), {}
    return (read_npy if suffix == ".npy" else read_pt)(file), {}


def _describe(file, suffix):
    if suffix == ".safetensors":
        dtype, shape, header = _read_header(file)
        return (*shape, dtype), header
    if suffix == ".pt":
        return probe_pt(file), {}
    R, C, dtype = (probe_array if suffix == ".pkl" else probe_npy)(file)
    return (R, C, torch.from_numpy(np.empty(0, dtype.newbyteorder("="))).dtype), {}


def _read_file(path, read):
    """`read` of an open feature file; what it refuses is told with the file's name and a remedy."""
    suffix = _suffix(path, SUFFIXES)
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
        raise ValueError(f"{shown(path)} {wrong_content(path)}")
    with open(path, "rb", buffering=0) as file:
        try:
            return read(file, suffix)
        except ValueError as error:
            if reason := wrong_content(path):
                raise ValueError(f"{shown(path)} {reason}") from error
            if (ending := ending_by_content(path)) not in (None, suffix):
                remedy = f"name it {shown(Path(path).stem)}{ending}" if ending in SUFFIXES else _STORE
                raise ValueError(f"{shown(path)} holds what a {ending} file does; {remedy}") from error
            remedy = _STORE if isinstance(error, OtherContent) else _REMEDY
            raise ValueError(f"{shown(path)}: {error}; {remedy}") from error


def feature_header(path: StrPath) -> dict[str, Any]:
    """What a feature file says it was made of and with, without reading its values; {} but for .safetensors.

    Raises:
        ValueError, OSError: as `load_features`.
    """
    return _read_file(path, lambda file, suffix: _read_header(file)[2] if suffix == ".safetensors" else {})


def _suffix(path, known):
    suffix = Path(path).suffix
    if suffix not in known:
        raise ValueError(f"{shown(path)}: a feature file ends in {', '.join(known[:-1])} or {known[-1]}")
    return suffix


def _read_header(file):
    """dtype, (R, C) and header of an open .safetensors; leaves `file` at the first value.

    Format: https://github.com/huggingface/safetensors (8 bytes little-endian N, N bytes of JSON, the values).
    """
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > size - 8:
        raise ValueError("it is cut short or no safetensors file")
    try:
        table = json.loads(file.read(length))
        header = json.loads(table.pop("__metadata__", {}).get("header", "{}"))
        header = header if isinstance(header, dict) else {}
        dtype, shape = str(table[_TENSOR]["dtype"]), table[_TENSOR]["shape"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f'its header is damaged or has no "{_TENSOR}"') from error
    match shape:
        case [int(R), int(C)] if min(R, C) > 0 and dtype in _READ:
            expected = R * C * _READ[dtype].itemsize
        case _:
            raise OtherContent(
                f"features must be [R, C] in float16, bfloat16, float32 or float64, not {shape} in {dtype}"
            )
    if len(table) != 1 or size - 8 - length != expected:
        raise ValueError(f"it holds {size - 8 - length} bytes of values instead of {expected}")
    return _READ[dtype], (R, C), header
