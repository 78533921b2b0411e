"""SigLIP's vision tower (arXiv:2303.15343), and SigLIP 2's of a fixed resolution (arXiv:2502.14786): patches alone.

Its states are ``hidden_states[-2]`` of ``SiglipVisionModel``, all rows of it. Pixels that fill no patch, as 6 of 384
do where a patch has 14, are left out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fastvid.video.towers.transformer import VisionTower

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, SiglipVisionModel


class SiglipTower(VisionTower):
    """`VisionTower` of a ``SiglipVisionModel``, whose pictures have the size that its preprocessor settings say.

    Raises:
        ValueError: as `VisionTower`; pictures of that size have another number of patches than the tower.
    """

    def __init__(
        self,
        model: CLIPVisionModel | SiglipVisionModel,
        settings: dict[str, Any],
        device: torch.device,
        *,
        fp8: bool = False,
    ):
        super().__init__(model, settings, device, fp8=fp8)
        self.image_size = picture_size(settings, self.image_size, self.patch_size)

    def _place(self, model, norm, device):
        return model.embeddings.position_embedding.weight


def picture_size(settings: dict, image_size: int, patch_size: int) -> int:
    """Pixels per side of the pictures that a tower's preprocessor settings make.

    Args:
        image_size, patch_size: of the tower's own configuration.

    Raises:
        ValueError: such pictures have another number of patches than the tower.
    """
    size = settings.get("size")
    height, width = (
        (size.get(side) or image_size for side in ("height", "width")) if isinstance(size, dict) else [image_size] * 2
    )
    if height != width or height // patch_size != image_size // patch_size:
        raise ValueError(
            f"the vision tower's preprocessor_config.json makes pictures of {height} × {width} pixels"
            f", its config.json takes {image_size} × {image_size}; download both again"
        )
    return height
