"""The videos in a folder, and the feature file that each becomes."""

import os
from dataclasses import dataclass
from pathlib import Path

VIDEO_SUFFIXES = {".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp", ".gif"}


@dataclass(frozen=True)
class Video:
    """A video to be extracted: its file, its name relative to the folder of videos, and its feature file."""

    path: Path
    name: str
    output: Path


def find_videos(folder, output_folder, suffix) -> list[Video]:
    """The videos below `folder` by their endings, sorted by name; feature files mirror its sub-folders.

    Links to folders are followed, each folder once. Hidden files and folders are left out.

    Raises:
        ValueError: there is no such folder or no video in it, or two videos differ in their endings alone.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--video_dir_path {folder}: no such folder")
    videos, seen = {}, set()
    for where, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        if os.path.realpath(where) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        for file in sorted(files):
            path = Path(where, file)
            if path.suffix.lower() not in VIDEO_SUFFIXES or file.startswith("."):
                continue
            name = path.relative_to(folder)
            video = Video(path, name.as_posix(), Path(output_folder, name.with_name(name.stem + suffix)))
            other = videos.setdefault(video.output, video)
            if other is not video:
                raise ValueError(f"{other.path} and {path} would both be written to {video.output}; rename one of them")
    if not videos:
        raise ValueError(f"--video_dir_path {folder}: no videos ({', '.join(sorted(VIDEO_SUFFIXES))}) in it")
    return sorted(videos.values(), key=lambda video: video.name)
