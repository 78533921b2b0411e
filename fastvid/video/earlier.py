"""Feature files that lie in an extraction's folder already: what they were made with, and whether that is this job's.

Features take hours: those of other settings are not replaced unless the user says so. Nor may a file of one format or
tower pass for one of another.
"""

import hashlib
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from fastvid.config import ExtractConfig
from fastvid.config.pooling import RECIPE
from fastvid.features.file import feature_header, probe_features
from fastvid.features.manifest import Manifest
from fastvid.features.names import SUFFIXES
from fastvid.video.decode.still import is_still
from fastvid.video.features import written
from fastvid.video.listing import Video

# Defaults for a setting that is missing in a header or entry, which may be older than the setting.
_DEFAULTS = {"conversion": "swscale", "tower_dtype": "auto", "pooling": RECIPE}


class EarlierFeatures:
    """What lies in the folder that an extraction writes to, by listings, headers and the manifest; no tensor is read.

    An entry of the manifest is trusted if it matches a feature file's size and modification time. Otherwise the header
    of the file is read; of a pickle, which has none, the sha256 must be its entry's.

    Args:
        config: `ExtractConfig`.
        settings: of this job (`VideoFeatures.settings`).
        shape: [rows, channels] of its videos' features.
        manifest: `Manifest` of the folder.
    """

    def __init__(self, config: ExtractConfig, settings: dict[str, Any], shape: Sequence[int], manifest: Manifest):
        self.folder, self.format, self.overwrite = Path(config.clip_feat_path), config.format, config.overwrite
        self.settings, self.shape, self.manifest = settings, list(shape), manifest
        self._prefix, self._differences = os.path.join(self.folder, ""), {}
        self._names = {}  # of the files in each folder of features
        self._matching = {}  # of videos, the manifest entry that matches their feature file

    def refuse_other_settings(self, videos: Collection[Video]) -> None:
        """Refuse a job whose folder holds features of its videos that were made with other settings.

        ``--overwrite`` lets it replace its own format's; those of another format would stay, and training may read
        them.

        Raises:
            ValueError: says how many there are, of what, and what to do.
        """
        mine, others = self._of_other_settings(videos)
        if (mine or others) and self.manifest.look_again():  # another process wrote them since the manifest was read
            mine, others = self._of_other_settings(videos)
        if others:
            raise ValueError(
                f"{self.folder} holds {len(others)} feature files of another format and other settings, "
                f"which training might read instead ({others[0]}); choose another --clip_feat_path, or "
                "remove them"
            )
        if mine and not self.overwrite:
            raise ValueError(
                f"{self.folder} holds {len(mine)} feature files of other settings ({mine[0]}); choose "
                "another --clip_feat_path, or replace them with --overwrite True"
            )

    def _of_other_settings(self, videos):
        """What feature files of other settings there are: (those of this job's format, those of others)."""
        mine, others = [], []
        for video in videos:
            for path in self._there(video.target):
                found = mine if path == video.target else others
                try:
                    matching = self._matching_entry(path)
                    made = matching or feature_header(path) or self._by_manifest(video, path)
                except (ValueError, OSError):  # damaged: made again
                    continue
                if matching and found is mine:
                    self._matching[video.name] = matching
                if why := self._difference(made, video):
                    found.append(f"{path} was made with {why}")
        return mine, others

    def look_again(self) -> None:
        """Take in what other processes have written since."""
        self.manifest.look_again(for_new=True)
        self._names.clear()
        self._matching.clear()

    def judge(self, video: Video, *, fresh: bool = False) -> tuple[int, str | None, str | None]:
        """(bytes of a video, why it is extracted, why it cannot be).

        Why it is extracted: None if it has no features, "" if it has those that it should.
        """
        if video.fault is not None:
            return 0, None, video.fault
        try:
            size = video.size(fresh=fresh)
            redo, foreign = self.why_again(video, size, fresh=fresh)
        except OSError as error:
            return 0, None, f"cannot be read ({error.strerror})"
        if foreign and not self.overwrite:
            return size, redo, f"{redo}; remove it, or replace such files with --overwrite True"
        return size, redo, None

    def why_again(self, video: Video, source_bytes: int, *, fresh: bool = False) -> tuple[str | None, bool]:
        """(why a video's feature file is not valid for this job, whether it may be somebody else's).

        The reason is "" if the file is valid, None if there is none.

        Args:
            fresh: ask the disk, not the listing of a while ago.
        """
        path, made = video.target, {} if fresh else self._matching.get(video.name, {})
        if not made and not (os.path.isfile(path) if fresh else path in self._there(path)):
            return None, False
        if fresh and not self._matching_entry(path):
            self.manifest.look_again()
        made = made or self._matching_entry(path)
        try:
            shape = made["shape"] if made else list(probe_features(path)[:2])
            made = made or feature_header(path)
        except (ValueError, OSError) as error:
            return str(error), False
        if not made:
            made = self._by_manifest(video, path)
            digest = made.get("sha256")
            if digest is not None and digest != hashlib.sha256(Path(path).read_bytes()).hexdigest():
                return f"{path} is not the file that its manifest entry describes", True
        if other := self._difference(made, video):
            return f"{path} was made with {other}", True
        if made.get("source_bytes") != source_bytes:
            return f"{path} was made with source_bytes {made.get('source_bytes', 'unknown')}, not {source_bytes}", False
        if shape != self._shape_of(video):
            return f"{path} holds {shape} values", False
        return "", False

    def _shape_of(self, video):
        """Of an image, the rows of its patches."""
        rows = (
            (self.settings["image_size"] // self.settings["patch_size"]) ** 2 if is_still(video.name) else self.shape[0]
        )
        return [rows, self.shape[1]]

    def _there(self, target) -> list[str]:
        """The feature files, of any format, that a video has; `target` is that of this job's."""
        folder, slash, name = target.rpartition("/")
        folder += slash
        if folder not in self._names:
            self._names[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        names, stem = self._names[folder], name.removesuffix(f".{self.format}")
        return [folder + stem + suffix for suffix in SUFFIXES if stem + suffix in names]

    def _named(self, path):
        """A file's name in the manifest."""
        return path.removeprefix(self._prefix)

    def _matching_entry(self, path) -> dict:
        """The manifest entry about a file, if it matches the file's size and modification time; {} without one."""
        entry = self.manifest.files.get(self._named(path), {})
        return entry if "written" in entry and entry["written"] == written(path) else {}

    def _by_manifest(self, video, path) -> dict:
        """The manifest entry about a file without a header; {} if there is none about that file.

        An entry of an older version names no file; it is used where only one file can be meant.
        """
        entry = self.manifest.files.get(self._named(path))
        if entry is not None:
            return entry
        entry = self.manifest.entries.get(video.name, {})
        return {} if "file" in entry or len(self._there(video.target)) > 1 else entry

    def _difference(self, made, video) -> str | None:
        """How settings noted in a header or manifest differ from this job's, in words; None if they do not."""
        still = is_still(video.name)
        noted = still, made.get("tower"), *map(made.get, self.settings)  # the same in most of them
        try:
            return self._differences[noted]
        except KeyError:
            return self._differences.setdefault(noted, self._found_difference(made, still))
        except TypeError:  # a list or an object, which no setting is
            return self._found_difference(made, still)

    def _found_difference(self, made, still):
        for name, value in self.settings.items():
            found = made.get(name, _DEFAULTS.get(name, "unknown"))
            if found != value and not (still and name == "pooling"):  # an image's rows are its patches' in any case
                of = f" (of {made['tower']})" if name == "tower_revision" and made.get("tower") else ""
                return f"{name} {found}{of}, not {value}"
        return None
