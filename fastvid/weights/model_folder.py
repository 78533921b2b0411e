"""Tensors on disk as read-only mappings, mapped into memory and read when looked up: nothing is held twice.

Every reader here treats its files as data: pickles are read by torch's restricted unpickler, and a file name that an
index gives must be one of the folder's own.
"""

import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvid.files import StrPath, model_folder, wrong_content
from fastvid.weights.names import standard_name

# Index or single file, in the order in which a folder is searched.
_OTHER_FILES = (
    ("*.gguf", "{} is of llama.cpp, which is not read: give the folder of the model that it was made of"),
    ("consolidated*.pth", "{} is of Meta's release, which is not read: give the folder that transformers reads"),
    ("*.incomplete", "{} shows that its download has not ended: download it again (`hf download`)"),
    ("*-of-*.safetensors", "{} is one of several, and model.safetensors.index.json lists them: download that too"),
    ("*-of-*.bin", "{} is one of several, and pytorch_model.bin.index.json lists them: download that too"),
)
_MODEL_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)


class _SafetensorsFile(Mapping[str, Tensor]):
    """{key: tensor} of a safetensors file; a tensor is a view of the mapped file."""

    def __init__(self, path):
        self._file = safe_open(path, framework="pt")
        self._keys = dict.fromkeys(self._file.keys())

    def __getitem__(self, key):
        if key not in self._keys:
            raise KeyError(key)
        return self._file.get_tensor(key)

    def __iter__(self):
        return iter(self._keys)

    def __len__(self):
        return len(self._keys)


def open_tensors(path: StrPath) -> Mapping[str, Tensor]:
    """The tensors of a ``.safetensors`` file, or of one that ``torch.save`` wrote, by their keys, on the CPU.

    Raises:
        ValueError: names a file that is missing, damaged, or asks the unpickler for anything but tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist: the folder's download is incomplete, or its name is misspelt")
    if fault := wrong_content(path):
        raise ValueError(f"{path} {fault}")
    try:
        if path.suffix == ".safetensors":
            return _SafetensorsFile(path)
        # torch.save's format before version 1.6 is no zip file and cannot be mapped.
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is damaged, or its pickle asks for more than tensors and could run code: it was not "
            "loaded. Download it again from a source you trust, best as .safetensors"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}); download or write it again") from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} does not hold tensors by name: it is not a weights file")
    return tensors


def other_weights(folder: StrPath) -> str | None:
    """What lies in a folder instead of weights that are read, with the remedy; None where nothing is known."""
    for name in _MODEL_FILES:
        if (Path(folder) / name).is_symlink():
            return f"{name} is a link that leads nowhere: download the model again (`hf download`)"
    for pattern, reason in _OTHER_FILES:
        if found := sorted(Path(folder).glob(pattern)):
            return reason.format(found[0].name)
    return None


class ModelFolder(Mapping[str, Tensor]):
    """{LLaVA's name: tensor} of a model folder: single or sharded, safetensors or .bin, LLaVA's or llava-hf's keys.

    Attributes:
        folder: where it is.
        paths: {LLaVA's name: the file that holds it}.

    Raises:
        ValueError: names the folder or file that cannot be read.
    """

    @staticmethod
    def file_of(folder: StrPath) -> Path | None:
        """The file that holds a folder's weights, or lists those that do; None where there is none."""
        return next((Path(folder) / name for name in _MODEL_FILES if (Path(folder) / name).is_file()), None)

    def __init__(self, folder: StrPath):
        self.folder = model_folder(folder)
        self._open: dict[Path, Mapping[str, Tensor]] = {}
        path = self.file_of(self.folder)
        if path is None:
            raise ValueError(
                f"{self.folder} holds no weights: expected one of {', '.join(_MODEL_FILES)}; "
                f"{other_weights(self.folder) or 'download the model again (`hf download`)'}"
            )
        keys = self._read_index(path) if path.suffix == ".json" else dict.fromkeys(self._file(path), path)
        self._keys = {name: key for key in keys if (name := standard_name(key)) is not None}
        self.paths = {name: keys[key] for name, key in self._keys.items()}

    def _read_index(self, path):
        """{key: file} of a sharded folder."""
        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")
        try:
            files = json.loads(path.read_text(encoding="utf-8-sig"))["weight_map"]
            keys = {key: self.folder / name for key, name in files.items()}
            own = all(Path(name).name == name for name in files.values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not an index of weights ({error!r}); download it again") from None
        if not own:
            raise ValueError(f"{path} names files outside its folder; only plain file names are read")
        return keys

    def _file(self, path):
        if path not in self._open:
            self._open[path] = open_tensors(path)
        return self._open[path]

    def __getitem__(self, name: str) -> Tensor:
        key, path = self._keys[name], self.paths[name]
        try:
            return self._file(path)[key]
        except KeyError:
            raise ValueError(f"{path} lacks {key}, which the folder's index says it holds; download it again") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)
