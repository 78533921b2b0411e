"""Files of the rows that a language model reads of videos: features, through the trained projector.

A file is safetensors: one tensor "embeddings" [R, D], and as JSON in the metadata a header that says what it was made
of and with. vLLM, transformers and whatever else takes embeddings reads it.

Dimensions: R rows of one video (temporal, then spatial), D hidden size of the language model.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastvid import __version__
from fastvid.features.file import feature_header
from fastvid.features.names import SUFFIXES, stem
from fastvid.files import StrPath, atomic_file, shown
from fastvid.inference.questions import inside, list_media
from fastvid.inference.source import MEDIA_SUFFIXES, VideoSource
from fastvid.video.named_inputs import lines

TENSOR = "embeddings"
_LISTS = (".txt", ".lst")


@dataclass(frozen=True)
class Medium:
    """A video or feature file, and the file that its rows go to."""

    name: str
    path: Path
    output: Path


def media_of(given: StrPath, output: StrPath, *, follow_links: bool = False) -> tuple[list[Medium], int]:
    """(the videos and feature files that `given` means, sorted by name; how many links are left out).

    Outputs mirror their names and folders. Of several files of one name but for the ending, the first of
    `MEDIA_SUFFIXES` is taken: features before the video.

    Args:
        given: a file, a folder, or a list file.
        follow_links: as for `fastvid.video.named_inputs.lines`; of a folder, take links that lead out of it.

    Raises:
        ValueError: there is none, or a line of the list leads elsewhere.
    """
    if not Path(given).exists():
        raise ValueError(f"--video {shown(given)} does not exist; give a video, a feature file, a folder or a list")
    if Path(given).suffix.lower() in _LISTS:
        found, others = lines(given, follow_links, flag="--video")
        files, links = {name: Path(path) for name, path in found.items()}, others["links"]
        if not files and not links:
            raise ValueError(f"--video {shown(given)} names no file; write a path on each line")
    else:
        files, links = list_media(given, MEDIA_SUFFIXES), 0
        if Path(given).is_dir() and not follow_links:
            own = {name: path for name, path in files.items() if inside(path, given)}
            files, links = own, len(files) - len(own)
    if not files:
        raise ValueError(f"--video {shown(given)} names links alone, which --follow_links True follows")
    order = {suffix: place for place, suffix in enumerate(MEDIA_SUFFIXES)}
    chosen = {}
    for name in sorted(files, key=lambda name: (order.get(Path(name).suffix.lower(), len(order)), name)):
        chosen.setdefault(stem(name), name)
    media = [Medium(name, files[name], Path(output) / f"{key}.safetensors") for key, name in sorted(chosen.items())]
    return media, links


def embeddings_header(path: StrPath) -> dict[str, Any] | None:
    """What a file of embeddings says of itself; None of any other file, and of one that is damaged.

    Raises:
        OSError: it cannot be opened.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(path)
    try:
        with safe_open(path, framework="pt") as file:
            if list(file.keys()) != [TENSOR]:
                return None
            header = json.loads((file.metadata() or {})["header"])
    except (SafetensorError, ValueError, KeyError, RecursionError):
        return None
    return header if isinstance(header, dict) else None


class Embedder:
    """Makes the files.

    Args:
        source: whose tower and projector make them.
        overwrite: replace files that were made with other settings.

    Attributes:
        settings: what two files must have in common to go together.
    """

    def __init__(self, source: VideoSource, *, overwrite: bool = False):
        self._source, self._overwrite = source, overwrite
        digest = hashlib.sha256()
        for name, tensor in sorted(source.projector.state_dict().items()):
            digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.settings = {
            "projector": f"sha256:{digest.hexdigest()}",
            "num_frames": source.config.num_frames,
            "pooling": source.config.pooling,
            "dtype": str(source.precision.compute).removeprefix("torch."),
        }

    def is_done(self, medium: Medium) -> bool:
        """Whether a medium's file is there, whole, and of the same file and settings.

        Raises:
            ValueError: in its place is something else, or what was made with other settings.
            OSError: it cannot be read.
        """
        if not os.path.lexists(medium.output):
            return False
        if medium.output.exists() and os.path.samefile(medium.output, medium.path):
            raise ValueError(f"{shown(medium.output)} is what is to be embedded; choose another --output folder")
        header = embeddings_header(medium.output)
        if header is None:
            raise ValueError(
                f"{shown(medium.output)} is no whole file of embeddings; remove it, or choose another --output folder"
            )
        made = {name: header.get(name) for name in self.settings}
        if made != self.settings:
            if self._overwrite:
                return False
            differing = [name for name in made if made[name] != self.settings[name]]
            raise ValueError(
                f"{shown(medium.output)} was made with another {' and '.join(differing)}; --overwrite True replaces "
                "such files, or choose another --output folder"
            )
        return header.get("source_state") == self._states(medium)

    def make(self, medium: Medium) -> Tensor:
        """Write a medium's file; its [R, D] rows.

        Raises:
            ValueError: it cannot be decoded, or its features do not fit the weights.
            OSError: it cannot be read, or the file cannot be written.
        """
        from safetensors.torch import save

        state, source = self._states(medium), self._source
        features_RC = source.features(medium.path)
        rows_RD = source.project(features_RC)
        if not rows_RD.isfinite().all():
            raise ValueError(f"{shown(medium.path)}: its rows are not finite in {self.settings['dtype']}")
        towers = ("", "_2")  # of two vision towers
        if medium.path.suffix in SUFFIXES:
            files = source.feature_files(medium.path)
            told = {f"features{which}": feature_header(file) for which, file in zip(towers, files)}
        else:
            told = {}
            for which, encoder in zip(towers, source.loaded_encoders()):
                told[f"tower_revision{which}"] = encoder.revision
                told[f"tower_dtype{which}"] = str(encoder.dtype).removeprefix("torch.")
        header = {
            "source": medium.name,
            "source_state": state,
            **self.settings,
            **told,
            "model": Path(source.config.model_name_or_path).name,
            "weights": Path(source.weights).name,
            "trained_on": source.trained.to_json(),
            "fastvid": __version__,
        }
        medium.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(medium.output) as file:
            file.write(save({TENSOR: rows_RD.contiguous()}, metadata={"header": json.dumps(header)}))
        return rows_RD

    def _states(self, medium):
        """`_state` of a medium's file; of the second vision tower's features, that of theirs as well."""
        if medium.path.suffix not in SUFFIXES:
            return _state(medium.path)
        return [number for file in self._source.feature_files(medium.path) for number in _state(file)]


def _state(path):
    """[bytes, time of the last change in nanoseconds] of a file."""
    there = os.stat(path)
    return [there.st_size, there.st_mtime_ns]
