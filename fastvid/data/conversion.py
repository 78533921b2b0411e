"""Records of other trainers and data sets, recognised and written as training records.

A record's style shows in its fields. `fastvid.data.styles` reads it; here it gets its media's places, where the style
leaves them to the trainer, and is written in the training form.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from fastvid.data.annotations import Remarks, of_other_media
from fastvid.data.instructions import Converted, add_converted, describe
from fastvid.data.media import Medium, Unreadable, placed_first, places
from fastvid.data.names import IMAGE, VIDEO
from fastvid.data.on_disk import TooDeep
from fastvid.data.records import RecordWriter, kind_of, place
from fastvid.data.styles import conversation, has
from fastvid.files import StrPath, shown

_PLACED = "no placeholder in the text: the video or image is put before the first question"
_OF_UPSTREAM = {"videoinstruct", "training", None}  # styles that the reference's files have; None: malformed records
# Records that are not converted, and why: the first line counts, of which one group of fields ("a+b") is there.
_KNOWN_BY = {
    "chosen+rejected": "holds an answer that is chosen and one that is rejected: preferences are not trained on",
    "Q+A Q1+A": "is of VCGBench, which is no training set: `fastvid evaluate --task vcg` asks its questions",
    "question+candidates question+options question+choices": "is of a multiple-choice benchmark: `fastvid evaluate "
    "--task mc` asks its questions",
    "message_lists message_list": "holds several conversations about one video; write each as a record of its own",
    "caption captions dense_captions merged_caption enCap": "holds a caption and no question with an answer; write a "
    "record of 'question' and 'answer', where the caption is the answer",
}
_NUMBER = re.compile(r"\d+")


@dataclass
class Conversion(Converted):
    """`Converted`, of records of any style.

    Attributes:
        styles: how many records there are of each; None stands for unknown ones.
        unchanged: how many were training records already.
        remarks: what was changed or left out, by kind.
    """

    styles: Counter[str | None] = field(default_factory=Counter)
    unchanged: int = 0
    remarks: Remarks = field(default_factory=Remarks)

    @property
    def of_upstream(self) -> bool:
        """Whether all records are VideoInstruct's, or none of any style."""
        return self.styles.keys() <= {"videoinstruct", None}

    def kinds(self, path: StrPath) -> list[str]:
        """Malformed records, a line for each kind with their number and the first of them."""
        kinds: dict[str, list[tuple[int, str]]] = {}
        for index, name, reason in self.dropped:
            said = describe((name, reason))
            kinds.setdefault(_NUMBER.sub("#", said), []).append((index, said))
        return [
            f"{len(members):,} record{'s' * (len(members) != 1)} cannot be converted: {members[0][1]} "
            f"(first: {place(path, members[0][0])})"
            for members in sorted(kinds.values(), key=len, reverse=True)
        ]


def style_of(record: Any) -> str | None:
    """The style of a record, a name of `fastvid.config.STYLES`; None of what is no record of any.

    "training" is the form that training reads unchanged, with videos; VCG+112K has it, too.
    """
    if not isinstance(record, dict):
        return None
    if has(record, "q", "a") and "video_id" in record:
        return "videoinstruct"
    if has(record, "QA"):
        return "videochat2"
    if isinstance(record.get("messages"), list):
        parts = any(isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in record["messages"])
        return "messages" if parts or (not record.get("videos") and not record.get("images")) else "sharegpt"
    if has(record, "query", "response"):
        return "swift"
    if has(record, "instruction", "output") or has(record, "question", "answer"):
        return "alpaca"
    if has(record, "prompt", "completion"):
        return "alpaca"
    turns = record.get("conversations" if has(record, "conversations") else "conversation")
    if not isinstance(turns, list):
        return None
    turns = [turn for turn in turns if isinstance(turn, dict)]
    text = "".join(str(turn.get("value" if has(turn, "value") else "content", "")) for turn in turns)
    if VIDEO not in text and IMAGE not in text and (record.get("video") or record.get("image")):
        return "plm"
    if record.get("image"):
        return "llava"
    if IMAGE in text and record.get("video"):
        return "llava_video"
    plain = all(turn.get("from") in ("human", "gpt") for turn in turns)
    return "training" if plain and not record.get("images") else "sharegpt"


