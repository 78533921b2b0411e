"""DINOv2's vision tower (arXiv:2304.07193), without registers or with (arXiv:2309.16588); DINOv3's (arXiv:2508.10104).

Their states are ``hidden_states[-2]`` of ``Dinov2Model``, ``Dinov2WithRegistersModel`` and ``DINOv3ViTModel``, of the
patches alone. Pictures have the size that preprocessor_config.json makes, to which positions are interpolated as
transformers does it. A layer's scales are multiplied into the matrices before them.
"""

from typing import Any

import torch
from fastvid_kernels.swiglu import swiglu
from torch import nn

from fastvid.video.towers.transformer import LayerModules, VisionTower


class Dinov2Tower(VisionTower):
    """`VisionTower` of a ``Dinov2Model`` or a ``Dinov2WithRegistersModel``."""

    def _modules(self, model):
        return model.embeddings.patch_embeddings.projection, [_modules_of(layer) for layer in model.encoder.layer]

    def _place(self, model, norm, device):
        embeddings, side = model.embeddings, self.image_size
        like = embeddings.cls_token.expand(1, 1 + self.num_patches, -1)
        position_SC = embeddings.interpolate_pos_encoding(like, side, side)[0]
        registers_RC = getattr(embeddings, "register_tokens", embeddings.cls_token[:, :0])[0]
        self._leading_LC = torch.cat([embeddings.cls_token[0] + position_SC[:1], registers_RC]).to(device)
        return position_SC[1:]


class Dinov3Tower(VisionTower):
    """`VisionTower` of a ``DINOv3ViTModel``: the patches' queries and keys are rotated by their places."""

    def _modules(self, model):
        return model.embeddings.patch_embeddings, [_modules_of(layer) for layer in model.model.layer]

    def _place(self, model, norm, device):
        embeddings, side = model.embeddings, self.image_size
        self._leading_LC = torch.cat([embeddings.cls_token[0], embeddings.register_tokens[0]]).to(device)
        like = torch.empty(1, 3, side, side, dtype=self.dtype)
        self._cos_Pd, self._sin_Pd = (part.to(device) for part in model.rope_embeddings(like))

    def _rotated(self, rows_BHSd):
        before = rows_BHSd.shape[2] - self.num_patches
        patches_BHPd = rows_BHSd[:, :, before:]
        first, second = patches_BHPd.chunk(2, -1)
        turned_BHPd = torch.cat([-second, first], -1)
        rotated_BHPd = patches_BHPd * self._cos_Pd + turned_BHPd * self._sin_Pd
        return torch.cat([rows_BHSd[:, :, :before], rotated_BHPd], 2)


def _modules_of(layer: Any) -> LayerModules:
    attention, mlp = layer.attention, layer.mlp
    if hasattr(mlp, "fc1"):
        mlp_in, mlp_out, activation = (mlp.fc1,), mlp.fc2, mlp.activation_fn
    elif hasattr(mlp, "gate_proj"):
        mlp_in, mlp_out = (mlp.gate_proj, mlp.up_proj), mlp.down_proj
        activation = swiglu if isinstance(mlp.act_fn, nn.SiLU) else _gated(mlp.act_fn)
    else:
        mlp_in, mlp_out, activation = (mlp.up_proj,), mlp.down_proj, mlp.act_fn
    return LayerModules(
        attention_norm=layer.norm1,
        queries=attention.q_proj,
        keys=attention.k_proj,
        values=attention.v_proj,
        attention_out=attention.o_proj,
        mlp_norm=layer.norm2,
        mlp_in=mlp_in,
        mlp_out=mlp_out,
        activation=activation,
        attention_scale=layer.layer_scale1.lambda1,
        mlp_scale=layer.layer_scale2.lambda1,
    )


def _gated(activation):
    """What `swiglu` is with SiLU: of gates and values side by side."""

    def gated(gate_up_NF):
        gate_NF, up_NF = gate_up_NF.chunk(2, -1)
        return activation(gate_NF) * up_NF

    return gated
