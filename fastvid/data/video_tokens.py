"""How many rows each video takes in the prompt, and where that number is found."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvid.data.media import Unreadable
from fastvid.data.styles import canonical, record_videos
from fastvid.features.towers import CLIP, kind_of, picture_sizes
from fastvid.files import StrPath, model_folder, read_json_object

if TYPE_CHECKING:
    from fastvid.batch import Channels
    from fastvid.features.folder import FeatureFolder

TEMPORAL = 100  # rows for frames, whatever the number of a video's frames: the reference's
# openai/clip-vit-large-patch14-336, google/siglip-so400m-patch14-384 and their like say their patch and image size (224
# where none is said). facebook/dinov3-vitb16-pretrain-lvd1689m says its patch; facebook/dinov2-base has patches of 14.
_TOWER_NAME = re.compile(r"(?:clip-vit|siglip2?)-\w+-patch(\d+)(?:-(\d+)(?:-multilingual|-i18n)?)?$")
_DINO_NAME = re.compile(
    r"dinov2-(?:with-registers-)?(?:small|base|large|giant)$|dinov3-vit(?:s|b|l|h|7b)(\d+)(?:plus)?-pretrain"
)


class VideoRows:
    """How many rows each video takes: as many as its feature file holds, each its own number.

    Args:
        features: `fastvid.features.folder.FeatureFolder`; None where no video is read.
        names: of the videos that records name, in order.
        required: rows that every video must have (``--num_video_tokens``); None: any number.
        same: every video must have as many as the first whose features can be read (`Policy.one_video_length`).

    Attributes:
        first: (name, rows) of that first video; None without one.
        fault: why none of the videos can be read; None if one can, or none is named.
        channels: `Channels` that all features must have: those of the first, until the model's are known.
        required: rows that every video must have; None: any number.
    """

    def __init__(
        self, features: FeatureFolder | None, names: Iterable[str], *, required: int | None = None, same: bool = False
    ):
        self.features, self.required = features, required
        self.channels: Channels = 0
        self.first: tuple[str, int] | None = None
        self.fault: Exception | None = None
        if features is None:
            return
        for name in names:
            try:
                rows, self.channels = features.shape(name)
            except (ValueError, OSError) as error:  # reported where the record is used; another one may be readable
                self.fault = self.fault or error
                continue
            self.first, self.fault = (name, rows), None
            self.required = required or (rows if same else None)
            break

    def __call__(self, name: str) -> int:
        """Rows of the video that a record calls `name`.

        Raises:
            ValueError, OSError: its features cannot be read, or are not those that this run takes.
        """
        assert self.features is not None, "no video is read"
        rows, channels = self.features.shape(name)
        if channels == self.channels and rows == (self.required or rows):
            return rows
        remedy = "extract them with this run's vision tower"
        if channels == self.channels:
            remedy += ", or let videos differ in rows (neither --num_video_tokens nor --parity reference)"
        raise ValueError(
            f"{self.features.resolve(name)}: features are [{rows}, {_told(channels)}], expected "
            f"[{self.required or 'any number'}, {_told(self.channels)}]; {remedy}"
        )


def _told(channels):
    return channels if isinstance(channels, int) else " and ".join(map(str, channels))


def video_token_count(
    model_folder: StrPath,
    vision_tower: str | None,
    num_video_tokens: int | None,
    features: FeatureFolder | None,
    records: Sequence[Any],
) -> int:
    """Rows to show for a video whose own number is not known; 0 where no record names a video.

    Args:
        model_folder: whose config.json may name or describe the vision tower.
        vision_tower: folder or hub id; None takes the model's.
        num_video_tokens: the answer, where the user has given it.
        features: `fastvid.features.folder.FeatureFolder` or None; the first of the records' features that can be read
            decides.
        records: training records.

    Raises:
        ValueError: none of these says it.
    """
    if num_video_tokens is not None:
        return num_video_tokens
    if (first := VideoRows(features, named_videos(records)).first) is not None:
        return first[1]
    if next(named_videos(records), None) is None:
        return 0
    image_size, patch_size = tower_geometry(model_folder, vision_tower)
    return TEMPORAL + (image_size // patch_size) ** 2


def tower_geometry(model_folder: StrPath, vision_tower: str | None = None) -> tuple[int, int]:
    """(image size, patch size) of a vision tower in pixels, from its folder, its name or the model's config.json.

    Raises:
        ValueError: none of these says it.
    """
    config = read_settings(model_folder)
    tower = vision_tower or config.get("mm_vision_tower")
    described = None if vision_tower else config.get("vision_config")
    if tower and Path(tower).is_dir():
        settings = read_settings(tower)
        if (kind_of(settings) or CLIP) is not CLIP:
            return picture_sizes(settings, read_json_object(Path(tower) / "preprocessor_config.json"))[:2]
        described = settings.get("vision_config", settings)  # a whole model's folder, of text and vision
    elif tower and (match := _TOWER_NAME.search(tower.rstrip("/"))):
        described = {"image_size": match[2] or 224, "patch_size": match[1]}
    elif tower and (match := _DINO_NAME.search(tower.rstrip("/"))):
        described = {"image_size": 224, "patch_size": match[1] or 14}
    described = described if isinstance(described, dict) else {}
    try:
        return int(described["image_size"]), int(described["patch_size"])
    except (TypeError, KeyError, ValueError):
        where = f"vision tower {tower}" if tower else f"{model_folder}/config.json (it has no mm_vision_tower)"
        raise ValueError(
            f"cannot tell how many tokens a video takes from {where}: give --num_video_tokens (676 for "
            "336-pixel features, 356 for 224), --video_folder with the features, or --vision_tower with "
            "the tower's folder"
        ) from None


def feature_channels(model_folder: StrPath, *, second: bool = False) -> int | None:
    """Channels of the features that a model folder's config.json asks for; None where it does not say.

    Args:
        second: of a second vision tower's.
    """
    config = read_settings(model_folder)
    if second:
        return config.get("mm_hidden_size_2")
    if "mm_hidden_size" not in config and isinstance(config.get("vision_config"), dict):  # llava-hf
        return config["vision_config"].get("hidden_size", 1024)
    return config.get("mm_hidden_size")


def named_videos(records: Iterable[Any]) -> Iterator[str]:
    """Names of the videos of training records, of which malformed ones name none."""
    for record in records:
        with contextlib.suppress(Unreadable):
            yield from record_videos(canonical(record)[0])


def read_settings(folder: StrPath) -> dict[str, Any]:
    """A model or tower folder's config.json; empty where there is none."""
    return read_json_object(model_folder(folder) / "config.json")
