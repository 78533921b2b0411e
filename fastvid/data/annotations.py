"""Records of questions and answers: VideoInstruct's, and those that training reads.

VideoInstruct:  {"q": …, "a": …, "video_id": …}
training:       {"id": …, "video": "name.pkl", "conversations": [{"from": "human", "value": …}, {"from": "gpt", …}, …]}
                with "videos": [names] instead of "video" for several videos, and neither for text alone.

Either kind lies in a JSON array or in JSONL (one record per line).
"""

import json
import os
from pathlib import Path

from fastvid.files import atomic_file

_JSON_KINDS = {dict: "an object", list: "a list", str: "text", bool: "a truth value", type(None): "null"}


def read_records(path) -> list[dict]:
    """The records of a JSON array or JSONL file; which of the two it is shows in its first character.

    Lines end at "\\n" only: texts may hold U+2028 and its like. A byte-order mark and blank lines are skipped.

    Raises:
        ValueError: naming the file that cannot be read, or the line of what is no JSON or no UTF-8.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: byte {error.start} is not UTF-8 ({error.reason}); save the file as UTF-8") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); give the path of a JSON or JSONL file") from error
    first = text.lstrip()[:1]
    if first == "[":
        return _parse(text, path)
    if not first and Path(path).suffix != ".jsonl":
        raise ValueError(f"{path} is empty: expected a JSON array or one JSON object per line")
    records = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line and not line.isspace():
            records.append(_parse(line, path, number))
    return records


def _parse(text, path, number=None):
    """The value of a JSON text, which is the whole of a file or its line `number`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = "" if number is None else "; expected a JSON array or one JSON object per line"
        raise ValueError(f"{path}: line {number or error.lineno}, column {error.colno}: {error.msg}{hint}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; thousands of brackets
        where = path if number is None else f"{path}: line {number}"
        raise ValueError(f"{where} is not what a data file can hold ({error})") from error


def write_records(path, records):
    """Write JSONL if `path` ends in .jsonl, else one JSON array as ``json.dump`` writes it by default; atomically."""
    with atomic_file(path) as file:
        if Path(path).suffix == ".jsonl":
            file.writelines(json.dumps(record).encode("ascii") + b"\n" for record in records)
        else:
            file.write(json.dumps(records).encode("ascii"))


def convert_records(records, feature_ids=None, on_bad="error", path="records"):
    """VideoInstruct records to training records, as the reference's two scripts do.

    The video stands after the question of records with an even index and before that of the others; the index counts
    the records given, left-out ones included.
    Source: scripts/convert_instruction_json_to_training_format.py and filter_for_missing_videos.py of PG-Video-LLaVA.

    Args:
        feature_ids: keep only records whose `video_id` is one of these; None keeps all.
        on_bad: "error" or "drop": what a malformed record does.
        path: the file that the records come from, for messages.

    Returns:
        (training records, dropped records as (index, field, reason)).

    Raises:
        ValueError: a malformed record under on_bad="error", naming file, index, field and remedy.
    """
    converted, dropped = [], []
    for index, record in enumerate(records):
        fault = _instruction_fault(record)
        if fault is not None:
            if on_bad == "error":
                raise ValueError(f"{path}: record {index} (from 0): {describe(fault)}; "
                                 "mend it, or leave malformed records out with --on_bad drop")
            dropped.append((index, *fault))
            continue
        name = record["video_id"]
        if feature_ids is not None and name not in feature_ids:
            continue
        question = f"{record['q']}\n<video>" if index % 2 == 0 else f"<video>\n{record['q']}"
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": record["a"]}]
        converted.append({"id": name, "video": f"{name}.pkl", "conversations": turns})
    return converted, dropped


def feature_ids(folder) -> set[str]:
    """Ids of the videos whose features lie in `folder`: file names up to their first dot, as the reference has it.

    For fastvid's own files, whose names are never cut, also the whole name without .safetensors; those in sub-folders
    are named as records name them, "sub/name".

    Raises:
        ValueError: `folder` is no folder.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"--clip_feature_path {folder} is no folder; give the one that feature extraction wrote to")
    names = os.listdir(folder)
    ids = {name.partition(".")[0] for name in names}
    for where, _, files in os.walk(folder):
        inner = os.path.relpath(where, folder)
        for name in files:
            stem, suffix = os.path.splitext(name)
            if suffix == ".safetensors" or suffix == ".pkl" and inner != ".":
                ids.add(os.path.normpath(os.path.join(inner, stem)))
    return ids


def check_record(record, index, path) -> str | None:
    """Why a *training* record is malformed, naming file, index and field; None if it is well-formed."""
    fault = training_fault(record)
    return None if fault is None else f"{path}: record {index} (from 0): {describe(fault)}"


def record_videos(record) -> list[str]:
    """The videos of a well-formed training record, in the order of its <video> placeholders."""
    if record.get("videos") is not None:
        return record["videos"]
    return [] if record.get("video") is None else [record["video"]]


def training_fault(record):
    """(field, reason) of what is wrong with a training record; None if it is well-formed. No field: the whole of it."""
    if not isinstance(record, dict):
        return "", f"is {_kind(record)}, not an object"
    if "id" not in record:
        return "id", "is missing"
    if not isinstance(record["id"], str):
        return "id", f"is {_kind(record['id'])}, not text"
    for name in ("video", "videos"):
        videos = record.get(name)
        listed = [videos] if name == "video" else videos
        if videos is None:
            continue
        if not isinstance(listed, list) or not all(isinstance(video, str) and video for video in listed):
            return name, f"is not {'a file name' if name == 'video' else 'a list of file names'}"
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        return "conversations", "is not a list of turns with at least one"
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or turn.get("from") not in ("human", "gpt"):
            return "conversations", f"turn {number} does not say that it is \"from\": \"human\" or \"gpt\""
        if not isinstance(turn.get("value"), str):
            return "conversations", f"turn {number} has no text as \"value\""
        if half := half_character(turn["value"]):
            return "conversations", f"turn {number} holds {half}"
    return None


def half_character(text) -> str | None:
    """What part of a character `text` holds, which JSON can write and no tokenizer can read; None if it is sound."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{ascii(text[error.start])}, half of a surrogate pair, which is no character"
    return None


def _instruction_fault(record):
    """(field, reason) of what is wrong with a VideoInstruct record; None if it is well-formed."""
    if not isinstance(record, dict):
        return "", f"is {_kind(record)}, not an object"
    for name in ("q", "a", "video_id"):
        if name not in record:
            training = " (this is a training record already)" if "conversations" in record else ""
            return name, f"is missing{training}"
        if not isinstance(record[name], str):
            return name, f"is {_kind(record[name])}, not text"
    return None if record["video_id"] else ("video_id", "is empty")


def describe(fault):
    """A (field, reason) as part of a sentence."""
    field, reason = fault
    return f"field '{field}' {reason}" if field else f"the record {reason}"


def _kind(value):
    return _JSON_KINDS.get(type(value), "a number")
