"""VideoInstruct's records to training records, of which those are kept whose features are there.

{"q": …, "a": …, "video_id": …}, in a JSON array or JSONL.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from fastvid.data.names import END, PATCH, START
from fastvid.data.records import RecordWriter, kind_of
from fastvid.features.names import SUFFIXES
from fastvid.files import VIDEO_SUFFIXES, StrPath, shown

_PLACEHOLDERS = ("<video>", PATCH, START, END)


@dataclass
class Converted:
    """Training records, and what became of the others.

    Attributes:
        records: training records, or a file's writer that has taken them.
        dropped: malformed ones left out, as (index, field, reason).
        absent: those left out for want of features, as (index, name of the video).
        shortened: names that were taken without the ending of a video, which features do not have.
        empty: records kept that have an empty question, and those that have an empty answer.
        placeholders: records kept that hold a placeholder beside the one that they get, which training refuses.
    """

    records: list[dict] | RecordWriter = field(default_factory=list)
    dropped: list[tuple[int, str | None, str]] = field(default_factory=list)
    absent: list[tuple[int, str]] = field(default_factory=list)
    shortened: int = 0
    empty: dict[str, int] = field(default_factory=lambda: {"question": 0, "answer": 0})
    placeholders: int = 0


def add_converted(done: Converted, record: Any, index: int, feature_ids: set[str] | None) -> tuple[str, str] | None:
    """Add a VideoInstruct record to `done` as the reference's two scripts make training records of it.

    The video stands after the question of records with an even index and before that of the others; the index counts
    all records of the file, left-out ones included.
    Source: scripts/convert_instruction_json_to_training_format.py and filter_for_missing_videos.py of PG-Video-LLaVA.

    Args:
        index: of the record in its file.
        feature_ids: one whose `video_id` is none of these, as it is or without the ending of a video, is counted in
            `done` as absent; None keeps all.

    Returns:
        (field, reason) of what is wrong with the record; None if nothing is.
    """
    fault = _fault(record)
    if fault is not None:
        return fault
    name = record["video_id"]
    if feature_ids is not None and name not in feature_ids:
        name, ending = os.path.splitext(name)
        if ending.lower() not in VIDEO_SUFFIXES or name not in feature_ids:
            done.absent.append((index, record["video_id"]))
            return None
        done.shortened += 1
    question = f"{record['q']}\n<video>" if index % 2 == 0 else f"<video>\n{record['q']}"
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": record["a"]}]
    done.records.append({"id": name, "video": f"{name}.pkl", "conversations": turns})
    done.empty["question"] += not record["q"]
    done.empty["answer"] += not record["a"]
    done.placeholders += any(word in record["q"] + record["a"] for word in _PLACEHOLDERS)
    return None


def feature_ids(folder: StrPath) -> set[str]:
    """Ids of the videos whose features lie in `folder`: names of feature files up to their first dot, as the reference
    has it.

    For files that are not the reference's, whose names are never cut, also the whole name without its ending; those in
    sub-folders are named as records name them, "sub/name".

    Raises:
        ValueError: `folder` is no folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(
            f"--clip_feature_path {shown(folder)} is no folder; give the one that feature extraction wrote to"
        )
    ids = set()
    for where, _, files in os.walk(folder):
        inner = os.path.relpath(where, folder)
        for name in files:
            before, suffix = os.path.splitext(name)
            if suffix not in SUFFIXES or not before:
                continue
            if inner == ".":
                ids.add(name.partition(".")[0])
            if suffix != ".pkl" or inner != ".":
                ids.add(os.path.normpath(os.path.join(inner, before)))
    return ids


def describe(fault: tuple[str | None, str]) -> str:
    """A (field, reason) of `fastvid.data.media.Unreadable` as part of a sentence."""
    name, reason = fault
    if name is None:
        return reason
    return f"field '{name}' {reason}" if name else f"the record {reason}"


def _fault(record) -> tuple[str, str] | None:
    """(field, reason) of what is wrong with a VideoInstruct record; None if it is well-formed."""
    if not isinstance(record, dict):
        return "", f"is {kind_of(record)}, not an object"
    for name in ("q", "a", "video_id"):
        if name not in record:
            return name, "is missing"
        if not isinstance(record[name], str):
            return name, f"is {kind_of(record[name])}, not text"
    return None if record["video_id"] else ("video_id", "is empty")
