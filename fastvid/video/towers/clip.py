"""CLIP's vision tower on Hugging Face's weights, up to its last layer but one.

Dimensions: B images, P patches of an image, S = 1 + P rows of an image, K values of a patch row, C channels,
N = B · S.

The states are ``hidden_states[-2][:, 1:]`` of ``CLIPVisionModel``, as PG-Video-LLaVA and Video-ChatGPT take them. In
fp32 on a CPU they are those of its layers to the bit. In 16 bits they are as near to the exact ones, and rounded less
often.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastvid_kernels.add_layer_norm import add_layer_norm
from fastvid_kernels.patch_rows import embedding_matrix
from fastvid_kernels.quick_gelu import quick_gelu
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fastvid.files import shown, wrong_content
from fastvid.folders import is_url
from fastvid.video.towers.choice import is_path


@dataclass(frozen=True)
class _Layer:
    """A layer's weights and biases: of its norms, of queries, keys and values as one matrix, of the other products."""

    attention_norm: tuple[Tensor, Tensor]
    qkv: tuple[Tensor, Tensor]
    attention_out: tuple[Tensor, Tensor]
    mlp_norm: tuple[Tensor, Tensor]
    mlp_in: tuple[Tensor, Tensor]
    activation: Callable[[Tensor], Tensor]
    mlp_out: tuple[Tensor, Tensor]


