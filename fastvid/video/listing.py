"""The videos and images that a user means, and the feature file that each becomes."""

import contextlib
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from fastvid.files import (
    IMAGE_SUFFIXES,
    MEDIA_SUFFIXES,
    NOTHING_MORE_FITS,
    VIDEO_SUFFIXES,
    StrPath,
    name_of,
    naming,
    shown,
    wrong_content,
)
from fastvid.video.decode import DecodeError
from fastvid.video.decode.still import is_still
from fastvid.video.named_inputs import TAR, is_pattern, lines, matches, members

_OURS = (".safetensors", ".pkl", ".jsonl")  # what extraction writes may lie beside the videos
# How pictures begin. An animated GIF is a video.
_PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Video:
    """A video, or an image, to be extracted.

    Attributes:
        source: its file, or the tar archive that holds it; `path` is the same as a Path.
        name: relative to the folder of videos.
        target: its feature file; `output` is the same as a Path. There may be millions of videos: making a Path takes
            as long as asking the disk for a file.
        fault: why it can have none; None if it can.
        within: (first byte, bytes) of it in the archive; None of a file of its own.
        known_size: bytes of it when it was first looked at; None if that was not done.
    """

    source: str
    name: str
    target: str
    fault: str | None = None
    within: tuple[int, int] | None = None
    known_size: int | None = None

    @property
    def path(self) -> Path:
        return Path(self.source)

    @property
    def output(self) -> Path:
        return Path(self.target)

    def lease(self, folder: StrPath) -> str:
        """What its lease in `folder` is called: two that would write the same file exclude each other."""
        return os.path.relpath(self.target, folder)

    def size(self, *, fresh: bool = False) -> int:
        """Bytes of the video.

        Args:
            fresh: as it is now, although it is known.

        Raises:
            OSError: it cannot be looked at.
        """
        if self.known_size is not None and not fresh:
            return self.known_size
        return self.within[1] if self.within else os.stat(self.source).st_size

    @contextlib.contextmanager
    def file(self) -> Iterator[Path]:
        """The path of a file that holds the video alone: within this block, of one from an archive.

        Raises:
            DecodeError: it cannot be taken out of its archive.
            OSError: there is no room for its copy.
        """
        if self.within is None:
            yield self.path
            return
        with contextlib.ExitStack() as stack:
            try:
                copy = stack.enter_context(
                    tempfile.NamedTemporaryFile(prefix="fastvid-", suffix=os.path.splitext(self.name)[1])
                )
                with naming(copy.name):
                    self._copy_to(copy, *self.within)
            except OSError as error:
                if error.errno in NOTHING_MORE_FITS:
                    raise
                raise DecodeError(self.path, f"cannot be taken out of its archive ({error.strerror})") from error
            yield Path(copy.name)

    def _copy_to(self, copy, begin, left):
        with open(self.path, "rb") as archive:
            while left:
                done = os.sendfile(copy.fileno(), archive.fileno(), begin, left)
                if not done:
                    raise DecodeError(self.path, "its archive ends before it does")
                begin, left = begin + done, left - done


