"""What vision towers have in common: a pre-norm transformer on Hugging Face's weights, up to its last layer but one.

Dimensions: B images, P patches of an image, L rows before them (a class row, registers), S = L + P rows of an image,
H heads of d channels, K values of a patch row, C channels, N = B · S.

In fp32 on a CPU the states are those of transformers' layers to the bit, but where a layer scales what it adds. In 16
bits they are as near to the exact ones, and rounded less often.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from fastvid_kernels import cpu
from fastvid_kernels.add_layer_norm import add_layer_norm
from fastvid_kernels.patch_rows import embedding_matrix
from fastvid_kernels.quick_gelu import quick_gelu
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from fastvid.video.towers.products import Fp8Product, Product

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Norm = tuple[Tensor, Tensor]  # weight and bias
_Map = Callable[[Tensor], Tensor]  # of rows


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


class LayerModules(NamedTuple):
    """A layer of transformers' tower: its modules, whatever they are called there.

    Attributes:
        mlp_in: linear layers side by side.
        attention_scale, mlp_scale: [C] that multiplies what the layer adds to its input; None: nothing does.
    """

    attention_norm: Any
    queries: Any
    keys: Any
    values: Any
    attention_out: Any
    mlp_norm: Any
    mlp_in: tuple[Any, ...]
    mlp_out: Any
    activation: _Map
    attention_scale: Tensor | None = None
    mlp_scale: Tensor | None = None


class VisionTower:
    """A frozen tower: patch rows to the states that features are pooled from. Subclasses are the kinds of towers.

    Args:
        model: transformers' tower (`fastvid.video.towers.load.load_tower`), in the dtype to compute in.
        image_size: pixels per side of the pictures.
        mean, std: per channel, of pixel values in [0, 1].
        device: where it computes.
        fp8: multiply the layers' matrices in e4m3; norms, attention, residual and patch embedding stay as they are.

    Attributes:
        image_size, patch_size: pixels; num_patches: P; hidden_size: C; dtype.
        mean, std: as given.

    Raises:
        ValueError: an FP8 tower's matrices have sides that FP8 units do not multiply.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: PreTrainedModel,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        *,
        fp8: bool = False,
    ):
        config: Any = model.config
        convolution, layers = self._modules(model)
        self.image_size, self.patch_size = image_size, convolution.kernel_size[0]
        self.num_patches = (image_size // self.patch_size) ** 2
        self.hidden_size: int = config.hidden_size
        self._heads: int = config.num_attention_heads
        self._eps: float = config.layer_norm_eps
        self.mean, self.std = tuple(mean), tuple(std)
        self.dtype: torch.dtype = convolution.weight.dtype
        # In fp32 another order of sums would not be transformers'.
        packed = self.dtype == torch.bfloat16 and cpu.can_prepack(self.dtype, device)
        plain = cpu.PrepackedProduct if packed else Product

        def norm(part):
            return part.weight.detach().to(device), part.bias.detach().to(device)

        def product(*parts, scale=None):
            """Of a linear layer, or of several side by side. A single one's weights are not copied."""
            weights = [part.weight.detach() for part in parts]
            biases = [
                weight.new_zeros(len(weight)) if part.bias is None else part.bias.detach()
                for part, weight in zip(parts, weights)
            ]
            weight_OI, bias_O = (torch.cat(some) if len(some) > 1 else some[0] for some in (weights, biases))
            if scale is not None:
                weight_OI, bias_O = weight_OI * scale.detach()[:, None], bias_O * scale.detach()
            return (Fp8Product if fp8 else plain)(weight_OI.to(device), bias_O.to(device))

        position_PC = self._place(model, norm, device)
        self._patch_weight_CK = embedding_matrix(convolution.weight.detach()).to(device)
        self._patch_bias_C = None if convolution.bias is None else convolution.bias.detach().to(device)
        self._position_PC = None if position_PC is None else position_PC.detach().to(device)
        self._layers = [
            _Layer(
                attention_norm=norm(layer.attention_norm),
                qkv=product(layer.queries, layer.keys, layer.values),
                attention_out=product(layer.attention_out, scale=layer.attention_scale),
                mlp_norm=norm(layer.mlp_norm),
                mlp_in=product(*layer.mlp_in),
                mlp_out=product(layer.mlp_out, scale=layer.mlp_scale),
                # Some have weights of their own.
                activation=layer.activation.to(device) if isinstance(layer.activation, nn.Module) else layer.activation,
            )
            for layer in layers[:-1]
        ]

    # Rows before the patches', and the norm that all rows pass before the first layer: of some towers nothing.
    _leading_LC: Tensor | None = None
    _first_norm: _Norm | None = None

    def _modules(self, model: Any) -> tuple[Any, list[LayerModules]]:
        """(The convolution that embeds patches, the layers) of transformers' tower, which types neither."""
        return model.embeddings.patch_embedding, [
            LayerModules(
                attention_norm=layer.layer_norm1,
                queries=layer.self_attn.q_proj,
                keys=layer.self_attn.k_proj,
                values=layer.self_attn.v_proj,
                attention_out=layer.self_attn.out_proj,
                mlp_norm=layer.layer_norm2,
                mlp_in=(layer.mlp.fc1,),
                mlp_out=layer.mlp.fc2,
                activation=quick_gelu if model.config.hidden_act == "quick_gelu" else layer.mlp.activation_fn,
            )
            for layer in model.encoder.layers
        ]

    def _place(self, model, norm, device) -> Tensor | None:
        """Take what this kind of tower has beside layers and patches; the patches' positions [P, C], or None."""
        raise NotImplementedError

    def _rotated(self, rows_BHSd: Tensor) -> Tensor:
        """Queries or keys as they attend: of most towers, as they are."""
        return rows_BHSd

    @torch.no_grad()
    def states(self, patches_BPK: Tensor) -> Tensor:
        """[B, P, C] states of the patches after the last layer but one.

        Args:
            patches_BPK: patch rows as `fastvid_kernels.frame_patchify` makes them, in the tower's dtype.
        """
        B, C = len(patches_BPK), self.hidden_size
        before = 0 if self._leading_LC is None else len(self._leading_LC)
        rows_BSC = patches_BPK.new_empty(B, before + self.num_patches, C)
        if self._leading_LC is not None:
            rows_BSC[:, :before] = self._leading_LC
        embedded_BPC = linear(patches_BPK, self._patch_weight_CK, self._patch_bias_C)
        if self._position_PC is None:
            rows_BSC[:, before:] = embedded_BPC
        else:
            torch.add(embedded_BPC, self._position_PC, out=rows_BSC[:, before:])
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
        return scaled_dot_product_attention(self._rotated(q), self._rotated(k), v).transpose(1, 2).reshape(len(qkv), -1)
