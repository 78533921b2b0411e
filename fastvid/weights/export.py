"""A checkpoint or a model folder as the files of other programs: see `fastvid.export` for the formats."""

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from fastvid import __version__, provenance
from fastvid.checkpoints import checkpoint
from fastvid.checkpoints.find import checkpoint_folder
from fastvid.checkpoints.shards import naming_tensors
from fastvid.config import ExportConfig
from fastvid.data.exported_template import exported_template
from fastvid.data.tokenizer import load_tokenizer
from fastvid.features.towers import CLIP, kind_of
from fastvid.files import atomic_folder, model_folder, shown, write_json
from fastvid.provenance import EXPORT_MARK, KEY
from fastvid.video.towers.choice import check_tower, choose_tower
from fastvid.video.towers.load import load_tower
from fastvid.weights.adapter import CONFIG_FILE, WEIGHTS_FILE, adapter_of, merged_adapters, read_adapter, write_adapter
from fastvid.weights.card import CARD, model_card
from fastvid.weights.export_files import (
    digest,
    llava_config,
    model_config,
    refuse_foreign,
    write_processor,
    write_tokenizer_table,
)
from fastvid.weights.model_config import read_model_config
from fastvid.weights.names import llava_hf_name
from fastvid.weights.trained import trained_tensor, trained_weights, write_upstream_projector

log = logging.getLogger("fastvid")

SHARD_BYTES = 5_000_000_000


