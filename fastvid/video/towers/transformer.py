"""What vision towers have in common: a pre-norm transformer on Hugging Face's weights, up to its last layer but one.

Dimensions: B images, P patches of an image, S rows of an image (P, and one more where there is a class row), K values
of a patch row, C channels, N = B · S.

In fp32 on a CPU the states are those of transformers' layers to the bit. In 16 bits they are as near to the exact ones,
and rounded less often. A CPU's threads each have images of their own: passes over a few megabytes, one after the other
and each shared by all threads, would leave them waiting for each other half of the time.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from fastvid_kernels import cpu
from fastvid_kernels.add_layer_norm import add_layer_norm
from fastvid_kernels.patch_rows import embedding_matrix
from fastvid_kernels.quick_gelu import quick_gelu
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from fastvid.video.towers.products import Fp8Product, Product

if TYPE_CHECKING:
    from transformers import CLIPVisionModel, SiglipVisionModel

_Norm = tuple[Tensor, Tensor]  # weight and bias
_Map = Callable[[Tensor], Tensor]  # of rows


def cpu_threads(images: int) -> int:
    """How many threads share so many images on a CPU."""
    return max(1, min(images, torch.get_num_threads()))


@functools.cache
def _threads(count):
    """Threads that compute beside each other, on as many cores each."""
    threads = torch.get_num_threads()
    all_begun = threading.Barrier(count)

    def begin():
        torch.get_num_threads()  # else its first operation sets the number anew
        torch.set_num_threads(threads // count)

    pool = ThreadPoolExecutor(count, "tower", initializer=begin)
    list(pool.map(lambda _: all_begun.wait(), range(count)))
    torch.set_num_threads(threads)  # what other threads begin with
    return pool


os.register_at_fork(after_in_child=_threads.cache_clear)  # a child has none of the threads


@dataclass(frozen=True)
class _Layer:
    """A layer's norms and products; queries, keys and values are one product."""

    attention_norm: _Norm
    qkv: _Map
    attention_out: _Map
    mlp_norm: _Norm
    mlp_in: _Map
    activation: _Map
    mlp_out: _Map


