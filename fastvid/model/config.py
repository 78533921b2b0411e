"""Sizes of a model, the precision that it computes in, and the frequencies of its rotary embedding."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastvid.batch import Channels


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder: LLaMA's, and what other families have besides.

    Attributes:
        rope_parameters: as transformers 5 has them (`LlamaConfig(...).rope_parameters`): `rope_type`, `rope_theta`, ….
        max_position_embeddings: context length; some RoPE scalings depend on it.
        tie_word_embeddings: the head is the embedding table.
        qkv_bias: queries, keys and values have biases (Qwen2).
        qk_norm: each head of the queries and keys is normalised before the rotation (Qwen3).
        unrotated_layers: layers, counted from 0, whose queries and keys know no positions (SmolLM3's NoPE,
            arXiv:2501.18795).
        sliding_window: rows that a row attends to at most, itself included; None: all before it. It is not computed:
            no segment may be longer, see `context`.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_parameters: dict = field(hash=False)
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    qk_norm: bool = False
    unrotated_layers: tuple[int, ...] = ()
    sliding_window: int | None = None

    @property
    def context(self) -> int:
        """Most rows of a sample that this model computes as its family does."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)


def rotary_frequencies(config: DecoderConfig) -> tuple[Tensor, float]:
    """Radians per position, [d/2] fp32 on the CPU, and the factor on cosine and sine.

    Raises:
        ValueError: the scaling is unknown, its frequencies depend on the length of the sequence, or the settings give
            none.
    """
    parameters = {"rope_theta": 10000.0, **config.rope_parameters}
    kind = parameters.get("rope_type", "default")
    if kind not in ("default", "linear", "llama3", "yarn"):
        raise ValueError(
            f"rope_type {kind!r} is not supported: it is unknown, or its frequencies depend on the length "
            "of the sequence; supported are default, linear, llama3 and yarn"
        )
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise ValueError(f"partial_rotary_factor = {part!r} is not computed; only 1.0 is")
    try:
        with torch.device("cpu"):
            frequencies, scale = _frequencies(config, kind, parameters)
        wrong = "" if frequencies.isfinite().all() else ": not all frequencies are finite"
    except (TypeError, ArithmeticError) as error:
        wrong = f" ({error})"
    if wrong:
        raise ValueError(f"the rope settings {parameters} give no frequencies{wrong}; download the file again")
    return frequencies, scale


def _frequencies(config, kind, parameters):
    if kind == "default":
        exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
        return 1.0 / parameters["rope_theta"] ** exponents, 1.0
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](
        LlamaConfig(
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters=parameters,
        )
    )
    return frequencies, float(scale)


@dataclass(frozen=True)
class Precision:
    """What a model is stored and computed in.

    Trained matrices are cast at use. The few numbers of trained norms and biases are fp32. Frozen embeddings and norms,
    which autocast never rounds, lie in the residual stream's dtype.

    Attributes:
        compute: of matrix products, and of frozen matrices as they are stored.
        trained: of trained matrices as they are stored: fp32 masters, or bf16 under an optimizer that rounds
            stochastically.
        frozen: how a frozen decoder's matrices are stored instead, see `make_linear`; None: in `compute`.
        fp32_residual: keep the residual stream in fp32, as autocast leaves it; otherwise it is in `compute`.
    """

    compute: torch.dtype = torch.float32
    trained: torch.dtype = torch.float32
    frozen: str | None = None
    fp32_residual: bool = False

    @property
    def residual(self) -> torch.dtype:
        return torch.float32 if self.fp32_residual else self.compute

    def stored(self, trained: bool) -> torch.dtype:
        """Of a matrix that is trained, or one that is frozen, outside of a quantised decoder."""
        return self.trained if trained else self.compute


@dataclass(frozen=True)
class ModelConfig:
    """What a model folder says of its model.

    Attributes:
        mm_hidden_size: channels of the vision tower; of two, of the first.
        projector_type: "linear" (Video-ChatGPT) or "mlp2x_gelu" (LLaVA-1.5).
        vision_tower: folder or hub id, if the folder names one.
        initializer_range: standard deviation of new rows.
        model_type: transformers' word for the language model's family.
        family_settings: what its config.json says besides sizes, for exports to say again.
        mm_hidden_size_2: channels of the second vision tower, whose projector is of the same type; None: there is one.
    """

    decoder: DecoderConfig
    mm_hidden_size: int
    projector_type: str
    vision_tower: str | None
    initializer_range: float
    model_type: str = "llama"
    family_settings: Mapping = field(default_factory=dict, compare=False)
    mm_hidden_size_2: int | None = None

    @property
    def channels(self) -> Channels:
        """Of the features that the model takes."""
        return self.mm_hidden_size if self.mm_hidden_size_2 is None else (self.mm_hidden_size, self.mm_hidden_size_2)
