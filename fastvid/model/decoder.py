"""The LLaMA decoder on packed rows (arXiv:2302.13971), equal to transformers' LlamaForCausalLM.

Dimensions: N packed rows, D channels, E = (H + 2K)·d columns of fused queries, keys and values, H query heads,
K key/value heads, d channels per head, F channels of the feed-forward block.
"""

from dataclasses import dataclass
from functools import partial

import torch
from fastvid_kernels.add_rms_norm import add_rms_norm
from fastvid_kernels.rope_qk import rope_qk
from fastvid_kernels.swiglu import swiglu
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastvid.batch import AttentionLayout
from fastvid.model.attention import attend
from fastvid.model.linear import make_linear

RECOMPUTE_MODES = ("none", "selective", "full")


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a LLaMA decoder.

    Attributes:
        rope_parameters: as transformers 5 has them (`LlamaConfig(...).rope_parameters`): `rope_type`, `rope_theta`, ….
        max_position_embeddings: context length; some RoPE scalings depend on it.
        tie_word_embeddings: the head is the embedding table.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict
    max_position_embeddings: int
    tie_word_embeddings: bool


def rotary_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Radians per position, [d/2] fp32 on the CPU, and the factor on cosine and sine.

    Raises:
        ValueError: the scaling is unknown, or its frequencies depend on the length of the sequence.
    """
    parameters = {"rope_theta": 10000.0, **config.rope_parameters}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(f"rope_type {kind!r} is not supported: it is unknown, or its frequencies depend on the length "
                         "of the sequence; supported are default, linear, llama3 and yarn")
    with torch.device("cpu"):
        if kind == "default":
            exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            return 1.0 / parameters["rope_theta"] ** exponents, 1.0
        from transformers import LlamaConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        frequencies, scale = ROPE_INIT_FUNCTIONS[kind](LlamaConfig(
            hidden_size=config.hidden_size, num_attention_heads=config.num_heads, head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings, rope_parameters=parameters))
    return frequencies, float(scale)


class RMSNorm(nn.Module):
    """Adds a branch to the residual stream, and normalises the sum into the compute dtype."""

    def __init__(self, channels: int, eps: float, *, dtype: torch.dtype, trained: bool, compute_dtype: torch.dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype), requires_grad=trained)
        self.eps = eps
        self.compute_dtype = compute_dtype

    def forward(self, residual_ND, branch_ND):
        return add_rms_norm(residual_ND, branch_ND, self.weight, self.eps, self.compute_dtype)


class DecoderLayer(nn.Module):
    """Attention and feed-forward block. Takes and returns the residual stream and the branch not yet added to it."""

    def __init__(self, config: DecoderConfig, *, trained: bool, compute_dtype: torch.dtype, trained_dtype: torch.dtype,
                 norm_dtype: torch.dtype, frozen_dtype: str | None, attn_implementation: str):
        super().__init__()
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        dtype = trained_dtype if trained else compute_dtype
        linear = partial(make_linear, dtype=dtype, trained=trained, frozen_dtype=None if trained else frozen_dtype)
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype=trained_dtype if trained else norm_dtype,
                       trained=trained, compute_dtype=compute_dtype)
        self.input_norm = norm()
        self.qkv = linear(config.hidden_size, (heads + 2 * kv_heads) * d)
        self.o = linear(heads * d, config.hidden_size)
        self.post_norm = norm()
        self.gate_up = linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)
        self.heads = heads, kv_heads
        self.attn_implementation = attn_implementation

    def forward(self, residual_ND, branch_ND, positions_N, rope, layout, *, cache=None, recomputed=False):
        heads, kv_heads = self.heads
        inv_freq, scale = rope
        residual_ND, x_ND = self.input_norm(residual_ND, branch_ND)
        # In place, but not where recomputation keeps the product that would be overwritten.
        qkv_NE = rope_qk(self.qkv(x_ND), positions_N, inv_freq, heads, kv_heads, scale=scale, inplace=not recomputed)
        q_NHd, k_NKd, v_NKd = qkv_NE.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
        if cache is not None:
            k_NKd, v_NKd = cache.append(k_NKd, v_NKd)
        x_NHd = attend(q_NHd, k_NKd, v_NKd, layout, self.attn_implementation, regather=not recomputed)
        residual_ND, x_ND = self.post_norm(residual_ND, self.o(x_NHd.flatten(1)))
        return residual_ND, self.down(swiglu(self.gate_up(x_ND)))


class Decoder(nn.Module):
    """Layers and final norm.

    Args:
        config: sizes.
        trained: parameters require gradients and lie in `trained_dtype`; otherwise frozen, in `compute_dtype`.
        compute_dtype: of matrix products.
        norm_dtype: of frozen norms; None: `compute_dtype`.
        frozen_dtype: how frozen matrices are stored, see `make_linear`; None: in `compute_dtype`.
        recompute: "none"; "full": a layer's activations are computed again in backward; "selective": all but its
            matrix products and attention.
        attn_implementation: see `attend`.
    """

    def __init__(self, config: DecoderConfig, *, trained: bool, compute_dtype: torch.dtype,
                 trained_dtype: torch.dtype = torch.float32, norm_dtype: torch.dtype | None = None,
                 frozen_dtype: str | None = None, recompute: str = "none", attn_implementation: str = "auto"):
        super().__init__()
        norm_dtype = norm_dtype or compute_dtype
        if recompute not in RECOMPUTE_MODES:
            raise ValueError(f"recompute {recompute!r}: choose one of {', '.join(RECOMPUTE_MODES)}")
        self.layers = nn.ModuleList(
            DecoderLayer(config, trained=trained, compute_dtype=compute_dtype, trained_dtype=trained_dtype,
                         norm_dtype=norm_dtype, frozen_dtype=frozen_dtype, attn_implementation=attn_implementation)
            for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=trained_dtype if trained else norm_dtype,
                            trained=trained, compute_dtype=compute_dtype)
        self.recompute = recompute
        self._rope = rotary_frequencies(config)  # not a buffer: survives the meta device, and no checkpoint holds it

    def forward(self, x_ND: Tensor, positions_N: Tensor, layout: AttentionLayout, cache=None) -> Tensor:
        """Rows after the final norm, [N, D] in the compute dtype.

        Args:
            x_ND: residual stream, in its own dtype.
            positions_N: rotary position of each row.
            layout: who attends to whom.
            cache: one `LayerCache` per layer, whose rows the layout's keys include; None without.
        """
        if self._rope[0].device != x_ND.device:
            self._rope = self._rope[0].to(x_ND.device), self._rope[1]
        recomputed = self.recompute != "none" and torch.is_grad_enabled()
        residual_ND, branch_ND = x_ND, None
        for i, layer in enumerate(self.layers):
            if recomputed:
                # Added here, so that the layer's one saved input is the sum.
                residual_ND = residual_ND if branch_ND is None else residual_ND + branch_ND
                residual_ND, branch_ND = self._checkpointed(layer, residual_ND, positions_N, layout)
            else:
                residual_ND, branch_ND = layer(residual_ND, branch_ND, positions_N, self._rope, layout,
                                               cache=cache and cache[i])
        return self.norm(residual_ND, branch_ND)[1]

    def _checkpointed(self, layer, residual_ND, positions_N, layout):
        context = {"context_fn": _keep_products} if self.recompute == "selective" else {}
        return checkpoint(layer, residual_ND, None, positions_N, self._rope, layout, recomputed=True,
                          use_reentrant=False, preserve_rng_state=False, **context)


def _keep_products():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operation, *args, **options):
    name = operation.name()
    kept = name in ("aten::mm", "aten::addmm") or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