class VisionTower:
    """A frozen tower: patch rows to the states that features are pooled from.

    Args:
        model: transformers' tower (`fastvid.video.towers.load.load_tower`), in the dtype to compute in.
        settings: of the tower's preprocessor: "image_mean" and "image_std" per channel, and perhaps "size".
        device: where it computes.
        fp8: multiply the layers' matrices in e4m3; norms, attention, residual and patch embedding stay as they are.

    Attributes:
        image_size, patch_size: pixels; num_patches: P; hidden_size: C; dtype.
        mean, std: per channel, of pixel values in [0, 1].

    Raises:
        ValueError: an FP8 tower's matrices have sides that FP8 units do not multiply.
    """

    @torch.no_grad()
    def __init__(
        self, model: CLIPVisionModel | SiglipVisionModel, settings: dict, device: torch.device, *, fp8: bool = False
    ):
        config: Any = model.config  # transformers types neither its settings nor its modules as they are here
        embeddings: Any = model.embeddings
        layers: Any = model.encoder.layers
        self.image_size: int = config.image_size
        self.patch_size: int = config.patch_size
        self.num_patches = (self.image_size // self.patch_size) ** 2
        self.hidden_size, self._heads, self._eps = (
            config.hidden_size,
            config.num_attention_heads,
            config.layer_norm_eps,
        )
        self.mean, self.std = tuple(settings["image_mean"]), tuple(settings["image_std"])
        self.dtype = embeddings.patch_embedding.weight.dtype

        # In fp32 another order of sums would not be transformers'.
        packed = self.dtype == torch.bfloat16 and cpu.can_prepack(self.dtype, device)
        plain = cpu.PrepackedProduct if packed else Product

        def norm(part):
            return part.weight.detach().to(device), part.bias.detach().to(device)

        def product(*parts):
            """Of a linear layer, or of several side by side. A single one's weights are not copied."""
            weights, biases = ([getattr(part, name).detach() for part in parts] for name in ("weight", "bias"))
            weight_OI, bias_O = (
                (torch.cat(some) if len(some) > 1 else some[0]).to(device) for some in (weights, biases)
            )
            return (Fp8Product if fp8 else plain)(weight_OI, bias_O)

        patch_embedding = embeddings.patch_embedding
        bias_C, position_PC = patch_embedding.bias, self._place(model, norm, device)
        self._patch_weight_CK = embedding_matrix(patch_embedding.weight.detach()).to(device)
        self._patch_bias_C = None if bias_C is None else bias_C.detach().to(device)
        self._position_PC = position_PC.detach().to(device)
        self._layers = [
            _Layer(
                attention_norm=norm(layer.layer_norm1),
                qkv=product(layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj),
                attention_out=product(layer.self_attn.out_proj),
                mlp_norm=norm(layer.layer_norm2),
                mlp_in=product(layer.mlp.fc1),
                mlp_out=product(layer.mlp.fc2),
                # Activations of other names may have weights of their own.
                activation=quick_gelu if config.hidden_act == "quick_gelu" else layer.mlp.activation_fn.to(device),
            )
            for layer in layers[:-1]
        ]

    # What stands before the patches' rows, and what all rows pass before the first layer: of some towers nothing.
    _class_row_C: Tensor | None = None
    _first_norm: _Norm | None = None

    def _place(self, model, norm, device) -> Tensor:
        """Take what this kind of tower has beside layers and patches; the position embedding [P, C] of the patches."""
        raise NotImplementedError

    @torch.no_grad()
    def states(self, patches_BPK: Tensor) -> Tensor:
        """[B, P, C] states after the last layer but one, without a class row's: a view.

        Args:
            patches_BPK: patch rows as `fastvid_kernels.frame_patchify` makes them, in the tower's dtype.
        """
        threads = cpu_threads(len(patches_BPK)) if patches_BPK.device.type == "cpu" else 1
        if threads == 1:
            return self._states(patches_BPK)
        return torch.cat(list(_threads(threads).map(self._states, patches_BPK.tensor_split(threads))))

    @torch.no_grad()  # which holds for one thread
    def _states(self, patches_BPK):
        B, C = len(patches_BPK), self.hidden_size
        class_row_C = self._class_row_C
        before = 0 if class_row_C is None else 1
        rows_BSC = patches_BPK.new_empty(B, before + self.num_patches, C)
        if class_row_C is not None:
            rows_BSC[:, 0] = class_row_C
        torch.add(
            linear(patches_BPK, self._patch_weight_CK, self._patch_bias_C), self._position_PC, out=rows_BSC[:, before:]
        )
        residual_NC, branch_NC = rows_BSC.view(-1, C), None
        if self._first_norm is not None:
            residual_NC = self._normalised(residual_NC, None, self._first_norm)[1]
        for layer in self._layers:
            residual_NC, x_NC = self._normalised(residual_NC, branch_NC, layer.attention_norm)
            branch_NC = layer.attention_out(self._attend(layer.qkv(x_NC), B))
            residual_NC, x_NC = self._normalised(residual_NC, branch_NC, layer.mlp_norm)
            branch_NC = layer.mlp_out(layer.activation(layer.mlp_in(x_NC)))
        if branch_NC is not None:
            residual_NC = residual_NC + branch_NC
        return residual_NC.view(B, -1, C)[:, before:]

    def _normalised(self, residual_NC: Tensor, branch_NC: Tensor | None, norm: _Norm):
        return add_layer_norm(residual_NC, branch_NC, *norm, self._eps)

    def _attend(self, qkv, images):
        """[N, C] of [N, 3 · C]: every row of an image attends to all rows of it."""
        q, k, v = qkv.view(images, -1, 3, self._heads, self.hidden_size // self._heads).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(qkv), -1)
