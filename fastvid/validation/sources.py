"""What an extraction's manifest and the videos themselves say about each feature file."""

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastvid.features.folder import FeatureFolder
from fastvid.features.manifest import read_files, read_manifest
from fastvid.features.names import medium, stem
from fastvid.files import StrPath, shown
from fastvid.video.decode import DecodeError
from fastvid.video.decode.still import is_still
from fastvid.video.features import written
from fastvid.video.listing import Video, find_videos

_REMEDY = "remove it and extract it again (fastvid extract)"


def _sorted(given, follow_links):
    """Images, then videos, which are meant where both have a name."""
    videos, _ = find_videos(given, "", "", follow_links=follow_links, images=True)
    return sorted(videos, key=lambda video: not is_still(video.name))


class Sources:
    """The manifest of a folder of features, and the folder of their videos where it is given.

    Args:
        video_folder: of the features.
        video_dir_path: of the videos, or a pattern, a list or a tar shard as extraction takes them; None: they are not
            looked at.

    Attributes:
        given: whether there is a folder of videos.

    Raises:
        ValueError: `video_dir_path` is none of these, names no video, or is a list that leads out of its folder.
    """

    def __init__(self, video_folder: StrPath, video_dir_path: StrPath | None = None):
        self.folder, self.given = video_folder, video_dir_path is not None
        entries = read_manifest(video_folder)
        failed = {name: str(entry.get("reason")) for name, entry in entries.items() if entry.get("status") == "failed"}
        others = {stem(name) for name in entries.keys() - failed.keys()}
        # Of a video beside an image of its name one fails; a name that tells neither means the other one.
        self._failed: dict[tuple[str, str | None], str] = {
            (stem(name), None): reason for name, reason in failed.items() if stem(name) not in others
        }
        self._failed |= {(stem(name), medium(name)): reason for name, reason in failed.items()}
        self._lines = read_files(video_folder)
        # A list may come with a data set, and whoever wrote it must not choose files elsewhere.
        is_list = video_dir_path is not None and os.path.isfile(video_dir_path)
        try:
            videos = [] if video_dir_path is None else _sorted(video_dir_path, not is_list)
        except ValueError as error:
            if "--follow_links" not in str(error):
                raise
            raise ValueError(f"{error} (of fastvid extract alone); give the folder of the videos instead") from error
        self._videos = {os.path.normpath(video.name): video for video in videos}
        self._by_stem = {stem(name): name for name in self._videos}

    def failure(self, name: str) -> str | None:
        """Why the extraction of a record's video failed when it was last tried; None if it did not."""
        return self._failed.get((_id(name), medium(name)))

    def video_of(self, name: str, header: object = ()) -> Video | None:
        """The video that a record names, or that the header of its features does; None where it does not lie there."""
        source = header.get("source") if isinstance(header, dict) else None
        if isinstance(source, str) and os.path.normpath(source) in self._videos:
            return self._videos[os.path.normpath(source)]
        return self._videos.get(self._by_stem.get(_id(name), ""))

    def path_of(self, name: str, header: object = ()) -> Path | None:
        """The file of `video_of`; None also of one in a tar shard."""
        video = self.video_of(name, header)
        return None if video is None or video.within else video.path

    def unnamed(self, names: Iterable[str], images: bool) -> int:
        """Videos in the folder that none of the records' `names` means.

        Args:
            images: the data set has images, so that those in the folder count as well.
        """
        there = {key for key, name in self._by_stem.items() if images or not is_still(name)}
        return len(there - {_id(name) for name in names})

    def header_of(
        self, features: FeatureFolder, name: str, path: Path, header: dict[str, Any], quick: bool
    ) -> dict[str, Any]:
        """What is known of how a feature file was made: its header, or of a pickle the manifest's line about it.

        The line counts where the pickle is the very file that it is about: by its digest, or under `quick`, which
        reads no values, by its size and time.
        """
        if path.suffix != ".pkl":
            return header
        if not quick:
            return features.header(name)
        line = self._lines.get(path.relative_to(self.folder).as_posix(), {})
        return line if line.get("written") == written(path) else {}

    def stale(self, name: str, path: Path, header: dict[str, Any], quick: bool) -> tuple[bool, str | None]:
        """(Whether it can be told, why a feature file is not of the video as it is now).

        The video's size is compared, and without `quick` also its sha256. A video that is not there is not compared.

        Raises:
            OSError: the video cannot be read.
        """
        video, size, digest = self.video_of(name, header), header.get("source_bytes"), header.get("source_sha256")
        if failed := self.failure(name):
            why = f"the last extraction of its video failed ({failed}): it is of an earlier one"
        else:
            why = None
        if video is None or not isinstance(size, int):
            return why is not None, why and f"{shown(path)} is stale: {why}"
        found, shown_name = video.size(), shown(video.name if video.within else video.path)
        if found != size:
            return True, (
                f"{shown(path)} was made of {size:,} bytes, and {shown_name} has {found:,}: the video was "
                f"changed since; {_REMEDY}"
            )
        if quick or not isinstance(digest, str):
            return True, why and f"{shown(path)} is stale: {why}"
        try:
            with video.file() as copy, open(copy, "rb") as file:
                same = hashlib.file_digest(file, "sha256").hexdigest() == digest
        except DecodeError as error:
            raise OSError(error.reason) from error
        return True, None if same else (
            f"{shown(path)} was made of other bytes than {shown_name} holds: the video was changed since; {_REMEDY}"
        )


def _id(name):
    return stem(os.path.normpath(name)) if name else name