def export(config: ExportConfig, *, verify: bool = True) -> list[Path]:
    """Write what ``--format`` asks for; whole or not at all.

    Tensors are read, merged, cast and written one after the other: at most one shard (5 GB) is held in memory.

    Args:
        verify: compare the checkpoint with its checksums before. Not for one that this process has just written.

    Returns:
        The files written.

    Raises:
        ValueError: names the checkpoint, folder, file or tensor that cannot be used, and the remedy.
    """
    folder = checkpoint_folder(config.checkpoint) if verify else Path(config.checkpoint)
    run, trained_on = _training_config(folder), provenance.of_weights(folder)
    base, output = _base(folder, config.model_name_or_path, run["model_name_or_path"]), Path(config.output)
    tokenizer = load_tokenizer(base, run["mm_use_vid_start_end"])
    if json.loads(json.dumps(asdict(tokenizer.tokens))) != run["tokens"]:
        raise ValueError(
            f"{base} has other ids for the video tokens than {folder} was trained with: give the folder "
            "that training started from (--model_name_or_path)"
        )
    trained = checkpoint.read_full(folder, "model")
    start: dict[str, Any] = {
        "tokens": tokenizer.tokens,
        "projector": run["pretrain_mm_mlp_adapter"],
        "projector_type": run["mm_projector_type"],
        "seed": run["seed"],
    }
    adapter = adapter_of(folder)
    chosen = _format(config, folder, adapter)
    if chosen == "projector":
        if adapter is not None:
            log.warning(
                "%s also holds a LoRA adapter, which is left out: --format peft, llama or llava holds it", folder
            )
        write_upstream_projector(output, trained, base, **start, provenance=trained_on)
        return [output]
    if chosen == "peft":
        return _write_peft(output, folder, base, trained, start, trained_on)

    for source in (folder, base):
        if output.resolve() == source.resolve():
            raise ValueError(f"--output {output} is what the export is made of; choose another folder")
    refuse_foreign(output)
    starting = trained_weights(base, trained, **start, adapter=adapter)
    starting.check()
    _check_trained(folder, starting, trained)
    if chosen == "llava" and starting.config.mm_hidden_size_2 is not None:
        raise ValueError(
            "LlavaForConditionalGeneration has one vision tower, this model two: export it with --format llama"
        )
    tower = _tower(config, trained_on, folder, run["vision_tower"] or starting.config.vision_tower)
    with atomic_folder(output) as temporary:
        dtype = getattr(torch, config.dtype)
        tensors = _language_tensors(starting, trained)
        values = model_config(starting, tokenizer, tower, config.dtype)
        if chosen == "llava":
            vision = _load_tower(tower, starting.config)
            assert tower is not None, "_load_tower refuses that"
            check_tower(tower, trained_on, folder)
            tensors = _llava_tensors(tensors, vision)
            values = llava_config(values, vision, tokenizer.tokens)
        values[EXPORT_MARK] = {
            "version": __version__,
            "format": chosen,
            "checkpoint": str(folder),
            "adapters": merged_adapters(base) + ([] if starting.adapter is None else [starting.adapter.digest()]),
            KEY: replace(trained_on, tower=tower, lora=None).to_json(),  # an adapter is merged
        }
        _write_weights(temporary, ((name, tensor.to(dtype)) for name, tensor in tensors))
        tokenizer.save(temporary)
        if chosen == "llava":
            assert tower is not None, "_load_tower refuses that"
            write_tokenizer_table(temporary)
            write_processor(temporary, tower, vision.config)
            template = exported_template(tokenizer, trained_on.conv_mode, trained_on.question_order)
            (temporary / "chat_template.jinja").write_text(template, encoding="utf-8")
            rows = (vision.config.image_size // vision.config.patch_size) ** 2
            state = checkpoint.read_state(folder)
            card = model_card(output.absolute().name, base, tower, state, trained_on, rows=rows)
            (temporary / CARD).write_text(card, encoding="utf-8")
            values[EXPORT_MARK]["card"] = digest(temporary / CARD)
        write_json(temporary / "config.json", values)
        write_json(
            temporary / "generation_config.json",
            {
                "bos_token_id": tokenizer.bos,
                "eos_token_id": tokenizer.eos if len(tokenizer.stops) == 1 else list(tokenizer.stops),
                "pad_token_id": tokenizer.pad,
            },
        )
    return sorted(path for path in output.iterdir() if path.is_file())


def card_of(config: ExportConfig) -> str:
    """The model card of what `export` writes, for those formats that hold none."""
    folder = checkpoint_folder(config.checkpoint)
    state, trained_on = checkpoint.read_state(folder), provenance.of_weights(folder)
    run = _training_config(folder)
    kind = _format(config, folder, adapter_of(folder))
    tower = trained_on.tower or run["vision_tower"]
    base = config.model_name_or_path or run["model_name_or_path"]
    return model_card(Path(config.output).absolute().name, base, tower, state, trained_on, kind=kind)


def _format(config, folder, adapter):
    """What ``--format`` and ``--merge`` ask for."""
    if adapter is None and (config.merge or config.format == "peft"):
        flag = "--merge True" if config.merge else "--format peft"
        raise ValueError(f"{flag}: {folder} holds no LoRA adapter (--lora_enable); leave the flag out")
    if config.merge and config.format in ("projector", "peft"):
        raise ValueError(
            f"--merge makes a whole model, and --format {config.format} is none; give --format llama or llava"
        )
    return config.format or ("llama" if config.merge else "projector")


def _write_peft(output, folder, base, trained, start, trained_on):
    """An adapter for PEFT, and the projector beside it."""
    others = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    projector = "mm_projector.safetensors"
    if output.is_file() or set(others) - {CONFIG_FILE, WEIGHTS_FILE, projector}:
        raise ValueError(f"--output {output} holds something else than an adapter; choose another folder")
    config = read_model_config(base, vocab_size=start["tokens"].vocab_size)
    adapter = read_adapter(folder, config.decoder)
    output.mkdir(parents=True, exist_ok=True)
    write_upstream_projector(output / projector, trained, base, **start, provenance=trained_on)
    return [*write_adapter(output, adapter.lora, adapter.tensors, str(base), trained_on), output / projector]


def _base(folder, given, recorded):
    """The model folder to export over: the given one, else the one that the checkpoint's training started from."""
    if given is None and not Path(recorded).is_dir():
        relative = "" if Path(recorded).is_absolute() else " (a path from the folder that it was run in)"
        raise ValueError(
            f"{folder}: training started from {shown(recorded)}{relative}, which is not here: give that folder with "
            "--model_name_or_path"
        )
    return model_folder(given or recorded)


def _tower(config, trained_on, folder, otherwise):
    """The tower that an export names, or holds (format llava): that of the features."""
    try:
        return choose_tower(config.vision_tower, trained_on, folder, otherwise)
    except ValueError:
        if config.format == "llava" or config.vision_tower is not None:
            raise
        return trained_on.tower  # only named; chat looks for it


def _training_config(folder):
    """The flags of the run that saved a checkpoint and its "tokens", as a dict."""
    state = checkpoint.read_state(folder)
    saved = {**state.get("config", {}), "tokens": state.get("tokens")}
    names = (
        "model_name_or_path",
        "mm_use_vid_start_end",
        "pretrain_mm_mlp_adapter",
        "mm_projector_type",
        "vision_tower",
        "seed",
        "tokens",
    )
    missing = [name for name in names if name not in saved]
    if missing:
        raise ValueError(f"{folder}/state.json does not say {missing[0]}: it was not saved by fastvid's training")
    return {name: saved[name] for name in names}


def _check_trained(folder, starting, trained):
    """Refuse trained tensors that are not of this model."""
    for name in trained:
        if ".lora." in name:  # `read_adapter` has looked
            continue
        parts = starting.parts.get(name, [(name, (2, starting.config.decoder.hidden_size))])
        shape = (sum(part[0] for _, part in parts), *parts[0][1][1:])
        if (name not in starting.parts and name != "boundary.weight") or trained.shapes[name] != shape:
            raise ValueError(
                f"{folder}: {name} is {list(trained.shapes[name])}, which does not fit "
                f"{starting.folder.folder}: give the folder that training started from "
                "(--model_name_or_path)"
            )


def _language_tensors(starting, trained):
    """(LLaVA's name, tensor) of the whole model, one after the other, in the precisions they are held in."""
    for ours, parts in starting.parts.items():
        if len(parts) == 1:
            yield parts[0][0], trained_tensor(ours, starting, trained)
        else:
            pieces = trained[ours].split([shape[0] for _, shape in parts]) if ours in trained else starting.pieces(ours)
            yield from ((name, piece) for (name, _), piece in zip(parts, pieces))


def _llava_tensors(language, vision):
    """(llava-hf's name, tensor) of the whole model and its tower."""
    for name, tensor in language:
        yield llava_hf_name(name), tensor
    for name, tensor in vision.state_dict().items():
        yield f"vision_tower.vision_model.{name.removeprefix('vision_model.')}", tensor


def _load_tower(tower, model):
    """The CLIP tower, fp32, for LlavaForConditionalGeneration's fixed architecture."""
    if model.projector_type != "mlp2x_gelu":
        raise ValueError(
            "LlavaForConditionalGeneration has an mlp2x_gelu projector, this model a "
            f"{model.projector_type} one: export it with --format llama"
        )
    if tower is None:
        raise ValueError(
            "--format llava holds the vision tower, and the model's config.json names none: give --vision_tower"
        )
    vision = load_tower(tower, torch.float32)
    if (kind := kind_of(vision.config.to_dict())) is not CLIP:
        name = kind.name if kind else "another kind"
        raise ValueError(
            f"--format llava holds a tower of CLIP, and {shown(tower)} is one of {name}: export it with --format llama"
        )
    if vision.config.hidden_size != model.mm_hidden_size:
        raise ValueError(
            f"--vision_tower {tower} has {vision.config.hidden_size} channels, the projector takes "
            f"{model.mm_hidden_size}: give the tower that made the features"
        )
    return vision


def _write_weights(folder, tensors):
    """Safetensors files of at most SHARD_BYTES (or one tensor), and their index when they are several."""
    from safetensors.torch import save_file

    shards, pending, size = [], {}, 0

    def flush():
        path = folder / f"shard-{len(shards)}"
        with naming_tensors(path):
            save_file(pending, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors' own files are their owner's alone
        shards.append((path, list(pending), size))

    for name, tensor in tensors:
        if pending and size + tensor.nbytes > SHARD_BYTES:
            flush()
            pending, size = {}, 0
        pending[name] = tensor.contiguous()
        size += tensor.nbytes
    flush()
    places = {}
    for number, (path, names, _) in enumerate(shards, 1):
        last = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
        final = path.rename(folder / f"model{last}.safetensors")
        places |= dict.fromkeys(names, final.name)
    if len(shards) > 1:
        total = sum(size for _, _, size in shards)
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": places})
