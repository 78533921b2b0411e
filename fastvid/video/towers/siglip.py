"""SigLIP's vision tower (arXiv:2303.15343), and SigLIP 2's of a fixed resolution (arXiv:2502.14786): patches alone.

Its states are ``hidden_states[-2]`` of ``SiglipVisionModel``, all rows of it. Pixels that fill no patch, as 6 of 384
do where a patch has 14, are left out.
"""

from fastvid.video.towers.transformer import VisionTower


class SiglipTower(VisionTower):
    """`VisionTower` of a ``SiglipVisionModel``."""

    def _place(self, model, norm, device):
        return model.embeddings.position_embedding.weight
