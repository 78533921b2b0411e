"""Records as other trainers write them, read as training records.

The form that all else works on is ``{"id": text, "video": name, "conversations": [{"from": "human" or "gpt", "value":
text}, …]}``, with "videos" for several and neither for text alone. An image is a video of one frame: it has a name and
a <video> as well. What another form unmistakably means is taken, with a remark; what could mean several things is
refused by name.
"""

import json
import math
import re
from dataclasses import dataclass
from typing import Any

from fastvid.data.media import Medium, Unreadable, check_answers, in_text, named_in, part, questions, shows
from fastvid.data.names import IMAGE, VIDEO
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
# Numbers and truth values of a record that would change what is trained, where they were used.
_WOULD_CHANGE = re.compile(
    r"((clip|segment|video)_?)?(start|end|begin)_?(time|sec|second|frame)?s?|(loss_?)?weight|loss", re.IGNORECASE
)


@dataclass(frozen=True)
class Conversation:
    """A record, whoever wrote it.

    Attributes:
        id: its own, or its number.
        media: videos and images in the order of their placeholders.
        turns: from human and gpt in turn; each medium of `media` has a <video>, if its record says where it belongs.
        remarks: what was changed or left out, a text for each kind that is the same for all records of the kind.
    """

    id: str
    media: list[Medium]
    turns: list[dict[str, str]]
    remarks: list[str]

    @property
    def record(self) -> dict[str, Any]:
        """In the form that all else works on."""
        names = [medium.name for medium in self.media]
        videos = {} if not names else {"video": names[0]} if len(names) == 1 else {"videos": names}
        return {"id": self.id, **videos, "conversations": self.turns}


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
    read = conversation(record, number)
    return read.record, read.remarks


def conversation(record: Any, number: int = 0) -> Conversation:
    """What a record says; arguments and errors as `canonical`'s."""
    if not isinstance(record, dict):
        raise Unreadable("", f"is {kind_of(record)}, not an object")
    remarks, media = [], []
    turns, used = _conversation(record, remarks, media)
    used.add("id")
    if not media:
        videos = named_in(record, "video", remarks)
        wanted = not videos or any(IMAGE in text for text in questions(turns))  # beside a video it may be a thumbnail
        turns, media = in_text(turns, videos, named_in(record, "image", remarks) if wanted else [], remarks)
        used |= {"video", "videos"}
        if any(medium.kind == "image" for medium in media):
            used |= {"image", "images"}
    if media:
        videos_alone = all(medium.kind == "video" for medium in media)
        check_answers(turns, as_upstream=videos_alone and "conversations" in used)
    for name, value in record.items():
        telling = (isinstance(value, (str, list, dict)) and value) or (
            value is not None and _WOULD_CHANGE.fullmatch(name)
        )
        if name not in used and telling:
            remarks.append(f"field '{shown(name)}' is not used")
    name = record.get("id")
    if not isinstance(name, (str, int, float)) or isinstance(name, bool):
        name = number
    return Conversation(str(name), media, turns, remarks)


def record_videos(record: dict[str, Any]) -> list[str]:
    """The videos of a record in the form of `canonical`, in the order of its <video> placeholders."""
    if "videos" in record:
        return record["videos"]
    return [record["video"]] if "video" in record else []


def has(record: dict[str, Any], *fields: str) -> bool:
    """Whether a record has all of these fields, and one that is not null: a table of several sets has nulls for the
    fields of the others.
    """
    return all(field in record for field in fields) and any(record[field] is not None for field in fields)


