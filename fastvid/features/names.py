"""The endings of feature files, what a name's ending tells, and what the name is without it."""

import os
from collections.abc import Mapping
from typing import Any, Literal

from fastvid.files import IMAGE_SUFFIXES, MEDIA_SUFFIXES, VIDEO_SUFFIXES, StrPath, shown

SUFFIXES = (".safetensors", ".pkl", ".npy", ".pt")  # of feature files, in the order in which one of several is read


def stem(name: str) -> str:
    """`name` without the ending of a feature file, a video or an image."""
    before, suffix = os.path.splitext(name)
    return before if suffix.lower() in SUFFIXES + MEDIA_SUFFIXES else name


def medium(name: StrPath) -> Literal["image", "video"] | None:
    """What a file is by its name's ending; None where that tells neither."""
    suffix = os.path.splitext(name)[1].lower()
    return "image" if suffix in IMAGE_SUFFIXES else "video" if suffix in VIDEO_SUFFIXES else None


def namesake(name: str, path: StrPath, header: Mapping[str, Any]) -> str | None:
    """Why a feature file is not of the video or image that a record names; None if it may be.

    A video and an image whose names differ in the ending alone have one feature file, which is of one of them.

    Args:
        name: in the record.
        path: the feature file that it means.
        header: of that file, or what is known of it before it is made.
    """
    named = medium(name)
    other = "video" if named == "image" else "image"
    if named is None or named in header or other not in header:
        return None
    return (
        f"{shown(path)} is of the {other} {shown(header.get('source', 'of that name'))}, not of the {named} "
        f"{shown(name)}, whose name differs in the ending alone; rename one of the two, extract it (fastvid extract), "
        "and give records its new name"
    )
