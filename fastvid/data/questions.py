"""Questions about videos, and the files that they mean.

A questions file holds {"video": …, "question": …} records, as JSONL or a JSON array.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from fastvid.data.records import read_records


@dataclass(frozen=True)
class Question:
    """One question about one file.

    Attributes:
        video: the file as the user or the questions file named it.
        path: the file.
        text: the question.
    """

    video: str
    path: Path
    text: str


def list_media(path, suffixes) -> dict[str, Path]:
    """The files with one of `suffixes` below a folder, by their names relative to it; or the one file that `path` is.

    Raises:
        ValueError: a folder without any.
    """
    path = Path(path)
    if not path.is_dir():
        return {path.name: path}
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    files = {file.relative_to(path).as_posix(): file for file in found if not file.name.startswith(".")}
    if not files:
        raise ValueError(f"{path}: no file in it ends in one of {', '.join(suffixes)}")
    return files


def read_questions(path, files, suffixes, folder=None):
    """The questions of a file, each with the file that it is about.

    A question means the listed file of its `video`'s name, else one whose name differs in the ending alone. It is only
    looked up, and never opened, so that no name leads elsewhere. `video` may be missing where one file is listed.

    Args:
        path: questions file.
        files: as `list_media` gives them.
        suffixes: endings, in the order in which one of several files is taken.
        folder: where `files` were listed; a link in it that leads out of it is not followed for a questions file.

    Returns:
        (list of Question, list of what is wrong with the other records)

    Raises:
        ValueError: the file is no JSON or JSONL.
    """
    by_stem = {}
    for name in sorted(files, key=lambda name: (_rank(name, suffixes), name)):
        by_stem.setdefault(_stem(name, suffixes), name)
    only = next(iter(files)) if len(files) == 1 else None
    questions, faults = [], []
    for index, record in enumerate(read_records(path)):
        where = f"{path}: record {index} (from 0)"
        if not isinstance(record, dict) or not isinstance(record.get("question"), str):
            faults.append(f'{where} has no text as "question"')
            continue
        video = record.get("video", only)
        found = None
        if isinstance(video, str):
            found = video if video in files else by_stem.get(_stem(video, suffixes))
        if found is None:
            faults.append(f'{where}: "video" is {video!r}, which is none of the {len(files)} files of --video')
        elif folder is not None and not _inside(files[found], folder):
            faults.append(f'{where}: "video" is {video!r}, a link that leads out of {folder}; refused')
        else:
            questions.append(Question(video, files[found], record["question"]))
    return questions, faults


def _inside(path, folder):
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _rank(name, suffixes):
    suffix = Path(name).suffix.lower()
    return suffixes.index(suffix) if suffix in suffixes else len(suffixes)


def _stem(name, suffixes):
    """`name` without its ending, if it is one of `suffixes`."""
    return name.removesuffix(Path(name).suffix) if _rank(name, suffixes) < len(suffixes) else name
