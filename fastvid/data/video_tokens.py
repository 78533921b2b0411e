"""How many rows one video takes in the prompt, and where that number is found."""

import re
from pathlib import Path

from fastvid.data.annotations import record_videos, training_fault
from fastvid.data.features import probe_features
from fastvid.data.files import read_json_object

TEMPORAL = 100  # rows for frames, whatever the number of a video's frames: the reference's
# openai/clip-vit-large-patch14-336 and its like say their patch and image size (224 where none is said).
_CLIP_NAME = re.compile(r"clip-vit-\w+-patch(\d+)(?:-(\d+))?$")


def video_token_count(model_folder, vision_tower, num_video_tokens, features, records):
    """Rows per video: temporal + spatial, the same for every video of a run; 0 where no record names a video.

    Args:
        model_folder: whose config.json may name or describe the vision tower.
        vision_tower: folder or hub id; None takes the model's.
        num_video_tokens: the answer, where the user has given it.
        features: `fastvid.data.features.FeatureFolder` or None; the first of the records' features that can be read
            decides.
        records: training records.

    Raises:
        ValueError: none of these says it.
    """
    if num_video_tokens is not None:
        if num_video_tokens < 1:
            raise ValueError(f"--num_video_tokens {num_video_tokens}: a video takes at least one row")
        return num_video_tokens
    for name in _named_videos(records) if features is not None else ():
        try:
            return probe_features(features.resolve(name))[0]
        except (ValueError, OSError):  # reported where the record is used; another one may be readable
            continue
    if next(_named_videos(records), None) is None:
        return 0
    image_size, patch_size = tower_geometry(model_folder, vision_tower)
    return TEMPORAL + (image_size // patch_size) ** 2


def tower_geometry(model_folder, vision_tower=None):
    """(image size, patch size) of a vision tower in pixels, from its folder, its name or the model's config.json.

    Raises:
        ValueError: none of these says it.
    """
    config = read_settings(model_folder)
    tower = vision_tower or config.get("mm_vision_tower")
    described = None if vision_tower else config.get("vision_config")
    if tower and Path(tower).is_dir():
        described = read_settings(tower)
        described = described.get("vision_config", described)  # a whole CLIP model's folder
    elif tower and (match := _CLIP_NAME.search(tower.rstrip("/"))):
        described = {"image_size": match[2] or 224, "patch_size": match[1]}
    try:
        return int(described["image_size"]), int(described["patch_size"])
    except (TypeError, KeyError, ValueError):
        where = f"vision tower {tower}" if tower else f"{model_folder}/config.json (it has no mm_vision_tower)"
        raise ValueError(f"cannot tell how many tokens a video takes from {where}: give --num_video_tokens (676 for "
                         "336-pixel features, 356 for 224), --video_folder with the features, or --vision_tower with "
                         "the tower's folder") from None


def _named_videos(records):
    for record in records:
        if training_fault(record) is None:
            yield from record_videos(record)


def read_settings(folder):
    """A model or tower folder's config.json; empty where there is none."""
    return read_json_object(Path(folder) / "config.json")
