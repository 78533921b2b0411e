"""Vision towers as Hugging Face stores them: which kind a folder or hub id holds, its weights, its preprocessing."""

import os

import torch

from fastvid.files import shown, wrong_content
from fastvid.folders import is_url
from fastvid.video.towers.choice import is_path
from fastvid.video.towers.clip import ClipTower
from fastvid.video.towers.siglip import SiglipTower
from fastvid.video.towers.transformer import VisionTower


def open_tower(tower, device: torch.device, dtype: torch.dtype, *, fp8: bool = False) -> VisionTower:
    """The tower of a folder or hub id, of the kind that its config.json names.

    Args:
        tower: Hugging Face folder or hub id of a CLIP or SigLIP model, or of its vision tower.
        device, dtype: where and in what it computes.
        fp8: multiply the layers' matrices in e4m3 (`VisionTower`).

    Raises:
        ValueError: as `load_tower`; FP8 cannot multiply its matrices; its preprocessing is another tower's.
    """
    model = load_tower(tower, dtype)
    kind = SiglipTower if is_siglip(model) else ClipTower
    return kind(model, processor_settings(tower, kind is SiglipTower), device, fp8=fp8)


def is_siglip(model) -> bool:
    """Whether transformers' tower, or its configuration, is SigLIP's rather than CLIP's."""
    return getattr(model, "config", model).model_type == "siglip_vision_model"


def load_tower(tower, dtype):
    """The CLIPVisionModel or SiglipVisionModel of a folder or hub id, in evaluation mode, on the CPU.

    Raises:
        ValueError: it is missing or damaged, or is no vision tower of CLIP or SigLIP.
    """
    from safetensors import SafetensorError
    from transformers import CLIPVisionModel, PretrainedConfig, SiglipVisionModel, logging

    if is_url(tower) or os.path.isfile(tower):
        what = "a URL" if is_url(tower) else "a file"
        raise ValueError(f"--vision_tower {shown(tower)} is {what}; give the tower's folder, or its name on the hub")
    if is_path(tower) and not os.path.isdir(tower):
        raise ValueError(f"--vision_tower {shown(tower)}: no such folder; give the tower's, which `hf download "
                         "openai/clip-vit-large-patch14-336 --local-dir FOLDER` makes")
    for path in _files(tower):
        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise a whole model's unused text tower is listed weight by weight
    try:
        model_type = str(PretrainedConfig.get_config_dict(tower)[0].get("model_type"))
        naflex = model_type.startswith("siglip2")  # those of a fixed resolution call themselves siglip
        if not naflex:
            kind = SiglipVisionModel if model_type.startswith("siglip") else CLIPVisionModel
            model, info = kind.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        meant_a_folder = is_path(tower) or os.path.isdir(os.path.dirname(tower))
        hub_id = "openai/clip-vit-large-patch14-336" if meant_a_folder else tower
        raise ValueError(
            f"cannot load the vision tower {tower!r} ({str(error).strip().splitlines()[0]}); download it where there "
            f"is a network with `hf download {hub_id} --local-dir FOLDER` and pass --vision_tower FOLDER") from error
    finally:
        logging.set_verbosity(verbosity)
    if naflex:
        raise ValueError(f"--vision_tower {shown(tower)} is a NaFlex tower of SigLIP 2, whose pictures have any shape; "
                         "give one of a fixed resolution, such as google/siglip2-so400m-patch14-384")
    if info["missing_keys"]:
        raise ValueError(f"{tower!r} is not a CLIP or SigLIP vision tower (model_type {model_type}): it has no "
                         f"weights for {', '.join(sorted(info['missing_keys'])[:3])}, …")
    return model.eval()


def _files(tower):
    """Configuration and weights of a tower's folder; of a hub id none."""
    names = ("config.json", "model.safetensors", "pytorch_model.bin")
    return [path for name in names if os.path.lexists(path := os.path.join(tower, name))]


def processor_settings(tower, siglip: bool = False) -> dict:
    """A tower's preprocessor_config.json; what it does not say of "image_mean" and "image_std" is its kind's."""
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.image_utils import (
        IMAGENET_STANDARD_MEAN,
        IMAGENET_STANDARD_STD,
        OPENAI_CLIP_MEAN,
        OPENAI_CLIP_STD,
    )

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(tower)
    except OSError:
        settings = {}
    mean, std = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD) if siglip else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    return {"image_mean": mean, "image_std": std, **settings}
