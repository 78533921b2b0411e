"""VideoInstruct's records to training records, of which those are kept whose features are there.

{"q": …, "a": …, "video_id": …}, in a JSON array or JSONL.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from fastvid.data.records import RecordWriter, kind_of, place
from fastvid.features.names import SUFFIXES
from fastvid.files import VIDEO_SUFFIXES, StrPath, shown


@dataclass
class Converted:
    """Training records, and what became of the others.

    Attributes:
        records: training records, or a file's writer that has taken them.
        dropped: malformed ones left out, as (index, field, reason).
        absent: those left out for want of features, as (index, name of the video).
        shortened: names that were taken without the ending of a video, which features do not have.
        empty: records kept that have an empty question, and those that have an empty answer.
    """

    records: list[dict] | RecordWriter = field(default_factory=list)
    dropped: list[tuple[int, str, str]] = field(default_factory=list)
    absent: list[tuple[int, str]] = field(default_factory=list)
    shortened: int = 0
    empty: dict[str, int] = field(default_factory=lambda: {"question": 0, "answer": 0})


def convert_records(
    records: Sequence[Any],
    feature_ids: set[str] | None = None,
    on_bad: str = "error",
    path: StrPath = "records",
) -> Converted:
    """VideoInstruct records to training records, as the reference's two scripts do.

    The video stands after the question of records with an even index and before that of the others; the index counts
    the records given, left-out ones included.
    Source: scripts/convert_instruction_json_to_training_format.py and filter_for_missing_videos.py of PG-Video-LLaVA.

    Args:
        feature_ids: keep only records whose `video_id` is one of these, as it is or without the ending of a video;
            None keeps all.
        on_bad: "error" or "drop": what a malformed record does.
        path: the file that the records come from, for messages.

    Raises:
        ValueError: a malformed record under on_bad="error", naming file, index, field and remedy.
    """
    done = Converted()
    for index, record in enumerate(records):
        fault = add_converted(done, record, index, feature_ids)
        if fault is not None and on_bad == "error":
            raise ValueError(
                f"{place(path, index)}: {describe(fault)}; mend it, or leave malformed records out with --on_bad drop"
            )
        if fault is not None:
            done.dropped.append((index, *fault))
    return done


def add_converted(done: Converted, record: Any, index: int, feature_ids: set[str] | None) -> tuple[str, str] | None:
    """Add a record to `done`, or count it there as absent; (field, reason) of what is wrong with it, or None.

    Args:
        index: of the record in its file, which decides where the video stands.
        feature_ids: as `convert_records` takes it.
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


def describe(fault: tuple[str, str]) -> str:
    """A (field, reason) as part of a sentence."""
    name, reason = fault
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
