"""Feature files: one video's [R, C] rows (temporal, then spatial) on disk; and the folder that holds them.

Formats, by ending:
    .safetensors  tensor "features" and, as JSON in the metadata, a header that says what they were made of and with.
    .pkl          the reference's: a pickled numpy array, float16, without a header.
    .npy, .pt     of other programs: a numpy array, a tensor that torch.save wrote. Read, never written.

Values are float16, bfloat16 or float32; float64 is rounded to float32.

This is the one place that opens a path which a data file names.

Dimensions: R rows of one video (extraction: num_temporal + patches; any number is read), C channels of the vision
tower.
"""

import contextlib
import hashlib
import json
import os
import stat
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvid.data.feature_listing import scan, what_is
from fastvid.data.names import SUFFIXES, stem
from fastvid.data.other_arrays import ending_by_content, probe_npy, probe_pt, read_npy, read_pt
from fastvid.data.pickled_array import OtherContent, probe_array, read_array, write_array
from fastvid.files import atomic_file, name_of, shown, wrong_content
from fastvid.video.manifest import read_files

_TENSOR = "features"
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
_READ = {**_DTYPES, "F64": torch.float64}
_REMEDY = "remove it and extract it again (fastvid extract)"
_STORE = ("store the [rows, channels] array itself (numpy.save writes .npy, torch.save of the tensor .pt), or "
          f"{_REMEDY}")


class MissingFeatures(ValueError):
    """A record's video has no feature file."""


def feature_bytes(path, features_RC: Tensor, header: dict) -> bytes:
    """What `save_features` writes to `path`."""
    from safetensors.torch import save

    if features_RC.dim() != 2 or not features_RC.numel() or features_RC.dtype not in _DTYPES.values():
        raise ValueError(f"{path}: features must be [R, C] in float16, bfloat16 or float32, "
                         f"not {list(features_RC.shape)} in {str(features_RC.dtype).removeprefix('torch.')}")
    features_RC = features_RC.detach().cpu().contiguous()
    if _suffix(path, (".safetensors", ".pkl")) == ".pkl":
        return write_array(features_RC.to(torch.float16).numpy())
    return save({_TENSOR: features_RC}, metadata={"header": json.dumps(header)})


def save_features(path, features_RC: Tensor, header: dict):
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


def load_features(path) -> tuple[Tensor, dict]:
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


def probe_features(path) -> tuple[int, int, torch.dtype]:
    """R, C and stored dtype of a feature file, mostly without reading its values.

    Raises:
        ValueError, OSError: as `load_features`, but for values.
    """
    return describe_features(path)[0]


def describe_features(path) -> tuple[tuple[int, int, torch.dtype], dict]:
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


def feature_header(path) -> dict:
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
            raise OtherContent(f"features must be [R, C] in float16, bfloat16, float32 or float64, not {shape} in "
                               f"{dtype}")
    if len(table) != 1 or size - 8 - length != expected:
        raise ValueError(f"it holds {size - 8 - length} bytes of values instead of {expected}")
    return _READ[dtype], (R, C), header