def no_video(path: StrPath) -> str | None:
    """Why a file that cannot be decoded is no video, as far as its first bytes tell, with the remedy; None otherwise.

    A part of a sentence that begins after the file's name.
    """
    if fault := wrong_content(path):
        return fault
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(_PICTURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP") or head[4:12] == b"ftypheic":
        return "is an image, not a video"
    return None


def find_videos(
    given: StrPath, output_folder: StrPath, suffix: str, *, follow_links: bool = False, images: bool = False
) -> tuple[list[Video], Counter[str]]:
    """The videos that `given` means, sorted by name; feature files mirror their names and folders.

    Args:
        given: a folder, of which all below it are taken that end as videos do; a glob pattern; a list file; or a tar
            shard. Patterns and lists may name tar shards, too.
        follow_links: without it what is reached through a link below the folder is left out.
        images: take images, too. One whose feature file a video would have as well has a fault, and the video has none.

    Hidden files and folders are left out. A tar shard that cannot be read is one video, with that fault, where others
    are given beside it.

    Returns:
        (videos, {ending, or "links": how many other files there are of it})

    Raises:
        ValueError: there is no such thing or no video in it.
    """
    videos, others, unreadable, output_folder = [], Counter(), [], os.fspath(Path(output_folder))
    endings = MEDIA_SUFFIXES if images else VIDEO_SUFFIXES
    for name, path in _named(given, follow_links, others, endings):
        stem, ending = os.path.splitext(name)
        if ending.lower() == TAR:
            try:
                found, left_out = members(path, endings)
            except ValueError as error:
                unreadable.append(error)
                videos.append(Video(path, name, _output(output_folder, stem, suffix), str(error), (0, 0)))
                continue
            others += left_out
            for member, key, begin, size in found:
                fault = "its name leads out of its archive" if _leads_out(member) else None
                output = _output(output_folder, os.path.join(stem, os.path.basename(key) if fault else key), suffix)
                videos.append(Video(path, os.path.join(stem, member), output, fault, (begin, size)))
        else:
            videos.append(Video(path, name, _output(output_folder, stem, suffix), known_size=_size(path)))
    others = +others
    if unreadable and len(unreadable) == len(videos):
        raise unreadable[0]
    if not videos:
        links = f"; {others['links']} links are not followed without --follow_links True" if others["links"] else ""
        shards = (
            f"; for its tar shards give '{shown(os.path.join(given, '*.tar'))}'"
            if (others[TAR] and os.path.isdir(given))
            else ""
        )
        where = "in it" if os.path.isdir(given) else "that it names"
        pictures = sum(others[ending] for ending in IMAGE_SUFFIXES)
        taken = f"; --images True takes its {pictures} images" if pictures else ""
        raise ValueError(
            f"--video_dir_path {shown(given)}: no file {where} ends as a video does (.mp4, .mkv, …)"
            f"{taken}{links}{shards}"
        )
    same = {}
    for video in videos:
        same.setdefault(video.target, []).append(video)
    if len(same) < len(videos):
        videos = [
            replace(video, fault=video.fault or _fault(video, several)) if _contested(video, several) else video
            for several in same.values()
            for video in several
        ]
    return sorted(videos, key=lambda video: video.name), others


def _size(path):
    """Bytes of a file; None if it cannot be looked at, which its turn will tell."""
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _contested(video, several):
    """Whether another one has a better claim to a video's feature file: videos have one before images."""
    rivals = [one for one in several if is_still(video.name) or not is_still(one.name)]
    return len(rivals) > 1


def _named(given, follow_links, others, endings):
    """(name, path) of every video and tar shard that `given` means; counts others."""
    if os.path.isdir(given):
        return _below(given, follow_links, others, endings)
    if os.path.isfile(given):
        ending = os.path.splitext(given)[1].lower()
        if ending in endings:
            raise ValueError(
                f"--video_dir_path {shown(given)} is a file; give the folder that it lies in, "
                f"{shown(os.path.dirname(given) or '.')}"
            )
        if ending == TAR:
            return [(os.path.basename(given), given)]
        found, left_out = lines(given, follow_links)
    elif "://" not in str(given) and is_pattern(given):
        found, left_out = matches(given, follow_links, endings)
    else:
        what = (
            "is a URL: download the videos and give their folder"
            if "://" in str(given)
            else "does not exist; give the folder of the videos"
        )
        raise ValueError(f"--video_dir_path {shown(given)} {what}")
    others += left_out
    return found.items()


def _below(folder, follow_links, others, endings):
    """(name, path) of the videos below a folder, each folder once; counts others."""
    seen, folders = set(), [("", os.fspath(folder))]
    while folders:
        inner, where = folders.pop()
        if os.path.realpath(where) in seen:
            continue
        seen.add(os.path.realpath(where))
        try:
            with os.scandir(where) as found:
                entries = [entry for entry in found if not _hidden(entry.name)]
        except OSError:  # one that may not be read
            continue
        for entry in entries:
            name, ending = inner + entry.name, os.path.splitext(entry.name)[1]
            if _is_folder(entry):
                if follow_links or not entry.is_symlink():
                    folders.append((f"{name}/", entry.path))
                else:
                    others["links"] += 1
            elif ending.lower() not in endings:
                if ending not in _OURS:
                    others[ending.lower() or "no ending"] += 1
            elif not follow_links and entry.is_symlink():
                others["links"] += 1
            else:
                yield name, entry.path


def _is_folder(entry):
    try:
        return entry.is_dir()
    except OSError:
        return False


def _output(folder, stem, suffix):
    inner, slash, base = stem.rpartition("/")
    path = f"{folder}/{inner}{slash}{name_of(base, suffix)}"
    return os.fspath(Path(path)) if "//" in path or "/./" in path else path


def _hidden(name):
    return name.startswith(".") and not name.startswith("..")


def _leads_out(name):
    return name.startswith("/") or ".." in name.split("/")


def _fault(video, same):
    """Why a video can have no feature file: another one of `same` would have it as well."""
    other = next(one for one in same if one is not video)
    return (
        f"another one has the same feature file: {other.name} would be written to {video.output.name} as well; "
        "rename one of them"
    )
