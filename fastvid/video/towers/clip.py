"""CLIP's vision tower: a class row before the patches, and a norm before the first layer.

Its states are ``hidden_states[-2][:, 1:]`` of ``CLIPVisionModel``, as PG-Video-LLaVA and Video-ChatGPT take them.
"""

from fastvid.video.towers.transformer import VisionTower


class ClipTower(VisionTower):
    """`VisionTower` of a ``CLIPVisionModel``."""

    def _place(self, model, norm, device):
        embeddings, position_SC = model.embeddings, model.embeddings.position_embedding.weight
        self._leading_LC = (embeddings.class_embedding + position_SC[0])[None].to(device)
        self._first_norm = norm(model.pre_layrnorm)
        return position_SC[1:]
