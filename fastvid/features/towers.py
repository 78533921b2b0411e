"""What a vision tower's JSON files say of its pictures: kind, sizes, pixel statistics. No weights are read."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class TowerKind:
    """A kind of towers.

    Attributes:
        name: for people.
        defaults: image size, patch size and channels where config.json leaves them out, as transformers has them.
        mean, std: of pixel values in [0, 1], per channel, where preprocessor_config.json leaves them out.
        any_size: takes pictures of any size; preprocessor_config.json says which.
    """

    name: str
    defaults: tuple[int, int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    any_size: bool = False


CLIP = TowerKind(
    "CLIP",
    (224, 32, 768),
    (0.48145466, 0.4578275, 0.40821073),
    (0.26862954, 0.26130258, 0.27577711),
)
SIGLIP = TowerKind("SigLIP", (224, 16, 768), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
DINOV2 = TowerKind("DINOv2", (224, 14, 768), *_IMAGENET, any_size=True)
DINOV3 = TowerKind("DINOv3", (224, 16, 384), *_IMAGENET, any_size=True)
_KINDS = {
    "clip": CLIP,
    "clip_vision_model": CLIP,
    "siglip": SIGLIP,
    "siglip_vision_model": SIGLIP,
    "dinov2": DINOV2,
    "dinov2_with_registers": DINOV2,
    "dinov3_vit": DINOV3,
}


def kind_of(config: Mapping[str, Any]) -> TowerKind | None:
    """The kind of a tower, or of a model of text and vision, by its config.json; None: of none that is known."""
    return _KINDS.get(str(config.get("model_type")))


def picture_sizes(config: Mapping[str, Any], preprocessor: Mapping[str, Any]) -> tuple[int, int, int]:
    """(image size, patch size, channels) of a tower, by its config.json and preprocessor_config.json ({}: none).

    A tower that is of no known kind is taken for CLIP's.

    Raises:
        ValueError: a size is no number of pixels, or the two files do not fit each other.
    """
    kind = kind_of(config) or CLIP
    vision = config.get("vision_config")
    vision = vision if isinstance(vision, Mapping) else config
    names = "image_size", "patch_size", "hidden_size"
    image_size, patch_size, channels = (_one(vision.get(name, known)) for name, known in zip(names, kind.defaults))
    for name, size in zip(names, (image_size, patch_size, channels)):
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= 1 << 20:
            raise ValueError(f"the vision tower's config.json has {name} {size!r}, which is no size; download it again")
    if kind is CLIP:
        return image_size, patch_size, channels
    height, width = _made(preprocessor, image_size) if kind.any_size else _side(preprocessor.get("size"), image_size)
    if height != width or not (kind.any_size or height // patch_size == image_size // patch_size):
        raise ValueError(
            f"the vision tower's preprocessor_config.json makes pictures of {height} × {width} pixels"
            f", its config.json takes {image_size} × {image_size}; download both again"
        )
    if height < patch_size or height > 1 << 13:
        raise ValueError(
            f"the vision tower's preprocessor_config.json makes pictures of {height} × {width} pixels, and its patches "
            f"have {patch_size}; download both again"
        )
    return height, patch_size, channels


def _one(size) -> Any:
    """Of two equal sides, one."""
    return size[0] if isinstance(size, list) and size and size.count(size[0]) == len(size) else size


def _made(preprocessor, image_size):
    """(height, width) of the pictures that preprocessing makes: what is cut out of the middle, else what is resized."""
    if preprocessor.get("do_center_crop") is not False and preprocessor.get("crop_size") is not None:
        return _side(preprocessor["crop_size"], image_size)
    return _side(preprocessor.get("size"), image_size)


def _side(size, image_size):
    if isinstance(size, int) and not isinstance(size, bool):
        return size, size
    if not isinstance(size, Mapping):
        return image_size, image_size
    short = size.get("shortest_edge")
    height, width = (size.get(side) or short or image_size for side in ("height", "width"))
    return tuple(side if isinstance(side, int) else image_size for side in (height, width))
