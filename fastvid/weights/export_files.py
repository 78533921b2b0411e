"""The files of an export that hold no weights: settings, tokenizer, processor; and what an export may replace."""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastvid.batch import VideoTokens
from fastvid.data.names import PATCH
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.files import StrPath, naming, shown, write_json
from fastvid.provenance import EXPORT_MARK
from fastvid.video.towers.load import processor_settings
from fastvid.weights.card import CARD
from fastvid.weights.families import by_model_type
from fastvid.weights.starting import StartingWeights

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

log = logging.getLogger("fastvid")

# What an export of any format may consist of.
_EXPORTED = re.compile(
    r"config\.json|generation_config\.json|model(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index\.json"
    r"|tokenizer\.model|tokenizer(_config)?\.json|special_tokens_map\.json|added_tokens\.json"
    r"|preprocessor_config\.json|processor_config\.json|chat_template\.jinja|README\.md"
)


def model_config(
    starting: StartingWeights, tokenizer: ModelTokenizer, tower: StrPath | None, dtype: str
) -> dict[str, Any]:
    """config.json of the llama format; rope settings as every version of transformers reads them."""
    model, c = starting.config, starting.config.decoder
    family = by_model_type(model.model_type)
    rope = {key: value for key, value in c.rope_parameters.items() if key != "rope_theta"}
    scaling = {} if rope.get("rope_type") == "default" else {"rope_scaling": {"type": rope.get("rope_type"), **rope}}
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_layers,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": c.max_position_embeddings,
        "rms_norm_eps": c.rms_norm_eps,
        "initializer_range": model.initializer_range,
        "rope_theta": c.rope_parameters["rope_theta"],
        **scaling,
        "tie_word_embeddings": c.tie_word_embeddings,
        **model.family_settings,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
        "use_cache": True,
        "use_mm_proj": True,
        "mm_projector_type": model.projector_type,
        "mm_hidden_size": model.mm_hidden_size,
        **({} if model.mm_hidden_size_2 is None else {"mm_hidden_size_2": model.mm_hidden_size_2}),
        "mm_vision_tower": tower,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_vid_start_end": tokenizer.tokens.start is not None,
    }


def write_tokenizer_table(folder: Path) -> None:
    """tokenizer.json beside tokenizer.model: of LLaVA's, AutoTokenizer makes a table of its own otherwise, with other
    ids."""
    from transformers import LlamaTokenizer

    path = folder / "tokenizer.json"
    if not path.is_file():
        table = LlamaTokenizer.from_pretrained(folder).backend_tokenizer.to_str(pretty=True)
        with naming(path):
            path.write_text(table, encoding="utf-8")


def write_processor(folder: Path, tower: StrPath, vision: "PretrainedConfig") -> None:
    """What AutoProcessor makes a LlavaProcessor of: what fastvid makes of a picture, and the token of its rows."""
    square, said = {"height": vision.image_size, "width": vision.image_size}, processor_settings(tower)
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_resize": True,
            "size": square,  # as frames are: the aspect ratio is not kept
            "resample": 0,  # nearest neighbour
            "do_center_crop": False,
            "crop_size": square,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "do_convert_rgb": True,
            "image_mean": said["image_mean"],
            "image_std": said["image_std"],
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor",
            "patch_size": vision.patch_size,
            "image_token": PATCH,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )


def llava_config(language: dict[str, Any], vision: "PreTrainedModel", tokens: VideoTokens) -> dict[str, Any]:
    """config.json of the llava format. A video's placeholders are the tokens that features take the place of."""
    import transformers

    text = getattr(transformers, by_model_type(language["model_type"]).config).from_dict(
        {
            key: value
            for key, value in language.items()
            if key != "architectures" and not key.startswith(("mm_", "use_mm"))
        }
    )
    grid = vision.config.image_size // vision.config.patch_size
    values = transformers.LlavaConfig(
        vision_config=vision.config.to_dict(),
        text_config=text.to_dict(),
        image_token_index=tokens.patch,
        image_seq_length=grid * grid,
        tie_word_embeddings=language["tie_word_embeddings"],
    ).to_dict()
    kept = {key: value for key, value in language.items() if key.startswith("mm_") or key.endswith("_token_id")}
    dtype = {"torch_dtype": language["torch_dtype"]}
    return {**values, **kept, "architectures": ["LlavaForConditionalGeneration"], **dtype}


def digest(path: Path) -> str:
    """SHA-256 of a file, by which a model card that somebody has edited is known."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_foreign(output: Path) -> None:
    """Only an empty folder or an earlier export of ours, with nothing beside it, may be replaced; which is told."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    try:
        earlier = json.loads((output / "config.json").read_text(encoding="utf-8"))[EXPORT_MARK]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--output {output} exists and is not an export of fastvid's; choose another folder") from None
    if others := sorted(path.name for path in output.iterdir() if not _EXPORTED.fullmatch(path.name)):
        raise ValueError(
            f"--output {output} also holds {', '.join(map(shown, others[:3]))}, which would go with the "
            "export there; move it away, or choose another folder"
        )
    told = earlier if isinstance(earlier, dict) else {}
    if (output / CARD).exists() and digest(output / CARD) != told.get("card"):
        raise ValueError(
            f"{output / CARD} was written by somebody since, and would go with the export there; move it away, or "
            "choose another folder"
        )
    log.warning(
        "%s holds an earlier export (format %s, of %s), which is replaced",
        output,
        told.get("format", "unknown"),
        told.get("checkpoint", "an unknown checkpoint"),
    )
