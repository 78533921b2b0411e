"""The videos in a folder, and the feature file that each becomes."""

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fastvid.files import wrong_content

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".gif"}


_OURS = (".safetensors", ".pkl", ".jsonl")  # what extraction writes may lie beside the videos
# How pictures begin. An animated GIF is a video.
_PICTURES = (b"\x89PNG\r\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*")


@dataclass(frozen=True)
class Video:
    """A video to be extracted: its file, its name relative to the folder of videos, and its feature file."""

    path: Path
    name: str
    output: Path


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


def find_videos(folder, output_folder, suffix) -> tuple[list[Video], Counter]:
    """The videos below `folder` by their endings, sorted by name; feature files mirror its sub-folders.

    Links to folders are followed, each folder once. Hidden files and folders are left out.

    Returns:
        (videos, {ending: how many other files have it})

    Raises:
        ValueError: there is no such folder or no video in it, or two videos differ in their endings alone.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--video_dir_path {folder}: no such folder")
    videos, others, seen = {}, Counter(), set()
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        for file in sorted(files):
            path = Path(where, file)
            if file.startswith("."):
                continue
            if path.suffix.lower() not in VIDEO_SUFFIXES:
                if path.suffix not in _OURS:
                    others[path.suffix.lower() or "no ending"] += 1
                continue
            name = path.relative_to(folder)
            video = Video(path, name.as_posix(), Path(output_folder, name.with_name(name.stem + suffix)))
            other = videos.setdefault(video.output, video)
            if other is not video:
                raise ValueError(f"{other.path} and {path} would both be written to {video.output}; rename one of them")
    if not videos:
        raise ValueError(f"--video_dir_path {folder}: no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) in it")
    return sorted(videos.values(), key=lambda video: video.name), others