class FeatureFolder:
    """Finds the feature file that a record's `video` means, and never one outside the folder.

    A record's value is only looked up in listings of what is there, and never handed to the file system. Each
    (sub-)folder is listed once, when it is first asked for: files that appear later are not seen.

    Args:
        folder: may itself be a symbolic link; links in it must lead to places in it.

    Raises:
        ValueError: `folder` is no folder.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(f"--video_folder {folder} is no folder; give the one that feature extraction wrote to")
        self._root = os.path.realpath(folder)
        self._listings = {"": scan(self._root)}
        self._probed = {}
        self._read_as = {}  # file of a shortened name: the one video that it may stand for

    @property
    def empty(self) -> bool:
        """Whether neither a feature file nor a sub-folder lies in the folder."""
        return not (self._listings[""].files or self._listings[""].folders)

    def load(self, name: str) -> tuple[Tensor, dict]:
        """`load_features` of the file that `name` means."""
        return load_features(self.resolve(name))

    def shape(self, name: str) -> tuple[int, int]:
        """(R, C) of the file that `name` means. Its header is read once; later changes of the file are not seen.

        Raises:
            ValueError, OSError: as `resolve` and `load_features`; nothing is remembered.
        """
        return self._probe(name)[:2]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the file that `name` means stores its values; otherwise as `shape`."""
        return self._probe(name)[2]

    def _probe(self, name):
        if name not in self._probed:
            self._probed[name] = probe_features(self.resolve(name))
        return self._probed[name]

    def header(self, name: str) -> dict:
        """`feature_header` of the file that `name` means; of a .pkl what the manifest says of that very file."""
        path = self.resolve(name)
        if path.suffix != ".pkl":
            return feature_header(path)
        entry = self._manifest.get(path.relative_to(self.folder).as_posix(), {})
        with open(path, "rb") as file:
            same = "sha256" in entry and hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
        return entry if same else {}

    @cached_property
    def _manifest(self):
        return read_files(self.folder)

    def resolve(self, name: str) -> Path:
        """The file that a record's `video` means.

        The exact name; else the same name with .safetensors or .pkl for its ending; else, as the reference cuts names
        at their first dot, the one file whose cut name the record gives, or the .pkl that is named by the record's
        cut name, unless two videos would read it.

        Raises:
            MissingFeatures: there is none.
            ValueError: the name, or a link in its way, leaves the folder; a cut name means several videos.
        """
        *folders, base = self._parts(name)
        listing, inner = self._list(""), ""
        for folder in folders:
            if folder not in listing.folders:
                raise self._missing(name, listing)
            inner = os.path.join(inner, folder)
            listing = self._list(inner)
            if listing is None:
                raise self._leaves(name, f"its folder {inner} is a link that leads out of {self.folder}")
        file = self._match(listing, inner, base, name)
        if file is None:
            raise self._missing(name, listing, base)
        if listing.files[file] and not self._inside(os.path.realpath(os.path.join(self._root, inner, file))):
            raise self._leaves(name, f"{file} is a link that leads out of {self.folder}")
        return self.folder / inner / file

    # What there is to ask of a folder where features are still to be made (`fastvid.online.folder.OnlineFeatures`).

    unmade = ()

    def settle(self):
        """Called once the names of all records were resolved."""

    def check_channels(self, channels):
        """Called with the model's."""

    def is_made(self, name: str) -> bool:
        return True

    def await_made(self, name: str):
        """Called before features are loaded to train on."""

    def stand_in(self, name: str) -> tuple[Tensor, dict]:
        """Called instead of `load` where the shape alone matters."""
        return self.load(name)

    def begin(self, names):
        """Called some time before `made_ahead`, with the same names."""

    @contextlib.contextmanager
    def made_ahead(self, names, stopped=lambda: False):
        """Entered while samples that need the videos `names`, in this order, are read."""
        yield

    def told(self) -> str | None:
        """A line for the user before the first step."""

    def _parts(self, name):
        parts = name.split("/")
        if name.startswith("/"):
            raise self._leaves(name, f"it is absolute; give it relative to {self.folder}")
        if ".." in parts:
            raise self._leaves(name, f'it has ".."; give it relative to {self.folder}')
        return [part for part in parts if part not in ("", ".")] or [""]

    def _match(self, listing, inner, base, name):
        """The name, in the listed folder, of the file that `base` means; None if there is none."""
        short = stem(base)
        for file in (base, *(name_of(short, suffix) for suffix in SUFFIXES)):
            if file in listing.files:
                return self._claim(inner, file, stem(file), name)
        whole = listing.stems_by_id.get(short, ())
        if len(whole) > 1:
            raise ValueError(f"video {name!r} means any of {', '.join(sorted(whole))} in {self.folder / inner}; "
                             "give the whole name")
        for file in (one + suffix for one in whole for suffix in SUFFIXES):
            if file in listing.files:
                return file
        cut = short.partition(".")[0] + ".pkl"  # only the reference cuts names
        return self._claim(inner, cut, short, name) if cut in listing.files else None

    def _claim(self, inner, file, whole, name):
        """`file`, if no other video has been read from it: a cut name must not give one video another's features."""
        owner = self._read_as.setdefault((inner, file), whole)
        if owner != whole:
            raise ValueError(f"video {name!r}: {owner} and {whole} would both be read from "
                             f"{self.folder / inner / file}, whose name is cut at the first dot; extract them again "
                             "(fastvid extract)")
        return file

    def _list(self, inner):
        """The cached listing of a sub-folder; None if a link takes it out of the root."""
        if inner not in self._listings:
            real = os.path.realpath(os.path.join(self._root, inner))
            self._listings[inner] = scan(real) if self._inside(real) else None
        return self._listings[inner]

    def _inside(self, real):
        return real == self._root or real.startswith(os.path.join(self._root, ""))

    def _missing(self, name, listing, base=""):
        hint = "".join(f"; {shown(other)} lies there, but is {what or what_is(other)}"
                       for other, what in listing.others.get(stem(base), [])[:3])
        if "://" in name:
            hint += "; it is a URL, and must be downloaded first"
        elif "\\" in name:
            hint += "; sub-folders are written with /"
        return MissingFeatures(f"video {name!r} has no features in {shown(self.folder)}{hint}; extract them (fastvid "
                               "extract), or leave its records out (train with --on_bad_sample skip, or use "
                               "scripts/filter_for_missing_videos.py)")

    @staticmethod
    def _leaves(name, reason):
        return ValueError(f"video {name!r} is refused: {reason}")
