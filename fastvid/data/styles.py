"""Records as other trainers write them, read as training records.

The form that all else works on is ``{"id": text, "video": name, "conversations": [{"from": "human" or "gpt", "value":
text}, …]}``, with "videos" for several and neither for text alone. What another form unmistakably means is taken, with
a remark; what could mean several things is refused by name.
"""

import json
import math
import re
from typing import Any

from fastvid.data.names import VIDEO
from fastvid.data.records import kind_of
from fastvid.files import shown

_ROLES = {
    "human": "human",
    "user": "human",
    "gpt": "gpt",
    "assistant": "gpt",
    "chatgpt": "gpt",
    "model": "gpt",
    "bot": "gpt",
}
_TURN = {"from", "value", "role", "content"}
_FORM = '"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]'
# Placeholders of a video as trainers spell them, with what they put around one; the longest first.
_PLACEHOLDER = re.compile(
    r"<\|vision_start\|><\|(?:image|video)_pad\|><\|vision_end\|>"
    r"|<(?:video|vid)>\s*<(?:video|vid|image)_?here>\s*</(?:video|vid)>|<(?:video|vid)>\s*</(?:video|vid)>"
    r"|< ?(?:image|video|vid)(?:[_-]?(?:here|pad|placeholder|token))? ?/?>|<\|(?:image|video)(?:_pad)?\|>",
    re.IGNORECASE,
)
# Numbers and truth values of a record that would change what is trained, where they were used.
_WOULD_CHANGE = re.compile(
    r"((clip|segment|video)_?)?(start|end|begin)_?(time|sec|second|frame)?s?|(loss_?)?weight|loss", re.IGNORECASE
)