def half_character(text: str) -> str | None:
    """What part of a character `text` holds, which JSON can write and no tokenizer can read; None if it is sound."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"{text[error.start]!a}, half of a surrogate pair, which is no character"
    return None


def _conversation(record, remarks, media):
    """(turns from human and gpt in turn, the fields that they were read from); media named in turns are added."""
    for field in ("conversations", "messages", "conversation"):
        if record.get(field) is not None:
            if field != "conversations":
                remarks.append(f"field '{field}' is read as \"conversations\"")
            return _turns(record[field], field, remarks, media), {field}
    for question, answer, more in (
        ("query", "response", None),
        ("instruction", "output", "input"),
        ("question", "answer", None),
        ("prompt", "completion", None),
    ):
        if has(record, question, answer):
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


def _turns(listed, field, remarks, media):
    if not isinstance(listed, list) or not listed:
        what = "" if isinstance(listed, list) else f", but {kind_of(listed)}"
        raise Unreadable(field, f"is not a list of turns with at least one{what}")
    turns = []
    for number, turn in enumerate(listed):
        if not isinstance(turn, dict):
            raise Unreadable(field, f"turn {number} is {kind_of(turn)}, not an object; write {_FORM}")
        given = turn.get("from")
        if given is None:
            given = turn.get("role")
        if not isinstance(given, str):
            raise Unreadable(field, f'turn {number} does not say that it is "from": "human" or "gpt"')
        role = _ROLES.get(given.strip().lower())
        key = "content" if turn.get("value") is None and "content" in turn else "value"
        if key not in turn:
            fields = ", ".join(shown(name) for name in list(turn)[:8])
            raise Unreadable(field, f'turn {number} has no text as "value" (it has {fields})')
        text = _of_parts(turn[key], field, f"turn {number}", key, remarks, media)
        if role != "human" and isinstance(turn[key], list) and any(map(shows, turn[key])):
            raise Unreadable(field, f"turn {number}, from {shown(given)}, holds a file; put it into a question")
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
    shown_first = any(record.get(field) for field in ("video", "videos", "image", "images"))
    remarks.append(
        "field 'QA' is read as \"conversations\"" + f", with {VIDEO} before the first question" * shown_first
    )
    turns = []
    for number, pair in enumerate(record["QA"]):
        if not isinstance(pair, dict) or "q" not in pair or "a" not in pair:
            raise Unreadable("QA", f"entry {number} is not an object of q and a")
        asked = [_text(pair["q"], "QA", f"entry {number}", "q", remarks)]
        if pair.get("i") and number == 0:
            asked.insert(0, _text(pair["i"], "QA", "entry 0", "i", remarks))
        elif pair.get("i"):
            _add(remarks, "field 'i' of a later entry of 'QA' is not used")
        if number == 0 and shown_first and VIDEO not in "".join(asked):
            asked.insert(0, VIDEO)
        turns += ["\n".join(filter(None, asked)), _text(pair["a"], "QA", f"entry {number}", "a", remarks)]
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]


def _of_parts(value, field, where, key, remarks, media):
    """A turn's text, which may be a list of parts, of text and of media: these are added, each with its placeholder."""
    if not isinstance(value, list):
        return _text(value, field, where, key, remarks)
    pieces = []
    for number, given in enumerate(value):
        if isinstance(given, str):
            pieces.append(_text(given, field, where, key, remarks))
            continue
        text, medium = part(given, field, f"{where}, part {number}")
        if medium is not None:
            media.append(medium)
        pieces.append(text if text in (VIDEO, IMAGE) else _text(text, field, where, key, remarks))
    _add(remarks, "the parts of a turn are read as one text")
    return "\n".join(piece for piece in pieces if piece)


def _text(value, field, where, key, remarks):
    """A text, or a number written as one."""
    if isinstance(value, str) and value.isascii():
        return value
    before = f"{where} " if where else ""
    if (isinstance(value, int) and not isinstance(value, bool)) or (isinstance(value, float) and math.isfinite(value)):
        _add(remarks, "a number stands where a text is wanted: its digits are taken")
        return json.dumps(value)
    if not isinstance(value, str):
        raise Unreadable(field, f'{before}has no text as "{key}", but {kind_of(value)}')
    if half := half_character(value):
        raise Unreadable(field, f"{before}holds {half}")
    return value


def _add(remarks, remark):
    if remark not in remarks:
        remarks.append(remark)
