"""Questions about videos, and the files that they mean.

A questions file is JSONL or a JSON array of one of

    {"video": …, "question": …}                       fastvid's own
    {"video_name": …, "question": …, "question_id": …}  ActivityNet-QA and its like; their answers lie in another file
    {"video_name": …, "Q": …, "A": …}                 Video-ChatGPT's benchmark
    {"video_name": …, "Q1": …, "Q2": …, "A": …}       its test of consistency: two questions that mean the same
    {"video_id": …, "q": …, "a": …}                   VideoInstruct

Whatever else a record holds goes to the output with the answer.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastvid.data.records import place, read_records
from fastvid.features.names import stem
from fastvid.files import StrPath, is_url, shown

_VIDEO = ("video", "video_name", "video_id")
_TEXTS = (("question",), ("Q",), ("q",), ("Q1", "Q2"))
_BENCHMARK = {("Q",): ("pred",), ("Q1", "Q2"): ("pred1", "pred2")}  # what the benchmark's scoring scripts read


@dataclass(frozen=True)
class Question:
    """What one record asks about one file.

    Attributes:
        video: the file as the user or the questions file named it.
        path: the file; None where there is a fault.
        texts: the question; two of a test of consistency.
        record: of a questions file; None of a question from elsewhere.
        fault: why the record cannot be answered; None if it can.
    """

    video: str
    path: Path | None
    texts: tuple[str, ...] = ()
    record: object = None
    fault: str | None = None

    def line(self, answers: Sequence[str], fault: object = None) -> dict[str, Any]:
        """What is written about it: the record, "video", "question", and "answer" or "error".

        A record's own "answer" is kept as "reference_answer". Of two questions there are two answers, in lists; answers
        to the benchmark's records have the benchmark's names as well ("pred"; "pred1", "pred2").
        """
        held = dict(self.record) if isinstance(self.record, dict) else {}
        if "answer" in held:
            held["reference_answer"] = held.pop("answer")
        line = {"video": self.video, "question": _one_or_list(self.texts), **held}
        if fault is not None:
            return {**line, "error": str(fault)}
        names = next((names for keys, names in _BENCHMARK.items() if set(keys) <= held.keys()), ())
        return {**line, "answer": _one_or_list(answers), **dict(zip(names, answers))}


def list_media(path: StrPath, suffixes: Sequence[str]) -> dict[str, Path]:
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


class MediaNames:
    """Which of the listed files a record's name means: that of its name, else one whose name differs in the ending
    alone, else, as the reference looks for ActivityNet's, one with "v_" before that.

    A name is only looked up, and never opened, so that none leads elsewhere.

    Args:
        files: as `list_media` gives them.
        suffixes: endings, in the order in which one of several files is taken.
    """

    def __init__(self, files: dict[str, Path], suffixes: Sequence[str]):
        self.files, self._by_stem = files, {}
        for name in sorted(files, key=lambda name: (_rank(name, suffixes), name)):
            self._by_stem.setdefault(stem(name), name)

    def find(self, video: str) -> str | None:
        """The name of a listed file, or None."""
        if video in self.files:
            return video
        asked = stem(video)
        head, _, tail = asked.rpartition("/")
        return self._by_stem.get(asked) or self._by_stem.get(f"{head}/v_{tail}".lstrip("/"))


def read_questions(
    path: StrPath, files: dict[str, Path], suffixes: Sequence[str], folder: StrPath | None = None
) -> list[Question]:
    """The questions of a file, one for each record, in its order, each with the file that it is about.

    `MediaNames` says which file a question means. The video may be missing where one file is listed.

    Args:
        path: questions file.
        files: as `list_media` gives them.
        suffixes: endings, in the order in which one of several files is taken.
        folder: where `files` were listed; a link in it that leads out of it is not followed for a questions file.

    Raises:
        ValueError: the file is no JSON or JSONL, or holds no record.
    """
    names = MediaNames(files, suffixes)
    only = next(iter(files)) if len(files) == 1 else None

    def question(record, where):
        if not isinstance(record, dict):
            return Question("", None, (), record, f"{where} is no object")
        keys = next((keys for keys in _TEXTS if set(keys) <= record.keys()), None)
        name = next((name for name in _VIDEO if name in record), None)
        video = only if name is None else record[name]
        video = str(video) if isinstance(video, int) and not isinstance(video, bool) else video
        said = video if isinstance(video, str) else ""
        if keys is None or not all(isinstance(record[key], str) for key in keys):
            return Question(said, None, (), record, f'{where} has no text as "question" (or "Q", or "Q1" and "Q2")')
        texts = tuple(record[key] for key in keys)
        found = names.find(video) if isinstance(video, str) else None
        fault = None
        if name is None and only is None:
            fault = f'{where} names no video ("video" or "video_name"), and --video holds {len(files)} files'
        elif isinstance(video, str) and is_url(video):
            fault = (
                f'{where}: "{name}" is {shown(video)}, a URL; download the videos into the folder of --video, and '
                "give their names there"
            )
        elif found is None:
            fault = f'{where}: "{name}" is {video!r}, which is none of the {len(files)} files of --video'
        elif folder is not None and not inside(files[found], folder):
            fault = f'{where}: "{name}" is {video!r}, a link that leads out of {folder}; refused'
        path = files[found] if fault is None and found is not None else None
        return Question(said, path, texts, record, fault)

    records = read_records(path)
    if not records:
        raise ValueError(f"--questions_file {path} is empty: it holds no question")
    return [question(record, place(path, index)) for index, record in enumerate(records)]


def _one_or_list(values):
    return values[0] if len(values) == 1 else list(values)


def inside(path: StrPath, folder: StrPath) -> bool:
    """Whether a file lies below a folder, its links followed."""
    return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


def _rank(name, suffixes):
    suffix = Path(name).suffix.lower()
    return suffixes.index(suffix) if suffix in suffixes else len(suffixes)
