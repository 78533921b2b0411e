"""The language models that are computed: one entry a family, and what its config.json may say."""

from dataclasses import dataclass
from typing import Any

# What would change the computation in any family, with the only values that we compute.
_COMPUTED = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "num_local_experts": (None,),
    "num_experts": (None,),
    "quantization_config": (None,),
    "projector_hidden_act": ("gelu",),
}
_LAYER_TYPES = ("full_attention", "sliding_attention")


@dataclass(frozen=True)
class Family:
    """Language models that differ in sizes alone.

    Attributes:
        model_type: transformers' word for it, which config.json says.
        models: what users call its members, for messages.
        config: name of transformers' configuration.
        architecture: of exports.
        other_types: further words of config.json: of folders that hold a projector as well.
        qkv_bias, qk_norm: as for `DecoderConfig`.
        settings: keys of config.json, besides sizes, that exports say again.
    """

    model_type: str
    models: str
    config: str
    architecture: str
    other_types: tuple[str, ...] = ()
    qkv_bias: bool = False
    qk_norm: bool = False
    settings: tuple[str, ...] = ()

    def obstacle(self, values: dict) -> str | None:
        """What in a section of config.json this family's decoder does not compute; None if it computes all."""
        allowed = _COMPUTED if "sliding_window" in self.settings else {**_COMPUTED, "sliding_window": (None,)}
        for key, known in allowed.items():
            if values.get(key, known[0]) not in known:
                remedy = "; give the folder of the model that it was made of" * (key == "quantization_config")
                return f"{key} = {values[key]!r} is not computed; only {known[0]!r} is{remedy}"
        kinds = values.get("layer_types") if "layer_types" in self.settings else None
        for kind in kinds if isinstance(kinds, list) else ():
            if kind not in _LAYER_TYPES:
                return f"layer_types: {kind!r} is not computed; only {' and '.join(_LAYER_TYPES)} are"
        return None


_WINDOW = ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types")
FAMILIES = (
    Family(
        "llama",
        "LLaMA 1 to 3, Vicuna, SmolLM2",
        "LlamaConfig",
        "LlavaLlamaForCausalLM",
        # LLaVA (1.0 and 1.5 "llava", later "llava_llama") and llava-hf ("llava"); the reference.
        ("llava", "llava_llama", "videochatgpt", "video_chatgpt"),
    ),
    Family("mistral", "Mistral", "MistralConfig", "MistralForCausalLM", ("llava_mistral",), settings=_WINDOW[:1]),
    Family(
        "qwen2", "Qwen2, Qwen2.5", "Qwen2Config", "Qwen2ForCausalLM", ("llava_qwen",), qkv_bias=True, settings=_WINDOW
    ),
    Family("qwen3", "Qwen3", "Qwen3Config", "Qwen3ForCausalLM", qk_norm=True, settings=_WINDOW),
    Family(
        "smollm3",
        "SmolLM3",
        "SmolLM3Config",
        "SmolLM3ForCausalLM",
        settings=(*_WINDOW, "no_rope_layers", "no_rope_layer_interval"),
    ),
)


def family_of(values: dict, text: dict) -> Family:
    """The family of a config.json.

    Args:
        values: all of it.
        text: its language model's section, or all of it again.

    Raises:
        ValueError: continues a sentence that begins with the file; no family of that name is computed.
    """
    outer = str(values.get("model_type", "llama")).lower()
    inner = str(text.get("model_type", "llama")).lower()
    for word in (outer, inner):
        if not any(word in (family.model_type, *family.other_types) for family in FAMILIES):
            raise ValueError(
                f"model_type {word!r} is not computed; these are: "
                f"{', '.join(f'{family.model_type} ({family.models})' for family in FAMILIES)}"
            )
    return next(family for family in FAMILIES if inner in (family.model_type, *family.other_types))


def by_model_type(model_type: str) -> Family:
    """The family that a `ModelConfig` names."""
    return next(family for family in FAMILIES if family.model_type == model_type)


def unrotated_layers(config: Any) -> tuple[int, ...]:
    """Layers without positions, of transformers' configuration."""
    marks = getattr(config, "no_rope_layers", None) or ()
    return tuple(layer for layer in range(config.num_hidden_layers) if marks and not marks[layer])


def sliding_window(config: Any) -> int | None:
    """Rows that a row of some layer attends to at most, of transformers' configuration; None: all."""
    kinds = getattr(config, "layer_types", None)
    if not getattr(config, "use_sliding_window", True) or (kinds is not None and "sliding_attention" not in kinds):
        return None
    return getattr(config, "sliding_window", None)
