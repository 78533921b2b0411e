"""Training records: what training, validation and inspection make of one, the same for all three.

{"id": …, "video": "name.pkl", "conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}

with "videos": [names] instead of "video" for several videos, "image" or "images" and <image> for images, and none of
these for text alone. `fastvid.data.styles` reads what other trainers write.
"""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastvid.config.policy import Policy
from fastvid.data.media import Unreadable
from fastvid.data.names import ASSISTANT, END, EOS, IMAGE, PATCH, START, UNK, VIDEO
from fastvid.data.records import place
from fastvid.data.styles import Conversation, conversation
from fastvid.features.names import SUFFIXES
from fastvid.files import IMAGE_SUFFIXES, VIDEO_SUFFIXES, StrPath, shown

_MOST_LINES = 20  # kinds of remarks that are told
_OTHER_MEDIA = re.compile(r"(audio|sound|speech|point_?cloud)s?(_?(path|file|filename|name|url|id)s?)?", re.IGNORECASE)
_OTHER_PLACEHOLDER = re.compile(
    r"<(image|img|audio|sound|speech)([_-]?(here|pad|placeholder|token|start|end|\d+))?>|<im_(start|patch|end)>"
    r"|<\|(image|audio|vision)(_?(pad|placeholder|start|end|\d+))?\|>",
    re.IGNORECASE,
)
_TAG = re.compile(r"<\|?[A-Za-z]\w*\|?>")
_FILES_OF_OTHERS = (".wav", ".mp3", ".flac", ".ogg", ".m4a", ".ply", ".pcd")
_SEPARATOR = f" {ASSISTANT}: "
_READ = {"id", "video", "videos", "image", "images", "conversations"}  # fields of training records
_NAMES = {
    "video": re.compile(r"(video|gif)_?(path|file|filename|name|url|id)s?", re.IGNORECASE),
    "image": re.compile(
        r"(image_?|(img|photo|picture)s?_?)(path|file|filename|name|url|id)s?|(img|photo|picture)s?", re.IGNORECASE
    ),
}


class Fault(NamedTuple):
    """Why a record cannot be trained on.

    Attributes:
        kind: heads a list of records of the kind.
        text: of this record, as part of a sentence.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Examined:
    """What is made of one record.

    Attributes:
        record: in the form of `fastvid.data.styles`; None where it is no conversation.
        fault: why it cannot be trained on; None if it can, as far as record and flags tell.
        remarks: what is left out, changed or unusual; the same text for each record of the same kind.
    """

    record: dict | None
    fault: Fault | None
    remarks: list[str]


def examine(record: Any, number: int = 0, *, policy: Policy, use_start_end: bool) -> Examined:
    """What training makes of a record, which needs neither tokenizer nor features.

    Args:
        record: any JSON value; it is not changed.
        number: of the record in its file.
        policy: `fastvid.config.Policy`.
        use_start_end: <vid_start> and <vid_end> are placeholders of the model.
    """
    try:
        read = conversation(record, number)
    except Unreadable as fault:
        kind = f"malformed record, field '{fault.field}'" if fault.field else "malformed record"
        where = f"field '{fault.field}'" if fault.field else "the record"
        return Examined(None, Fault(kind, f"{where} {fault.reason}"), [])
    media, remarks, read = read.media, read.remarks, read.record
    texts, videos = asked_and_answered(read), len(media)
    whole = "\n".join(texts)  # no placeholder holds a line's end
    other = _OTHER_PLACEHOLDER.search(whole)
    fault = _other_medium(record, media, texts[::2], other) or _placeholder_fault(whole, use_start_end)
    if videos and not fault and whole.count(VIDEO) != videos:
        fault = _video_fault(read, media, texts)
    # The reference keeps a sample that it has masked: it takes its place in the batch and adds nothing to the loss.
    if not policy.mask_by_retokenizing:
        if not any(texts[1::2]):
            fault = fault or Fault("no answer", "no supervised token: no turn from gpt with an answer")
        remarks += _supervised_as_written(texts, whole)
    if len(texts) < len(read["conversations"]):
        remarks.append("the first turn is from gpt: it is left out")
    if not videos and VIDEO in whole:
        remarks.append(f"{VIDEO} in a record without a video: it stays text")
    if videos and any(VIDEO in text for text in texts[1::2]):
        remarks.append(f"{VIDEO} stands in an answer, not in a question")
    if videos and other:
        remarks.append(f"{other[0]} in the text of a record with a video: it stays text")
    return Examined(read, fault, [] if fault else remarks)


@dataclass
class Remarks:
    """Remarks about records, by kind: how many there are of each, and the first record."""

    counts: Counter = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, remarks: Iterable[str], path: StrPath, number: int) -> None:
        for remark in remarks:
            self.counts[remark] += 1
            self.first.setdefault(remark, place(path, number))

    def lines(self) -> list[str]:
        """One line per kind."""
        lines = [
            f"{count:,} record{'s' * (count != 1)}: {remark} (first: {self.first[remark]})"
            for remark, count in self.counts.most_common(_MOST_LINES)
        ]
        more = len(self.counts) - len(lines)
        return lines + [f"… and {more} more kinds of remarks"] * (more > 0)


def of_other_media(record: dict[str, Any], read: Conversation) -> str | None:
    """Why a record is about something that a training record of it would not name; None if it is not.

    Args:
        record: as it was given.
        read: what it says.
    """
    texts = asked_and_answered(read.record)
    fault = _other_medium(record, read.media, texts[::2], _OTHER_PLACEHOLDER.search("\n".join(texts)))
    return fault and fault.text


def asked_and_answered(record: dict[str, Any]) -> list[str]:
    """The questions and answers in turn; what gpt says before the first question is left out."""
    turns = record["conversations"]
    return [turn["value"] for turn in turns[turns[0]["from"] == "gpt" :]]


def placeholder_in(text: str, use_start_end: bool) -> str | None:
    """Why a text cannot stand beside a video's placeholders; None if it can."""
    for token in (PATCH, START, END) if use_start_end else (PATCH,):
        if token in text:
            return f"the text holds {token}, which is the model's own placeholder; take it out of the text"
    return None


