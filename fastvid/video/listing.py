"""The videos in a folder, and the feature file that each becomes."""

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

from fastvid.files import VIDEO_SUFFIXES, name_of, shown, wrong_content

_OURS = (".safetensors", ".pkl", ".jsonl")  # what extraction writes may lie beside the videos
# How pictures begin. An animated GIF is a video.
_PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Video:
    """A video to be extracted.

    Attributes:
        path: its file.
        name: relative to the folder of videos.
        output: its feature file.
        fault: why it can have none; None if it can.
    """

    path: Path
    name: str
    output: Path
    fault: str | None = None

    def size(self) -> int | None:
        """Bytes of the video; None if it cannot be looked at."""
        try:
            return os.stat(self.path).st_size
        except OSError:
            return None


def no_video(path) -> str | None:
    """Why a file that cannot be decoded is no video, as far as its first bytes tell, with the remedy; None otherwise.

    A part of a sentence that begins after the file's name.
    """
    if fault := wrong_content(path):
        return fault
    with open(path, "rb") as file:
        head = file.read(16)
    if head.startswith(_PICTURES) or head[:4] == b"RIFF" and head[8:12] == b"WEBP" or head[4:12] == b"ftypheic":
        return "is an image, not a video"
    return None


def find_videos(folder, output_folder, suffix, *, follow_links=False) -> tuple[list[Video], Counter]:
    """The videos below `folder` by their endings, sorted by name; feature files mirror its sub-folders.

    Hidden files and folders are left out; links only where they are followed, and then each folder once.

    Returns:
        (videos, {ending, or "links": how many other files there are of it})

    Raises:
        ValueError: there is no such folder or no video in it.
    """
    if not os.path.isdir(folder):
        what = ("is a URL: download the videos and give their folder" if "://" in str(folder) else
                f"is a file; give the folder that it lies in, {shown(os.path.dirname(folder) or '.')}"
                if os.path.isfile(folder) else "does not exist; give the folder of the videos")
        raise ValueError(f"--video_dir_path {shown(folder)} {what}")
    videos, others, seen = {}, Counter(), set()
    for where, folders, files in os.walk(folder, followlinks=follow_links):
        folders[:] = [name for name in folders if not _hidden(name)]
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        links = [] if follow_links else [name for name in folders if os.path.islink(os.path.join(where, name))]
        others["links"] += len(links)
        inner = os.path.relpath(where, folder)
        inner = "" if inner == "." else inner
        for file in sorted(files):
            stem, ending = os.path.splitext(file)
            if _hidden(file):
                continue
            if ending.lower() not in VIDEO_SUFFIXES:
                if ending not in _OURS:
                    others[ending.lower() or "no ending"] += 1
            elif not follow_links and os.path.islink(os.path.join(where, file)):
                others["links"] += 1
            else:
                output = os.path.join(output_folder, inner, name_of(stem, suffix))
                videos.setdefault(output, []).append(
                    Video(Path(where, file), os.path.join(inner, file), Path(output)))
    others = +others
    if not videos:
        links = f"; {others['links']} links are not followed without --follow_links True" if others["links"] else ""
        raise ValueError(f"--video_dir_path {folder}: no file in it ends as a video does (.mp4, .mkv, …){links}")
    found = [replace(video, fault=_fault(video, same)) if len(same) > 1 else video
             for same in videos.values() for video in same]
    return sorted(found, key=lambda video: video.name), others


def _hidden(name):
    return name.startswith(".") and not name.startswith("..")


def _fault(video, same):
    """Why a video can have no feature file: another one of `same` would have it as well."""
    other = next(one for one in same if one is not video)
    return f"{other.name} would be written to {video.output.name} as well; rename one of them"
