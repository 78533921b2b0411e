"""The videos and images of a record: where it names them, and which placeholder of its text each has."""

import re
from typing import Any, NamedTuple

from fastvid.data.names import IMAGE, VIDEO
from fastvid.data.records import kind_of
from fastvid.files import shown

_PLACEHOLDERS = {"video": VIDEO, "image": IMAGE}
# Placeholders as trainers spell them, with what they put around one; the longest first.
_SPELLED = re.compile(
    r"<\|vision_start\|><\|(?:image|video)_pad\|><\|vision_end\|>"
    r"|<(?:video|vid)>\s*<(?:video|vid|image)_?here>\s*</(?:video|vid)>|<(?:video|vid)>\s*</(?:video|vid)>"
    r"|< ?(?:image|video|vid)(?:[_-]?(?:here|pad|placeholder|token))? ?/?>|<\|(?:image|video)(?:_pad)?\|>",
    re.IGNORECASE,
)
_EITHER = re.compile(f"{VIDEO}|{IMAGE}")
_TYPES = {
    **dict.fromkeys(("text", "input_text", "output_text"), "text"),
    **dict.fromkeys(("image", "image_url", "input_image"), "image"),
    **dict.fromkeys(("video", "video_url", "input_video"), "video"),
}


class Medium(NamedTuple):
    """A video or an image of a record.

    Attributes:
        kind: "video" or "image".
        name: as the record gives it.
    """

    kind: str
    name: str


class Unreadable(ValueError):
    """A record is no conversation.

    Attributes:
        field: that is at fault; empty for the whole record; None where the reason is a sentence by itself.
        reason: continues a sentence that begins with the field.
    """

    def __init__(self, field: str | None, reason: str):
        super().__init__(field, reason)
        self.field, self.reason = field, reason


def named_in(record: dict[str, Any], kind: str, remarks: list[str]) -> list[Medium]:
    """The media that the fields `kind` and its plural name.

    Args:
        kind: "video" or "image".
        remarks: gets what was unusual.

    Raises:
        Unreadable: they do not hold names of files.
    """
    several = f"{kind}s"
    one, many = record.get(kind), record.get(several)
    if isinstance(one, list):
        if one:
            remarks.append(f"field '{kind}' is a list: its names are taken as \"{several}\"")
    elif one is not None:
        if kind == "image" and one == "":
            one = None
        elif not _is_name(one):
            raise Unreadable(kind, _within(one) or f"is not a file name{' (empty)' if one == '' else _but(one)}")
        else:
            one = [one]
    if isinstance(many, str) and many:
        remarks.append(f"field '{several}' is one name: it is taken as \"{kind}\"")
        many = [many]
    for field, names in ((kind, one), (several, many)):
        if names is None or (isinstance(names, list) and all(map(_is_name, names))):
            continue
        wrong = names
        if isinstance(names, list):
            wrong = next(name for name in names if not _is_name(name))
            what = "an empty text" if wrong == "" else kind_of(wrong)
        else:
            what = kind_of(names)
        within = _within(wrong)
        raise Unreadable(
            field, within or f"is not a list of file names, but {'holds ' * isinstance(names, list)}{what}"
        )
    if one and many and one != many:
        remarks.append(f"field '{kind}' is not used beside '{several}'")
    return [Medium(kind, _name(name)) for name in many or one or []]


def in_text(
    turns: list[dict[str, str]], videos: list[Medium], images: list[Medium], remarks: list[str]
) -> tuple[list[dict[str, str]], list[Medium]]:
    """The turns with a <video> for each medium, and the media in the order of these.

    Args:
        turns: of the record. Placeholders count in questions alone; in answers they are text.
        videos, images: of the record. Images beside videos have an <image> each; one that none asks about is left out.
        remarks: gets what was unusual.

    Raises:
        Unreadable: there are videos and images, and the placeholders of either are not as many.
    """
    if videos and images:
        found = [match[0] for text in questions(turns) for match in _EITHER.finditer(text)]
        if IMAGE not in found:
            return _with_placeholders(turns, videos, remarks), videos
        for kind, media in (("video", videos), ("image", images)):
            if found.count(_PLACEHOLDERS[kind]) != len(media):
                raise Unreadable(
                    f"{kind}s",
                    f"names {len(media)}, and the text holds {found.count(_PLACEHOLDERS[kind])} "
                    f"{_PLACEHOLDERS[kind]}; a record of videos and images has one for each",
                )
        left = {VIDEO: iter(videos), IMAGE: iter(images)}
        return _replaced(turns, IMAGE), [next(left[each]) for each in found]
    media = videos or images
    return (_with_placeholders(turns, media, remarks) if media else turns), media


