"""The names of a model's tensors: ours, those of LLaVA (LLaMA's and ``model.mm_projector``), and those of llava-hf.

Ours fuse what one matrix product computes: ``qkv.weight`` is LLaMA's q, k and v projections one under the other,
``gate_up.weight`` its gate and up projections; ``qkv.bias`` likewise. Every other tensor is LLaMA's under a shorter
name. Families of LLaMA's kind use its names, and the same names for what they have besides.

LLaVA's names are the common tongue: each file's keys are brought to them (`standard_name`), and each of our tensors
is made of them (`tensor_parts`).
"""

import re
from collections.abc import Iterable

from fastvid.config.policy import Lora
from fastvid.model.config import DecoderConfig, ModelConfig
from fastvid.model.lora import beside

# Keys of llava-hf folders, as transformers 4 (and transformers 5, on disk) and transformers 5 (in memory) spell them,
# and of projector files without the leading `model.`; and of what lies beside a LoRA adapter.
_RENAMES = [
    (re.compile(r"^base_model\.model\."), ""),  # PEFT's
    (re.compile(r"^language_model\.(?=model\.|lm_head\.)"), ""),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^(model\.)?multi_modal_projector\.linear_1\."), "model.mm_projector.0."),
    (re.compile(r"^(model\.)?multi_modal_projector\.linear_2\."), "model.mm_projector.2."),
    (re.compile(r"^mm_projector(_2)?\."), r"model.mm_projector\1."),
]
# A tower travels apart from the model; inverse frequencies are computed; LLaVA-1.6's image_newline serves images only.
_PROJECTOR, _SECOND = "model.mm_projector.", "model.mm_projector_2."
_NOT_NEEDED = re.compile(r"(^|\.)vision_tower\.|\.rotary_emb\.inv_freq$|(^|\.)image_newline$")


def standard_name(key: str) -> str | None:
    """LLaVA's name of the tensor that a model or projector file calls `key`; None for one that we never need."""
    if _NOT_NEEDED.search(key):
        return None
    for pattern, replacement in _RENAMES:
        key = pattern.sub(replacement, key)
    return key


def llava_hf_name(name: str) -> str:
    """What llava-hf folders call LLaVA's tensor `name`; every transformers since 4.36 reads these keys."""
    for pattern, replacement in (
        (r"^model\.mm_projector\.0\.", "multi_modal_projector.linear_1."),
        (r"^model\.mm_projector\.2\.", "multi_modal_projector.linear_2."),
        (r"^(model|lm_head)\.", r"language_model.\1."),
    ):
        key, count = re.subn(pattern, replacement, name)
        if count:
            return key
    raise AssertionError(f"{name} is not one of LLaVA's names")


def projector_type(names: Iterable[str], *, second: bool = False) -> str | None:
    """The kind of projector that LLaVA's tensors among `names` make, in LLaVA's words; None without any.

    Args:
        second: of two vision towers, that of the second.

    "linear" and "mlp2x_gelu" are computed; "mlp3x_gelu" and so on, and "unknown" of tensors of another form, are not.
    """
    prefix = _SECOND if second else _PROJECTOR
    tails = {name.removeprefix(prefix) for name in names if name.startswith(prefix)}
    if not tails:
        return None
    if tails & {"weight", "bias"}:
        return "linear"
    layers = [found for tail in tails if (found := re.fullmatch(r"(\d+)\.(weight|bias)", tail))]
    if len(layers) < len(tails):
        return "unknown"
    return f"mlp{max(2, *(int(layer[1]) // 2 + 1 for layer in layers))}x_gelu"


def projector_parts(projector_type: str, *, second: bool = False) -> dict[str, str]:
    """Our name → LLaVA's name of each projector tensor, in the order in which the reference saves them.

    Args:
        second: there is a second vision tower, whose projector's tensors come after the first one's.
    """
    modules = {"linear": {"0": ""}, "mlp2x_gelu": {"0": "0.", "2": "2."}}[projector_type]
    return {
        f"{of_ours}{ours}.{kind}": f"{of_theirs}{theirs}{kind}"
        for of_ours, of_theirs in (("projector.", _PROJECTOR), ("projector.second.", _SECOND))[: 1 + second]
        for ours, theirs in modules.items()
        for kind in ("weight", "bias")
    }


def tensor_parts(config: ModelConfig) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our name → [(LLaVA's name, shape), …]: the tensors that lie one under the other in ours, in model order.

    `boundary.weight` is not among them: it holds two rows of the embedding table.
    """
    c = config.decoder
    V, D, F = c.vocab_size, c.hidden_size, c.intermediate_size
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    parts: dict[str, list[tuple[str, tuple[int, ...]]]] = {"embed.weight": [("model.embed_tokens.weight", (V, D))]}
    shapes: dict[str, tuple[int, ...]] = {
        "projector.0.weight": (D, config.mm_hidden_size),
        "projector.2.weight": (D, D),
    }
    second = config.mm_hidden_size_2
    if second is not None:
        shapes |= {"projector.second.0.weight": (D, second), "projector.second.2.weight": (D, D)}
    for ours, theirs in projector_parts(config.projector_type, second=second is not None).items():
        parts[ours] = [(theirs, shapes.get(ours, (D,)))]
    for i in range(c.num_layers):
        ours, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        parts[ours + "input_norm.weight"] = [(theirs + "input_layernorm.weight", (D,))]
        parts[ours + "qkv.weight"] = [
            (f"{attention}{which}_proj.weight", (rows, D)) for which, rows in (("q", queries), ("k", keys), ("v", keys))
        ]
        if c.qkv_bias:
            parts[ours + "qkv.bias"] = [
                (f"{attention}{which}_proj.bias", (rows,)) for which, rows in (("q", queries), ("k", keys), ("v", keys))
            ]
        if c.qk_norm:
            parts |= {
                f"{ours}{which}_norm.weight": [(f"{attention}{which}_norm.weight", (c.head_dim,))] for which in "qk"
            }
        parts[ours + "o.weight"] = [(attention + "o_proj.weight", (D, queries))]
        parts[ours + "post_norm.weight"] = [(theirs + "post_attention_layernorm.weight", (D,))]
        parts[ours + "gate_up.weight"] = [(mlp + "gate_proj.weight", (F, D)), (mlp + "up_proj.weight", (F, D))]
        parts[ours + "down.weight"] = [(mlp + "down_proj.weight", (D, F))]
    parts["decoder.norm.weight"] = [("model.norm.weight", (D,))]
    if not c.tie_word_embeddings:
        parts["head.weight"] = [("lm_head.weight", (V, D))]
    return parts


def lora_parts(config: DecoderConfig, lora: Lora) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Our name → [(PEFT's name behind `base_model.model.`, shape), …] of LoRA's matrices, as `tensor_parts`."""
    r, parts = lora.rank, {}
    for i in range(config.num_layers):
        for matrix, place in beside(config, lora).items():
            ours = f"decoder.layers.{i}.lora.{matrix}"
            block = f"model.layers.{i}.{'self_attn' if matrix in ('qkv', 'o') else 'mlp'}"
            parts[f"{ours}.a.weight"] = [
                (f"{block}.{target}.lora_A.weight", (r, place.inputs)) for target in place.columns
            ]
            parts[f"{ours}.b.weight"] = [
                (f"{block}.{target}.lora_B.weight", (last - first, r))
                for target, (first, last) in place.columns.items()
            ]
    return parts