class ClipTower:
    """The frozen tower: patch rows to the states that features are pooled from.

    Args:
        tower: Hugging Face folder or hub id of a CLIP model or vision tower.
        device, dtype: where and in what it computes.

    Attributes:
        image_size, patch_size: pixels; num_patches: P; hidden_size: C.
        mean, std: per channel, of pixel values in [0, 1].

    Raises:
        ValueError: the tower is missing, or is not a CLIP vision tower.
    """

    @torch.no_grad()
    def __init__(self, tower, device: torch.device, dtype: torch.dtype):
        model = load_tower(tower, dtype)
        config, settings = model.config, processor_settings(tower)
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.hidden_size, self._heads, self._eps = (
            config.hidden_size, config.num_attention_heads, config.layer_norm_eps)
        self.mean, self.std = tuple(settings["image_mean"]), tuple(settings["image_std"])

        def held(*parts):
            """Weight and bias of a module, or of several one behind the other. A single one's are not copied."""
            pairs = [(part.weight.detach(), part.bias.detach()) for part in parts]
            return tuple((torch.cat(values) if len(values) > 1 else values[0]).to(device) for values in zip(*pairs))

        embeddings = model.embeddings
        position_SC = embeddings.position_embedding.weight
        self._patch_weight_CK = embedding_matrix(embeddings.patch_embedding.weight.detach()).to(device)
        self._class_row_C = (embeddings.class_embedding + position_SC[0]).to(device)
        self._position_PC = position_SC[1:].detach().to(device)
        self._first_norm = held(model.pre_layrnorm)
        self._layers = [_Layer(
            attention_norm=held(layer.layer_norm1),
            qkv=held(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
            attention_out=held(layer.self_attn.out_proj), mlp_norm=held(layer.layer_norm2),
            mlp_in=held(layer.mlp.fc1), mlp_out=held(layer.mlp.fc2),
            # Activations of other names may have weights of their own.
            activation=quick_gelu if config.hidden_act == "quick_gelu" else layer.mlp.activation_fn.to(device),
        ) for layer in model.encoder.layers[:-1]]

    @torch.no_grad()
    def states(self, patches_BPK: Tensor) -> Tensor:
        """[B, P, C] states after the last layer but one, without the class row's: a view.

        Args:
            patches_BPK: patch rows as `fastvid_kernels.frame_patchify` makes them, in the tower's dtype.
        """
        B, C = len(patches_BPK), self.hidden_size
        rows_BSC = patches_BPK.new_empty(B, 1 + self.num_patches, C)
        rows_BSC[:, 0] = self._class_row_C
        torch.add(linear(patches_BPK, self._patch_weight_CK), self._position_PC, out=rows_BSC[:, 1:])
        residual_NC, branch_NC = self._normalised(rows_BSC.view(-1, C), None, self._first_norm)[1], None
        for layer in self._layers:
            residual_NC, x_NC = self._normalised(residual_NC, branch_NC, layer.attention_norm)
            branch_NC = linear(self._attend(linear(x_NC, *layer.qkv), B), *layer.attention_out)
            residual_NC, x_NC = self._normalised(residual_NC, branch_NC, layer.mlp_norm)
            branch_NC = linear(layer.activation(linear(x_NC, *layer.mlp_in)), *layer.mlp_out)
        if branch_NC is not None:
            residual_NC = residual_NC + branch_NC
        return residual_NC.view(B, -1, C)[:, 1:]

    def _normalised(self, residual_NC, branch_NC, norm):
        return add_layer_norm(residual_NC, branch_NC, *norm, self._eps)

    def _attend(self, qkv, images):
        """[N, C] of [N, 3 · C]: every row of an image attends to all rows of it."""
        q, k, v = qkv.view(images, -1, 3, self._heads, self.hidden_size // self._heads).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1)


def load_tower(tower, dtype):
    """The CLIPVisionModel of a folder or hub id, in evaluation mode, on the CPU.

    Raises:
        ValueError: it is missing or damaged, or is no CLIP vision tower.
    """
    from safetensors import SafetensorError
    from transformers import CLIPVisionModel, logging

    _refuse_what_is_no_tower(tower)
    for path in _files(tower):
        if fault := wrong_content(path):
            raise ValueError(f"{path} {fault}")
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # otherwise a CLIP model's unused text tower is listed weight by weight
    try:
        model, info = CLIPVisionModel.from_pretrained(tower, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise _cannot_load(tower, error) from error
    finally:
        logging.set_verbosity(verbosity)
    if info["missing_keys"]:
        raise ValueError(f"{tower!r} is not a CLIP vision tower: it has no weights for "
                         f"{', '.join(sorted(info['missing_keys'])[:3])}, …")
    return model.eval()


def tower_sizes(tower) -> tuple[int, int, int]:
    """(image size, patch size, channels) of a folder or hub id, by its configuration: no weights are read.

    Raises:
        ValueError: it is missing or damaged.
    """
    from transformers import CLIPVisionConfig

    _refuse_what_is_no_tower(tower)
    try:
        config = CLIPVisionConfig.from_pretrained(tower)
    except (OSError, ValueError) as error:
        raise _cannot_load(tower, error) from error
    return config.image_size, config.patch_size, config.hidden_size


def _refuse_what_is_no_tower(tower):
    if is_url(tower) or os.path.isfile(tower):
        what = "a URL" if is_url(tower) else "a file"
        raise ValueError(f"--vision_tower {shown(tower)} is {what}; give the tower's folder, or its name on the hub")
    if is_path(tower) and not os.path.isdir(tower):
        raise ValueError(f"--vision_tower {shown(tower)}: no such folder; give the tower's, which `hf download "
                         "openai/clip-vit-large-patch14-336 --local-dir FOLDER` makes")


def _cannot_load(tower, error):
    meant_a_folder = is_path(tower) or os.path.isdir(os.path.dirname(tower))
    hub_id = "openai/clip-vit-large-patch14-336" if meant_a_folder else tower
    return ValueError(
        f"cannot load the vision tower {tower!r} ({str(error).strip().splitlines()[0]}); download it where there "
        f"is a network with `hf download {hub_id} --local-dir FOLDER` and pass --vision_tower FOLDER")


def _files(tower):
    """Configuration and weights of a tower's folder; of a hub id none."""
    names = ("config.json", "model.safetensors", "pytorch_model.bin")
    return [path for name in names if os.path.lexists(path := os.path.join(tower, name))]


def processor_settings(tower):
    """A tower's preprocessor_config.json; "image_mean" and "image_std" per channel are CLIP's where it has none."""
    from transformers.image_processing_base import ImageProcessingMixin
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(tower)
    except OSError:
        settings = {}
    return {"image_mean": OPENAI_CLIP_MEAN, "image_std": OPENAI_CLIP_STD, **settings}