def _placeholder_fault(text, use_start_end):
    found = placeholder_in(text, use_start_end)
    return Fault("the model's own placeholders in the text", found) if found else None


def _other_medium(record, media, questions, placeholder):
    """The fault of a record that is about something else than videos, images and text, or names them elsewhere.

    Args:
        media: that it names.
        questions: its texts; only one with a tag of some kind asks about a file that a field may name.
        placeholder: match of a placeholder of something else in its texts; None without one.
    """
    for name, value in record.items():
        if name in _READ or _is_empty(value) or isinstance(value, (bool, float)):
            continue
        if isinstance(value, int):  # as some sets number their videos, or their images
            for kind, pattern in _NAMES.items():
                if not media and pattern.fullmatch(name):
                    return _named_elsewhere(name, kind)
            continue
        if _OTHER_MEDIA.fullmatch(name) and (placeholder or not media):
            return _of_something_else(f"field '{shown(name)}'")
        for kind, pattern in _NAMES.items():
            if pattern.fullmatch(name) and (not media or (placeholder and kind == "image")):
                return _named_elsewhere(name, kind)
        if not media and isinstance(value, dict) and not _is_empty(value.get("source_video_id")):  # PLM's clips
            return _named_elsewhere(f"{name}.source_video_id", "video")
    for name, value in record.items() if not media and any(map(_TAG.search, questions)) else ():
        for file in value if isinstance(value, list) else [value]:
            if not isinstance(file, str) or name == "id":
                continue
            if file.lower().endswith((*VIDEO_SUFFIXES, *SUFFIXES[:2])):
                return _named_elsewhere(name, "video")
            if file.lower().endswith(IMAGE_SUFFIXES) and _of_images(placeholder):
                return _named_elsewhere(name, "image")
            if file.lower().endswith((*IMAGE_SUFFIXES, *_FILES_OF_OTHERS)):
                return _of_something_else(f"field '{shown(name)}'")
    if placeholder and not media:
        said = f"the text holds {placeholder[0]}, but the record names no file"
        if (placeholder[1] or placeholder[5] or "im").lower() in ("image", "img", "im", "vision"):
            return Fault("placeholders without a file", f"{said}; name its image in 'image'")
        return _of_something_else(said)
    return None


def _is_empty(value):
    """Whether a field says nothing. 0 is the number of a video as others are."""
    return value is None or value in ("", [], {})


def _of_images(placeholder):
    return bool(placeholder) and any(word in placeholder[0].lower() for word in ("im", "vision"))


def _of_something_else(what):
    return Fault(
        "records of something else than videos, images and text",
        f"{what}: only videos, images and text are trained on; leave the record out",
    )


def _named_elsewhere(field, kind):
    return Fault(
        f"the {kind}'s name in another field",
        f"field '{shown(field)}' is not read; a record names its {kind} in '{kind}'",
    )


def _video_fault(record, media, texts):
    """The fault of a record whose placeholders are not as many as its videos and images."""
    videos, count = len(media), sum(text.count(VIDEO) for text in texts)
    kind = media[0].kind
    placeholder = IMAGE if kind == "image" and not count else VIDEO
    said = f"{count} {placeholder} in the text for {videos} {kind}{'s' * (videos != 1)}"
    left_out = VIDEO in record["conversations"][0]["value"] and len(texts) < len(record["conversations"])
    if count > videos:
        remedy = f'a record of several {kind}s lists them as "{kind}s", one for each placeholder'
    elif left_out:
        remedy = f"the first turn is from gpt and left out; put {VIDEO} into the question"
    else:
        remedy = f"put {placeholder} into the question" + f", once for each {kind}" * (videos > 1)
        others = Counter(match[0] for text in texts for match in _OTHER_PLACEHOLDER.finditer(text))
        remedy += "".join(f" (it holds {number} {other})" for other, number in others.items())
    return Fault(f"{VIDEO} placeholders and videos differ in number", f"{said}; {remedy}")


def _supervised_as_written(texts, whole):
    """What makes the reference mask the whole sample; `whole` is the texts in one."""
    for what, found in (
        (f'the text holds "{EOS}"', EOS in whole),
        (f'the text holds "{UNK}"', UNK in whole),
        (f'the text holds " {ASSISTANT}: "', _SEPARATOR in whole),
        ("a question is empty", "" in texts[::2]),
    ):
        if found:
            yield f"{what}: its answers are supervised as written (--parity reference leaves the sample out)"
            return
