"""The folder of feature files, and which file in it a record's video means.

This is the one place that opens a path which a data file names.

Dimensions: R rows of one video, C channels of the vision tower.
"""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastvid.batch import Channels, Features
from fastvid.features.file import describe_features, feature_header, load_features
from fastvid.features.listing import Listing, scan, what_is
from fastvid.features.manifest import read_files
from fastvid.features.names import SUFFIXES, namesake, stem
from fastvid.files import StrPath, name_of, shown

_MOST_SEARCHED = 100  # sub-folders, for features that a record names without them


class MissingFeatures(ValueError):
    """A record's video has no feature file."""


class FeatureFolder:
    """Finds the feature file that a record's `video` means, and never one outside the folder.

    A record's value is only looked up in listings of what is there, and never handed to the file system. Each
    (sub-)folder is listed once, when it is first asked for or a name is not found: files that appear later are not
    seen.

    Args:
        folder: may itself be a symbolic link; links in it must lead to places in it.
        flag: that named it, for messages.

    Attributes:
        towers: a folder for each vision tower.

    Raises:
        ValueError: `folder` is no folder.
    """

    def __init__(self, folder: StrPath, flag: str = "--video_folder"):
        self.folder, self.towers = Path(folder), (self,)
        if not self.folder.is_dir():
            raise ValueError(f"{flag} {folder} is no folder; give the one that feature extraction wrote to")
        self._root = os.path.realpath(folder)
        self._listings = {"": scan(self._root)}
        self._probed = {}
        self._read_as = {}  # file of a shortened name: the one video that it may stand for

    @property
    def empty(self) -> bool:
        """Whether neither a feature file nor a sub-folder lies in the folder."""
        return not (self._listings[""].files or self._listings[""].folders)

    def load(self, name: str) -> tuple[Features, dict[str, Any]]:
        """`load_features` of the file that `name` means.

        Raises:
            ValueError, OSError: as `resolve` and `load_features`; or it is of an image, and `name` is a video's, or the
                other way round.
        """
        path = self.resolve(name)
        features_RC, header = load_features(path)
        if fault := namesake(name, path, header):
            raise ValueError(fault)
        return features_RC, header

    def shape(self, name: str) -> tuple[int, Channels]:
        """(R, C) of the file that `name` means. Its header is read once; later changes of the file are not seen.

        Raises:
            ValueError, OSError: as `load`; nothing is remembered.
        """
        return self._probe(name)[:2]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which the file that `name` means stores its values; otherwise as `shape`."""
        return self._probe(name)[2]

    def _probe(self, name):
        if name not in self._probed:
            path = self.resolve(name)
            found, header = describe_features(path)
            if fault := namesake(name, path, header):
                raise ValueError(fault)
            self._probed[name] = found
        return self._probed[name]

    def header(self, name: str) -> dict[str, Any]:
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
        listing, inner = self._listings[""], ""
        for folder in folders:
            if folder not in listing.folders:
                raise self._missing(name, listing)
            inner = os.path.join(inner, folder)
            found = self._list(inner)
            if found is None:
                raise self._leaves(name, f"its folder {inner} is a link that leads out of {self.folder}")
            listing = found
        file = self._match(listing, inner, base, name)
        if file is None:
            raise self._missing(name, listing, base)
        if listing.files[file] and not self._inside(os.path.realpath(os.path.join(self._root, inner, file))):
            raise self._leaves(name, f"{file} is a link that leads out of {self.folder}")
        return self.folder / inner / file

    # What there is to ask of a folder where features are still to be made (`fastvid.online.folder.OnlineFeatures`).

    unmade: Sequence[Any] = ()
    cache: StrPath | None = None

    def settle(self) -> None:
        """Called once the names of all records were resolved."""

    def check_channels(self, channels: Channels) -> None:
        """Called with the model's."""

    def video_of(self, name: str) -> Any:
        """The video that features are made of."""
        return None

    def made_otherwise(self, before: dict[str, Any]) -> list[str]:
        """What makes other features than an earlier run's flags made, a line each."""
        return []

    def is_made(self, name: str) -> bool:
        return True

    def await_made(self, name: str) -> None:
        """Called before features are loaded to train on."""

    def stand_in(self, name: str) -> tuple[Features, dict[str, Any]]:
        """Called instead of `load` where the shape alone matters."""
        return self.load(name)

    def begin(self, names: Iterable[str]) -> None:
        """Called some time before `made_ahead`, with the same names."""

    @contextlib.contextmanager
    def made_ahead(self, names: Iterable[str], stopped: Callable[[], object] = lambda: False) -> Iterator[None]:
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
            raise ValueError(
                f"video {name!r} means any of {', '.join(sorted(whole))} in {self.folder / inner}; give the whole name"
            )
        for file in (one + suffix for one in whole for suffix in SUFFIXES):
            if file in listing.files:
                return file
        cut = short.partition(".")[0] + ".pkl"  # only the reference cuts names
        return self._claim(inner, cut, short, name) if cut in listing.files else None

    def _claim(self, inner, file, whole, name):
        """`file`, if no other video has been read from it: a cut name must not give one video another's features."""
        owner = self._read_as.setdefault((inner, file), whole)
        if owner != whole:
            raise ValueError(
                f"video {name!r}: {owner} and {whole} would both be read from "
                f"{self.folder / inner / file}, whose name is cut at the first dot; extract them again "
                "(fastvid extract)"
            )
        return file

    def _list(self, inner) -> Listing | None:
        """The cached listing of a sub-folder; None if a link takes it out of the root."""
        if inner not in self._listings:
            real = os.path.realpath(os.path.join(self._root, inner))
            if not self._inside(real):
                return None
            self._listings[inner] = scan(real)
        return self._listings[inner]

    def _inside(self, real):
        return real == self._root or real.startswith(os.path.join(self._root, ""))

    def _missing(self, name, listing, base=""):
        hint = "".join(
            f"; {shown(other)} lies there, but is {what or what_is(other)}"
            for other, what in listing.others.get(stem(base), [])[:3]
        )
        if "://" in name:
            hint += "; it is a URL, and must be downloaded first"
        elif "\\" in name:
            hint += "; sub-folders are written with /"
        elif elsewhere := self._everywhere.get(stem(os.path.basename(name))):
            hint += f"; {shown(elsewhere)} lies there: write its folder into the record as it is here"
        return MissingFeatures(
            f"video {name!r} has no features in {shown(self.folder)}{hint}; extract them (fastvid "
            "extract), or leave its records out (train with --on_bad_sample skip, or use "
            "scripts/filter_for_missing_videos.py)"
        )

    @cached_property
    def _everywhere(self):
        """{name without ending: a feature file of it}, in the folder itself and in the first of its sub-folders."""
        found = {}
        for inner in ("", *sorted(self._listings[""].folders)[:_MOST_SEARCHED]):
            with contextlib.suppress(OSError):
                listing = self._list(inner)
                for file in () if listing is None else listing.files:
                    found.setdefault(stem(file), os.path.join(inner, file))
        return found

    @staticmethod
    def _leaves(name, reason):
        return ValueError(f"video {name!r} is refused: {reason}")
