"""A model folder's config.json, in every form that users hold, as a ModelConfig."""

import json
import logging

import torch

from fastvid.batch import Channels
from fastvid.files import StrPath, model_folder, shown, wrong_content
from fastvid.model.config import DecoderConfig, ModelConfig, rotary_frequencies
from fastvid.weights import names
from fastvid.weights.families import family_of, sliding_window, unrotated_layers
from fastvid.weights.model_folder import ModelFolder
from fastvid.weights.projector_file import read_projector

log = logging.getLogger("fastvid")

_PROJECTORS = ("linear", "mlp2x_gelu")
# The largest sizes that are believed.
_SIZES = {
    "num_hidden_layers": 1000,
    "num_attention_heads": 10_000,
    "num_key_value_heads": 10_000,
    "head_dim": 100_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "vocab_size": 10_000_000,
    "max_position_embeddings": 1_000_000_000,
    "sliding_window": 10_000_000,
}


def read_model_config(
    folder: StrPath,
    *,
    projector_type: str | None = None,
    vocab_size: int | None = None,
    projector: StrPath | None = None,
    mm_hidden_size: Channels | None = None,
) -> ModelConfig:
    """The ModelConfig of a folder of one of `families.FAMILIES`, of LLaVA, llava-hf, PG-Video-LLaVA, or exported.

    What config.json leaves out has the defaults of transformers' configuration. A projector that config.json does not
    describe is recognised by its tensors.

    Args:
        folder: holds config.json and the weights.
        projector_type: "linear" or "mlp2x_gelu", whatever the folder says.
        vocab_size: rows that the tokenizer needs; the tables grow to it, and a table that has more keeps them.
        projector: projector file or checkpoint folder that will be loaded instead of the folder's own projector.
        mm_hidden_size: channels of the features, where the folder does not say. Default: 1024 (CLIP ViT-L/14). Of two
            vision towers the folder may hold the first one's projector alone.

    Raises:
        ValueError: names the file and the value that is missing, malformed, or not computed by this model.
    """
    folder = model_folder(folder)
    path = folder / "config.json"
    values = _read_json(path)
    text = values.get("text_config") or values
    if not isinstance(text, dict):
        raise ValueError(f"{path}: text_config = {shown(text)} is no JSON object; download the file again")
    try:
        family = family_of(values, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    said, unrotated = _said(path, values, text, family)
    rows = max(said.vocab_size, vocab_size or 0)
    decoder = DecoderConfig(
        vocab_size=rows,
        hidden_size=said.hidden_size,
        intermediate_size=said.intermediate_size,
        num_layers=said.num_hidden_layers,
        num_heads=said.num_attention_heads,
        num_kv_heads=said.num_key_value_heads,
        head_dim=getattr(said, "head_dim", None) or said.hidden_size // said.num_attention_heads,
        rms_norm_eps=said.rms_norm_eps,
        rope_parameters=dict(said.rope_parameters),
        max_position_embeddings=said.max_position_embeddings,
        tie_word_embeddings=_is_tied(path, said.tie_word_embeddings or values.get("tie_word_embeddings")),
        qkv_bias=family.qkv_bias,
        qk_norm=family.qk_norm,
        unrotated_layers=unrotated,
        sliding_window=sliding_window(said),
    )
    try:
        rotary_frequencies(decoder)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    kind, *widths = _projectors(folder, path, values, projector, projector_type)
    first, second = mm_hidden_size if isinstance(mm_hidden_size, tuple) else (mm_hidden_size, None)
    return ModelConfig(
        decoder=decoder,
        mm_hidden_size=widths[0] or first or 1024,
        projector_type=kind,
        vision_tower=values.get("mm_vision_tower"),
        initializer_range=said.initializer_range,
        model_type=family.model_type,
        family_settings={key: text[key] for key in family.settings if key in text},
        mm_hidden_size_2=widths[1] or second,
    )


def _read_json(path):
    if not path.parent.is_dir():
        raise ValueError(f"{path.parent} is no folder: download the model (hf download) and give its folder")
    if not path.is_file():
        raise ValueError(f"{path} does not exist: {path.parent} is not a model folder")
    if fault := wrong_content(path):
        raise ValueError(f"{path} {fault}")
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object; download it again")
    return values


def _said(path, values, text, family):
    """(transformers' configuration of config.json's language model: defaults filled in, rope settings in today's form;
    its layers without positions)."""
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    for section in (values, text):
        if obstacle := family.obstacle(section):
            raise ValueError(f"{path}: {obstacle}")
    for key, most in _SIZES.items():
        value = text.get(key)
        if isinstance(value, int | float) and not 1 <= value <= most:
            raise ValueError(
                f"{path}: {key} = {value!r} is no size of a model (1 to {most:,}); download the file again"
            )
    for tower in ("mm_video_tower", "mm_image_tower"):
        if values.get(tower):
            raise ValueError(
                f"{path}: {tower} = {values[tower]!r} is not computed (LanguageBind's towers come with "
                "PKU's Video-LLaVA); only features of a CLIP, SigLIP or DINO tower (mm_vision_tower) are"
            )
    try:
        kind = getattr(transformers, family.config)
        said = kind.from_dict({key: value for key, value in text.items() if key != "model_type"})
        unrotated = unrotated_layers(said)
    except IndexError as error:
        raise ValueError(
            f"{path}: a list that says something of each layer is too short ({error}); download the file again"
        ) from error
    except (StrictDataclassError, TypeError, ValueError, KeyError, ArithmeticError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    if said.num_attention_heads % said.num_key_value_heads:
        raise ValueError(
            f"{path}: num_attention_heads = {said.num_attention_heads} is no multiple of num_key_value_heads = "
            f"{said.num_key_value_heads}; download the file again"
        )
    return said, unrotated


def _is_tied(path, described):
    """Whether head and embedding are one table: as config.json says, unless the weights hold two that differ.

    transformers 5 has it so; before, it left such a head out.
    """
    if not described:
        return False
    try:
        weights = ModelFolder(path.parent)
    except ValueError:  # without weights a folder still tells a model's size
        return True
    head, table = (weights.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head is None or table is None or head.shape != table.shape or torch.equal(head, table.to(head.dtype)):
        return True
    log.warning(
        "%s ties head and embedding (tie_word_embeddings), but the weights hold two that differ: both count", path
    )
    return False


def _projectors(folder, path, values, file, wanted):
    """(type, channels of the features or None, those of a second vision tower or None): of the given file, else as
    config.json says, else by the weights."""
    held = {} if file is None else read_projector(file)
    second = _inputs(held, "projector.second.0.weight") or values.get("mm_hidden_size_2")
    if file is not None:
        kind = "mlp2x_gelu" if "projector.2.weight" in held else "linear"
        if wanted not in (None, kind):
            raise ValueError(f"{file} holds a {kind} projector, --mm_projector_type {wanted} asks for another")
        if "projector.0.weight" in held:
            return kind, _inputs(held, "projector.0.weight"), second
    described, width = values.get("mm_projector_type"), values.get("mm_hidden_size")
    if "vision_config" in values and "mm_hidden_size" not in values:
        described, width = "mlp2x_gelu", (values["vision_config"] or {}).get("hidden_size", 1024)
    if described is None or width is None:
        weights = ModelFolder(folder)
        found = names.projector_type(weights)
        if found is not None:
            described = described or found
        if found in _PROJECTORS:
            parts = names.projector_parts(found, second=True)
            width = width or _inputs(weights, parts["projector.0.weight"])
            second = second or _inputs(weights, parts["projector.second.0.weight"])
    # LLaVA's own builder takes a projector that nothing describes for a linear one.
    kind = wanted or described or "linear"
    if kind not in _PROJECTORS:
        raise ValueError(f"{path}: mm_projector_type = {kind!r} is not computed; only 'linear' and 'mlp2x_gelu' are")
    return kind, width, second


def _inputs(tensors, name):
    """Columns of a matrix; None where it is not there."""
    return tensors[name].shape[1] if name in tensors else None
