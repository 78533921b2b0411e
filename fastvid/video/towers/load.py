"""Vision towers as Hugging Face stores them: which kind a folder or hub id holds, its weights, its preprocessing."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import torch

from fastvid.features.towers import CLIP, DINOV2, DINOV3, SIGLIP, kind_of, picture_sizes
from fastvid.files import StrPath, is_url, shown, wrong_content
from fastvid.video.towers.choice import is_path
from fastvid.video.towers.clip import ClipTower
from fastvid.video.towers.dino import Dinov2Tower, Dinov3Tower
from fastvid.video.towers.siglip import SiglipTower
from fastvid.video.towers.transformer import VisionTower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Ours, and transformers' class by the model_type of config.json.
_TOWERS = {
    CLIP: (ClipTower, {"clip": "CLIPVisionModel", "clip_vision_model": "CLIPVisionModel"}),
    SIGLIP: (SiglipTower, {"siglip": "SiglipVisionModel", "siglip_vision_model": "SiglipVisionModel"}),
    DINOV2: (Dinov2Tower, {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel"}),
    DINOV3: (Dinov3Tower, {"dinov3_vit": "DINOv3ViTModel"}),
}
_KNOWN = "CLIP, SigLIP, DINOv2 or DINOv3"


def open_tower(tower: StrPath, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> VisionTower:
    """The tower of a folder or hub id, of the kind that its config.json names.

    Args:
        tower: Hugging Face folder or hub id of a CLIP, SigLIP, DINOv2 or DINOv3 model, or of its vision tower.
        device, dtype: where and in what it computes.
        fp8: multiply the layers' matrices in e4m3 (`VisionTower`).

    Raises:
        ValueError: as `load_tower`; FP8 cannot multiply its matrices; its preprocessing is another tower's.
    """
    model, settings = load_tower(tower, dtype), processor_settings(tower)
    mean, std = settings["image_mean"], settings["image_std"]
    return _TOWERS[_kind(tower)][0](model, tower_sizes(tower)[0], mean, std, device, fp8=fp8)


def load_tower(tower: StrPath, dtype: torch.dtype) -> PreTrainedModel:
    """transformers' vision tower of a folder or hub id, in evaluation mode, on the CPU.

    Raises:
        ValueError: it is missing or damaged, or is no vision tower of a kind that is known.
    """
    import transformers
    from safetensors import SafetensorError

    config = _config(tower)
    classes = _TOWERS[_kind(tower)][1]
    kind = getattr(transformers, classes.get(str(config.get("model_type")), "CLIPVisionModel"))
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # else a whole model's unused text tower is listed weight by weight
    try:
        loaded: Any = kind.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(tower, error) from error
    finally:
        transformers.logging.set_verbosity(verbosity)
    model, info = loaded  # as that option has it
    if info["missing_keys"]:
        raise ValueError(
            f"{tower!r} is not a {_KNOWN} vision tower (model_type {config.get('model_type')}): it "
            f"has no weights for {', '.join(sorted(info['missing_keys'])[:3])}, …"
        )
    return model.eval()


def tower_sizes(tower: StrPath) -> tuple[int, int, int]:
    """(image size, patch size, channels) of a folder or hub id, by its configuration: no weights are read.

    Raises:
        ValueError: it is missing or damaged, or is no vision tower of a kind that is known.
    """
    return picture_sizes(_config(tower), _preprocessor(tower))


def processor_settings(tower: StrPath) -> dict[str, Any]:
    """A tower's preprocessor_config.json; what it does not say of "image_mean" and "image_std" is its kind's."""
    kind = _kind(tower)
    return {"image_mean": kind.mean, "image_std": kind.std, **_preprocessor(tower)}


def _kind(tower):
    return kind_of(_config(tower)) or CLIP


def _config(tower) -> dict:
    """A tower's config.json. Of a folder it is read here: transformers takes seconds to be imported."""
    _refuse_what_is_no_tower(tower)
    try:
        if os.path.isdir(tower):
            with open(os.path.join(tower, "config.json"), encoding="utf-8") as file:
                config = json.load(file)
        else:
            from transformers import PretrainedConfig

            config = PretrainedConfig.get_config_dict(tower)[0]
        if not isinstance(config, dict):
            raise ValueError("its config.json is no object")
    except (OSError, ValueError) as error:
        raise _cannot_load(tower, error) from error
    if str(config.get("model_type")).startswith("siglip2"):  # those of a fixed resolution call themselves siglip
        raise ValueError(
            f"--vision_tower {shown(tower)} is a NaFlex tower of SigLIP 2, whose pictures have any shape; "
            "give one of a fixed resolution, such as google/siglip2-so400m-patch14-384"
        )
    return config


def _preprocessor(tower) -> dict:
    """A tower's preprocessor_config.json; {} where it has none. Of a folder it is read here, as `_config` does."""
    try:
        if os.path.isdir(tower):
            with open(os.path.join(tower, "preprocessor_config.json"), encoding="utf-8") as file:
                settings = json.load(file)
        else:
            from transformers.image_processing_base import ImageProcessingMixin

            settings, _ = ImageProcessingMixin.get_image_processor_dict(tower)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        if not os.path.isdir(tower):
            return {}  # transformers tells a hub's missing file by such an error
        raise _cannot_load(tower, error) from error
    return settings if isinstance(settings, dict) else {}


def _refuse_what_is_no_tower(tower):
    if is_url(tower) or os.path.isfile(tower):
        what = "a URL" if is_url(tower) else "a file"
        raise ValueError(f"--vision_tower {shown(tower)} is {what}; give the tower's folder, or its name on the hub")
    if is_path(tower) and not os.path.isdir(tower):
        raise ValueError(
            f"--vision_tower {shown(tower)}: no such folder; give the tower's, which `hf download "
            "openai/clip-vit-large-patch14-336 --local-dir FOLDER` makes"
        )
    for path in _files(tower):
        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")


def _cannot_load(tower, error):
    meant_a_folder = is_path(tower) or os.path.isdir(os.path.dirname(tower))
    hub_id = "openai/clip-vit-large-patch14-336" if meant_a_folder else tower
    return ValueError(
        f"cannot load the vision tower {tower!r} ({str(error).strip().splitlines()[0]}); download it where there "
        f"is a network with `hf download {hub_id} --local-dir FOLDER` and pass --vision_tower FOLDER"
    )


def _files(tower):
    """Configuration and weights of a tower's folder; of a hub id none."""
    names = ("config.json", "model.safetensors", "pytorch_model.bin")
    return [path for name in names if os.path.lexists(path := os.path.join(tower, name))]