class Unreadable(ValueError):
    """A record is no conversation.

    Attributes:
        field: that is at fault; empty for the whole record.
        reason: continues a sentence that begins with the field.
    """

    def __init__(self, field: str, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def canonical(record: Any, number: int = 0) -> tuple[dict[str, Any], list[str]]:
    """A record in the form that all else works on.

    Args:
        record: any JSON value; it is not changed.
        number: of the record, which names one without an id.

    Returns:
        (new record of "id", "video" or "videos", and "conversations"; what was changed or left out, a text for each
        kind that is the same for all records of the kind)

    Raises:
        Unreadable: it cannot be one.
    """
    if not isinstance(record, dict):
        raise Unreadable("", f"is {kind_of(record)}, not an object")
    remarks = []
    names = _videos(record, remarks)
    turns, used = _conversation(record, remarks)
    if names:
        turns = _with_placeholders(turns, len(names), remarks)
    used |= {"id", "video", "videos"}
    for name, value in record.items():
        telling = (isinstance(value, (str, list, dict)) and value) or (
            value is not None and _WOULD_CHANGE.fullmatch(name)
        )
        if name not in used and telling:
            remarks.append(f"field '{shown(name)}' is not used")
    name = record.get("id")
    if not isinstance(name, (str, int, float)) or isinstance(name, bool):
        name = number
    videos = {} if not names else {"video": names[0]} if len(names) == 1 else {"videos": names}
    return {"id": str(name), **videos, "conversations": turns}, remarks


def record_videos(record: dict[str, Any]) -> list[str]:
    """The videos of a record in the form of `canonical`, in the order of its <video> placeholders."""
    if "videos" in record:
        return record["videos"]
    return [record["video"]] if "video" in record else []


def half_character(text: str) -> str | None:
    """What part of a character `text` holds, which JSON can write and no tokenizer can read; None if it is sound."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{text[error.start]!a}, half of a surrogate pair, which is no character"
    return None


def _videos(record, remarks):
    """Names of the record's videos."""
    video, videos = record.get("video"), record.get("videos")
    if isinstance(video, list):
        if video:
            remarks.append("field 'video' is a list: its names are taken as \"videos\"")
    elif video is not None:
        if not isinstance(video, str) or not video:
            raise Unreadable("video", "is not a file name" + (f", but {kind_of(video)}" if video != "" else " (empty)"))
        video = [video]
    if isinstance(videos, str) and videos:
        remarks.append("field 'videos' is one name: it is taken as \"video\"")
        videos = [videos]
    for field, names in (("video", video), ("videos", videos)):
        if names is not None and not (
            isinstance(names, list) and all(isinstance(name, str) and name for name in names)
        ):
            what = (
                next((kind_of(name) for name in names if not isinstance(name, str)), "an empty text")
                if isinstance(names, list)
                else kind_of(names)
            )
            raise Unreadable(field, f"is not a list of file names, but {'holds ' * isinstance(names, list)}{what}")
    if video and videos and video != videos:
        remarks.append("field 'video' is not used beside 'videos'")
    return videos or video or []


def _conversation(record, remarks):
    """(turns from human and gpt in turn, the fields that they were read from)."""
    for field in ("conversations", "messages", "conversation"):
        if record.get(field) is not None:
            if field != "conversations":
                remarks.append(f"field '{field}' is read as \"conversations\"")
            return _turns(record[field], field, remarks), {field}
    for question, answer, more in (
        ("query", "response", None),
        ("instruction", "output", "input"),
        ("question", "answer", None),
    ):
        if question in record and answer in record:
            remarks.append(f"fields '{question}' and '{answer}' are read as \"conversations\"")
            return _question_and_answer(record, question, answer, more, remarks), {question, answer, more, "history"}
    if isinstance(record.get("QA"), list) and record["QA"]:
        return _video_chat2(record, remarks), {"QA"}
    if "conversations" in record:
        raise Unreadable("conversations", "is not a list of turns with at least one")
    if {"q", "a", "video_id"} <= record.keys():
        raise Unreadable(
            "conversations",
            "is missing: this is a record of VideoInstruct, of which fastvid convert makes a training record",
        )
    fields = ", ".join(shown(name) for name in list(record)[:8]) or "no fields"
    raise Unreadable("conversations", f"is missing (the record has {fields}); write {_FORM}")


def _turns(listed, field, remarks):
    if not isinstance(listed, list) or not listed:
        what = "" if isinstance(listed, list) else f", but {kind_of(listed)}"
        raise Unreadable(field, f"is not a list of turns with at least one{what}")
    turns = []
    for number, turn in enumerate(listed):
        if not isinstance(turn, dict):
            raise Unreadable(field, f'turn {number} does not say that it is "from": "human" or "gpt"')
        given = turn.get("from", turn.get("role"))
        if not isinstance(given, str):
            raise Unreadable(field, f'turn {number} does not say that it is "from": "human" or "gpt"')
        role = _ROLES.get(given.strip().lower())
        key = "value" if "value" in turn or "content" not in turn else "content"
        if key not in turn:
            fields = ", ".join(shown(name) for name in list(turn)[:8])
            raise Unreadable(field, f'turn {number} has no text as "value" (it has {fields})')
        text = _text(turn[key], field, f"turn {number}", key, remarks)
        if role is None and given.lower() == "system" and not turns:
            if text:
                _add(remarks, "the first turn, from system, is left out: the template has a system text of its own")
            continue
        if role is None:
            raise Unreadable(
                field,
                f'turn {number} is from "{shown(given)}"; write "human" for who asks and "gpt" for '
                "who answers, and leave other turns out",
            )
        if role != given:
            _add(remarks, "roles such as user and assistant are read as human and gpt")
        if turns and turns[-1]["from"] == role:
            raise Unreadable(field, f"turn {number} is from {given} again; human and gpt must take turns")
        for name in turn.keys() - _TURN:
            if turn[name] is not None:
                _add(remarks, f"field '{shown(name)}' of a turn is not used")
        turns.append({"from": role, "value": text})
    if not turns:
        raise Unreadable(field, "has no turn from human or gpt")
    return turns


def _question_and_answer(record, question, answer, more, remarks):
    """A record of ms-swift's or Alpaca's kind: a last question and answer, and "history" for those before."""
    turns = []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise Unreadable("history", "is not a list of [question, answer]")
    for number, pair in enumerate(history):
        turns += [_text(text, "history", f"turn {number}", "text", remarks) for text in pair]
    asked = [_text(record[question], question, "", question, remarks)]
    if more is not None and record.get(more):
        asked.append(_text(record[more], more, "", more, remarks))
    turns += ["\n".join(asked), _text(record[answer], answer, "", answer, remarks)]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def _video_chat2(record, remarks):
    """VideoChat2's questions and answers: the video, and what to do with it, come before the first question."""
    remarks.append("field 'QA' is read as \"conversations\", with <video> before the first question")
    turns = []
    for number, pair in enumerate(record["QA"]):
        if not isinstance(pair, dict) or "q" not in pair or "a" not in pair:
            raise Unreadable("QA", f"entry {number} is not an object of q and a")
        asked = [_text(pair["q"], "QA", f"entry {number}", "q", remarks)]
        if pair.get("i") and number == 0:
            asked.insert(0, _text(pair["i"], "QA", "entry 0", "i", remarks))
        elif pair.get("i"):
            _add(remarks, "field 'i' of a later entry of 'QA' is not used")
        if number == 0 and VIDEO not in "".join(asked):
            asked.insert(0, VIDEO)
        turns += ["\n".join(filter(None, asked)), _text(pair["a"], "QA", f"entry {number}", "a", remarks)]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def _with_placeholders(turns, count, remarks):
    """The turns with <video> for another spelling of the placeholder, where that is the only one."""
    asked = turns[turns[0]["from"] == "gpt" :]
    found = [match[0] for turn in asked for match in _PLACEHOLDER.finditer(turn["value"])]
    if VIDEO in found or len(found) != count or len(set(found)) != 1:
        return turns
    remarks.append(f"{found[0]} is read as {VIDEO}, the placeholder of the record's video")
    return [{**turn, "value": turn["value"].replace(found[0], VIDEO)} for turn in turns]


def _text(value, field, where, key, remarks):
    """A text, or a number written as one."""
    if isinstance(value, str) and value.isascii():
        return value
    before = f"{where} " if where else ""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        _add(remarks, "a number stands where a text is wanted: its digits are taken")
        return json.dumps(value)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        raise Unreadable(
            field,
            f'{before}has a list of parts as "{key}"; write it as one text, with {VIDEO} where the '
            'video belongs, and name the video in "video"',
        )
    if not isinstance(value, str):
        raise Unreadable(field, f'{before}has no text as "{key}", but {kind_of(value)}')
    if half := half_character(value):
        raise Unreadable(field, f"{before}holds {half}")
    return value


def _add(remarks, remark):
    if remark not in remarks:
        remarks.append(remark)