def convert_any(
    records: Iterable[Any],
    *,
    path: StrPath,
    style: str = "auto",
    on_bad: str = "auto",
    feature_ids: set[str] | None = None,
    missing: Callable[[str], bool] | None = None,
    media_root: str | None = None,
    into: RecordWriter | None = None,
) -> Conversion:
    """Records of any style to training records, in their order; those in the training form stay as they are.

    Args:
        records: JSON values; a `TooDeep` stands for one that is not looked at, and is a malformed record.
        path: the file that they come from, for messages.
        style: one of `fastvid.config.STYLES`; a record of another is malformed.
        on_bad: as the flag of `ConvertConfig`. Of "auto" the file decides, all records of which are looked at first.
        feature_ids: as `add_converted` takes it, for VideoInstruct's records.
        missing: whether a video or an image of the others has no features; None keeps all. A ValueError of it makes
            the record malformed.
        media_root: a folder; what begins with it is named without it.
        into: takes the training records; None holds them in a list.

    Raises:
        ValueError: a malformed record, where that is an error, naming file, record, field and remedy.
    """
    done = Conversion() if into is None else Conversion(into)
    for index, record in enumerate(records):
        own = style_of(record)
        done.styles[own] += 1
        if own is None and isinstance(record, dict) and not {"q", "a"}.isdisjoint(record):
            own = "videoinstruct"  # without some field, which is told
        try:
            if isinstance(record, TooDeep):
                raise Unreadable("", record.reason)
            if not isinstance(record, dict):
                raise Unreadable("", f"is {kind_of(record)}, not an object")
            if style not in ("auto", own):
                raise Unreadable("", f"is of the style {own or 'of no trainer that is known'}, not of --from {style}")
            if own is None:
                raise Unreadable("", _why_unknown(record))
            if own == "videoinstruct":
                if fault := add_converted(done, record, index, feature_ids):
                    raise Unreadable(*fault)
                continue
            converted, remarks, names = _converted(record, index, media_root)
            absent = next(filter(missing, names), None) if missing is not None else None
        except (Unreadable, ValueError) as error:
            fault = (error.field, error.reason) if isinstance(error, Unreadable) else ("video", f"is refused: {error}")
            if on_bad == "error":
                raise _refusal(path, index, *fault) from error
            done.dropped.append((index, fault[0], fault[1]))
            continue
        if absent is not None:
            done.absent.append((index, absent))
            continue
        done.remarks.add(remarks, path, index)
        done.unchanged += converted is record
        done.records.append(converted)
    if on_bad == "auto" and done.dropped and done.styles.keys() <= _OF_UPSTREAM:
        raise _refusal(path, *done.dropped[0])
    return done


def _refusal(path, index, field, reason):
    return ValueError(
        f"{place(path, index)}: {describe((field, reason))}; mend it, or leave malformed records out with --on_bad drop"
    )


def _why_unknown(record):
    """Why a record of no style is not converted."""
    filled = [name for name, value in record.items() if value is not None]
    fields = ", ".join(map(shown, filled[:8])) + ", …" * (len(filled) > 8) or "no fields"
    for groups, reason in _KNOWN_BY.items():
        if any(set(group.split("+")).issubset(filled) for group in groups.split()):
            return f"{reason} (it has {fields})"
    return f"has {fields}: a style that is not known; docs/record-styles.md lists those that are"


def _converted(record, index, media_root):
    """(training record, remarks, names of its media) of a record."""
    read = conversation(record, index)
    if elsewhere := of_other_media(record, read):
        raise Unreadable(None, elsewhere)
    turns, remarks, media = read.turns, list(read.remarks), read.media
    if media_root is not None:
        media = [Medium(kind, _below(name, media_root)) for kind, name in media]
    first = int(turns[0]["from"] == "gpt")  # of the turns that are trained on
    if media and not places(turns) and not any(VIDEO in turn["value"] for turn in turns[first:]):
        turns = placed_first(turns, media)
        remarks.append(_PLACED)
    kind = media[0].kind if media and len({medium.kind for medium in media}) == 1 else "video"
    if kind == "image":
        turns = [
            {**turn, "value": turn["value"].replace(VIDEO, IMAGE)} if turn["from"] == "human" else turn
            for turn in turns
        ]
    placeholder, names = IMAGE if kind == "image" else VIDEO, [medium.name for medium in media]
    named = {} if not names else {kind: names[0]} if len(names) == 1 else {f"{kind}s": names}
    found = sum(turn["value"].count(placeholder if turn["from"] == "human" else VIDEO) for turn in turns[first:])
    if media and found != len(media):
        several = f"{len(media)} {kind}{'s' * (len(media) != 1)}"
        raise Unreadable("", f"has {found} {placeholder} in its text for {several}; each has one")
    if turns == record.get("conversations") and all(record.get(key) == value for key, value in named.items()):
        return record, [], names
    if not any(turn["value"] for turn in turns[first:] if turn["from"] == "gpt"):
        raise Unreadable("", "has no answer")
    return {"id": read.id, **named, "conversations": turns}, remarks, names


def _below(name, folder):
    folder = folder.rstrip("/") + "/"
    if not name.startswith(folder):
        if name.startswith("/"):
            raise Unreadable("", f"names {shown(name)}, which does not lie in --media_root {shown(folder)}")
        return name
    return name[len(folder) :]