def part(given: Any, field: str, where: str) -> tuple[str, Medium | None]:
    """(text, medium or None) of a part of a turn, as OpenAI's and Hugging Face's chats have them.

    Raises:
        Unreadable: it is of another kind, or holds a picture itself.
    """
    if not isinstance(given, dict):
        raise Unreadable(field, f"{where} is {kind_of(given)}, not a part of text, image or video")
    said, kind = _type_of(given)
    if kind is None:
        raise Unreadable(field, f"{where} is of the type {shown(str(said))}; only text, images and videos are read")
    if kind == "text":
        return given.get("text") or "", None
    value = next((given[key] for key in (said, kind, f"{kind}_url", "path", "url", "file") if given.get(key)), None)
    if isinstance(value, dict):
        value = value.get("url") or value.get("path")
    if value is None:
        return _PLACEHOLDERS[kind], None  # the record names it
    if within := _within(value):
        raise Unreadable(field, f"{where} {within}")
    if not isinstance(value, str):
        raise Unreadable(field, f"{where} does not name a file{_but(value)}")
    return VIDEO, Medium(kind, _name(value))


def shows(given: Any) -> bool:
    """Whether a part of a turn is an image or a video, which the record may name beside its turns."""
    return isinstance(given, dict) and _type_of(given)[1] not in (None, "text")


def placed_first(turns: list[dict[str, str]], media: list[Medium]) -> list[dict[str, str]]:
    """The turns with the media before the first question, one a line: where trainers put those without a place."""
    number = int(turns[0]["from"] == "gpt")
    if number == len(turns):
        return turns
    first = {**turns[number], "value": "\n".join([VIDEO] * len(media) + [turns[number]["value"]])}
    return [*turns[:number], first, *turns[number + 1 :]]


def places(turns: list[dict[str, str]]) -> int:
    """How many placeholders of any spelling the questions hold."""
    return sum(len(_SPELLED.findall(text)) for text in questions(turns))


def check_answers(turns: list[dict[str, str]], *, as_upstream: bool) -> None:
    """Refuse placeholders that would put a medium of the record into what is supervised.

    Args:
        as_upstream: let <video> be, which the reference reads wherever it stands.

    Raises:
        Unreadable: an answer holds <video>, or is the only one with a placeholder of any spelling.
    """
    answers = [turn["value"] for turn in turns[1:] if turn["from"] == "gpt" and "<" in turn["value"]]
    found = None
    if any(VIDEO in text for text in answers):
        found = None if as_upstream else VIDEO
    elif answers and not places(turns):
        found = next((match[0] for text in answers for match in _SPELLED.finditer(text)), None)
    if found is not None:
        raise Unreadable("", f"has {found} in an answer, which shows nothing; put it into the question")


def questions(turns: list[dict[str, str]]) -> list[str]:
    """The texts from who asks, in order."""
    return [turn["value"] for turn in turns if turn["from"] == "human"]


def _type_of(given):
    """(what a part says of its type, "text", "image", "video" or None)."""
    said = given.get("type") or next((key for key in _TYPES if given.get(key)), None)
    return said, _TYPES.get(said) if isinstance(said, str) else None


def _with_placeholders(turns, media, remarks):
    """The turns with <video> for another spelling of the placeholder, where that is the only one."""
    found = [match[0] for text in questions(turns) for match in _SPELLED.finditer(text)]
    if VIDEO in found or len(found) != len(media) or len(set(found)) != 1:
        return turns
    if found[0] != _PLACEHOLDERS[media[0].kind]:
        remarks.append(f"{found[0]} is read as {VIDEO}, the placeholder of the record's video")
    return _replaced(turns, found[0])


def _replaced(turns, spelled):
    return [
        {**turn, "value": turn["value"].replace(spelled, VIDEO)} if turn["from"] == "human" else turn for turn in turns
    ]


def _is_name(value):
    if isinstance(value, dict):  # as the library `datasets` writes files
        return isinstance(value.get("path"), str) and bool(value["path"]) and value.get("bytes") is None
    return isinstance(value, str) and bool(value) and not value.startswith("data:")


def _name(value):
    value = value["path"] if isinstance(value, dict) else value
    return value.removeprefix("file://")


def _within(value):
    """Why a value that holds the file itself is none; None of any other."""
    if (isinstance(value, dict) and value.get("bytes") is not None) or (
        isinstance(value, str) and value[:5] == "data:"
    ):
        return "holds the file itself; write it to a file, and name that"
    return None


def _but(value):
    return f", but {kind_of(value)}"
