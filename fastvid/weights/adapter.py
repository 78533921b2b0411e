"""LoRA adapters in PEFT's format: adapter_config.json, and adapter_model.safetensors beside it.

Names and settings are those that ``peft`` writes for the language model alone, such as LlamaForCausalLM.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from fastvid.checkpoints import checkpoint
from fastvid.config.policy import LORA_TARGETS, Lora
from fastvid.files import StrPath, atomic_path, is_url, read_json_object, shown, write_json
from fastvid.model.config import DecoderConfig
from fastvid.provenance import EXPORT_MARK, Provenance
from fastvid.weights.model_folder import open_tensors
from fastvid.weights.names import lora_parts, standard_name
from fastvid.weights.projector_file import save_tensors

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of names in the file
_OTHER_WEIGHTS = "adapter_model.bin"  # of older versions of PEFT
_KEY = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.weight")
_MERGE_ELSEWHERE = "merge the adapter into its base model with PEFT (merge_and_unload), and give the folder of that"
# PEFT's settings that are read, or that change nothing in what the tensors compute. Any other that is set may do so.
_HARMLESS = {
    *("peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),  # the tensors tell
    *("task_type", "base_model_name_or_path", "revision", "auto_mapping", "peft_version", "inference_mode"),
    *("eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
# Values that change nothing. Other ways to draw new matrices, such as PiSSA's, change the base model as well.
_ALLOWED: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}


@dataclass(frozen=True)
class Adapter:
    """Low-rank matrices that were trained.

    Attributes:
        path: where they lie.
        lora: what they are.
        tensors: {PEFT's name behind `base_model.model.`: CPU tensor}, of every target of every layer.
    """

    path: Path
    lora: Lora
    tensors: Mapping[str, Tensor]

    def digest(self) -> str:
        """What identifies the matrices wherever they lie, in a checkpoint or in PEFT's format."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            values = self.tensors[name].float().numpy()
            digest.update(f"{name} {list(values.shape)}\n".encode() + values.tobytes())
        return digest.hexdigest()


def merged_adapters(model_folder: StrPath) -> list[str]:
    """`Adapter.digest` of each adapter that a model folder's matrices hold already, as our exports say."""
    mark = read_json_object(Path(model_folder) / "config.json").get(EXPORT_MARK)
    held = mark.get("adapters") if isinstance(mark, dict) else None
    return [str(digest) for digest in held] if isinstance(held, list) else []


def adapter_of(path: StrPath) -> Path | None:
    """The folder that holds the adapter of a projector, by the path of its file, of a checkpoint that was verified, or
    of an --output_dir: a folder in PEFT's format, or a checkpoint. None: there is none."""
    path = Path(path)
    folder = path.parent if path.is_file() else path
    if (folder / CONFIG_FILE).is_file():
        return folder
    found = None if path.is_file() else path if (path / "state.json").is_file() else checkpoint.named(path)
    return found if found is not None and _lora_of_checkpoint(found) else None


def adapter_folder(path: StrPath) -> Path:
    """The folder that holds the adapter which a flag names: a folder in PEFT's format, or a checkpoint, be it the
    newest of an --output_dir; that is verified.

    Raises:
        ValueError: there is none; it is damaged; a URL.
    """
    if is_url(path):
        raise ValueError(f"{shown(path)} is a URL: download the adapter's folder and give its path")
    folder = adapter_of(path) if Path(path).is_dir() else None
    if folder is None:
        raise ValueError(
            f"{shown(path)} holds no LoRA adapter: give a folder with {CONFIG_FILE}, or a checkpoint-N folder or the "
            "--output_dir of a run with --lora_enable True"
        )
    if not (folder / CONFIG_FILE).is_file():
        checkpoint.named(folder)
    return folder


def read_adapter(folder: StrPath, config: DecoderConfig) -> Adapter:
    """The adapter in a folder that `adapter_of` or `adapter_folder` returned.

    Args:
        config: of the model that it was trained on.

    Raises:
        ValueError: names the file and the value that is missing, damaged or not computed, or does not fit the model.
    """
    folder = Path(folder)
    adapter = _read_peft(folder) if (folder / CONFIG_FILE).is_file() else _read_checkpoint(folder, config)
    _check(adapter, config)
    return adapter


def split(lora: Lora, trained: Mapping[str, Tensor], config: DecoderConfig) -> dict[str, Tensor]:
    """`Adapter.tensors` of what training holds by our names."""
    tensors = {}
    for ours, parts in lora_parts(config, lora).items():
        pieces = trained[ours].split([shape[0] for _, shape in parts])
        tensors |= {name: piece for (name, _), piece in zip(parts, pieces)}
    return tensors


def write_adapter(
    folder: StrPath, lora: Lora, tensors: Mapping[str, Tensor], base: str, provenance: Provenance | None = None
) -> list[Path]:
    """Write an adapter for PEFT into a folder; each file whole or not at all, the settings last.

    Args:
        tensors: as `Adapter.tensors`.
        base: the model folder that it was trained on, for PEFT to say.
        provenance: goes into the file of weights.

    Returns:
        The files.
    """
    folder = Path(folder)
    weights, settings = folder / WEIGHTS_FILE, folder / CONFIG_FILE
    save_tensors(weights, {_PREFIX + name: tensor.clone() for name, tensor in tensors.items()}, provenance)
    with atomic_path(settings) as temporary:
        write_json(
            temporary,
            {
                "peft_type": "LORA",
                "task_type": "CAUSAL_LM",
                "base_model_name_or_path": base,
                "r": lora.rank,
                "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
                "lora_dropout": lora.dropout,
                "target_modules": list(lora.targets),
                "use_rslora": lora.rslora,
                "use_dora": False,
                "bias": "none",
                "fan_in_fan_out": False,
                "init_lora_weights": True,
                "inference_mode": True,
                "modules_to_save": None,
                "rank_pattern": {},
                "alpha_pattern": {},
            },
        )
    return [settings, weights]


def _lora_of_checkpoint(folder):
    """What a checkpoint's run trained as LoRA; None: nothing."""
    return Lora.of_flags(checkpoint.read_state(folder).get("config", {}))


def _read_checkpoint(folder, config):
    lora = _lora_of_checkpoint(folder)
    assert lora is not None, "who gives the folder has looked"
    trained = checkpoint.read_full(folder, "model")
    expected = {
        ours: (sum(s[0] for _, s in parts), *parts[0][1][1:]) for ours, parts in lora_parts(config, lora).items()
    }
    found = {name: tuple(trained.shapes[name]) for name in trained if ".lora." in name}
    if found != expected:
        raise ValueError(
            f"{folder}: LoRA's matrices are not those of this model: give the folder that training started from as "
            "--model_name_or_path"
        )
    return Adapter(folder, lora, split(lora, trained, config))


def _read_peft(folder):
    path = folder / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(values, dict) or str(values.get("peft_type")).upper() != "LORA":
        kind = shown(values.get("peft_type")) if isinstance(values, dict) else "unknown"
        raise ValueError(f"{path}: an adapter of kind {kind} is not computed; only LORA is")
    _refuse_other_computation(path, values)
    rslora = values.get("use_rslora") or False
    rank, alpha, dropout = (values.get(key, 0) for key in ("r", "lora_alpha", "lora_dropout"))
    if (
        not (type(rank) is int and 1 <= rank <= 10_000)
        or not (isinstance(alpha, int | float) and 0 < alpha <= 10**6)
        or not (isinstance(dropout, int | float) and 0 <= dropout < 1)
        or not isinstance(rslora, bool)
    ):
        raise ValueError(
            f"{path}: r = {shown(rank)}, lora_alpha = {shown(alpha)}, lora_dropout = {shown(dropout)} and use_rslora = "
            f"{shown(rslora)} are no settings of LoRA; download it again"
        )
    weights = folder / WEIGHTS_FILE
    weights = weights if weights.is_file() or not (folder / _OTHER_WEIGHTS).is_file() else folder / _OTHER_WEIGHTS
    held = open_tensors(weights)
    tensors, targets = {standard_name(key) or key: held[key] for key in held}, set()
    for name in tensors:
        matched = _KEY.fullmatch(name)
        if matched is None or matched[2] not in LORA_TARGETS:
            raise ValueError(
                f"{weights}: {shown(name)} is of no matrix that has LoRA here ({', '.join(LORA_TARGETS)} of each "
                f"layer); {_MERGE_ELSEWHERE}"
            )
        targets.add(matched[2])
    chosen = tuple(target for target in LORA_TARGETS if target in targets)
    return Adapter(weights, Lora(rank, float(alpha), float(dropout), chosen, rslora), tensors)


def _refuse_other_computation(path, values):
    """Refuse settings with which the tensors are not all that PEFT computes with."""
    for key, value in values.items():
        if value and key not in _HARMLESS and value not in _ALLOWED.get(key, ()):
            raise ValueError(f"{path}: {shown(key)} = {shown(value)} is not computed; {_MERGE_ELSEWHERE}")


def _check(adapter, config):
    """Refuse an adapter whose tensors are not those of this model, or are not finite."""
    shapes = {name: shape for parts in lora_parts(config, adapter.lora).values() for name, shape in parts}
    problems = [f"{name} is missing" for name in shapes if name not in adapter.tensors]
    problems += [f"{name} is unexpected" for name in adapter.tensors if name not in shapes]
    problems += [
        f"{name} is {list(tensor.shape)}, the model's is {list(shapes[name])}"
        for name, tensor in adapter.tensors.items()
        if name in shapes and tuple(tensor.shape) != shapes[name]
    ]
    problems += [f"{name} is not finite" for name, tensor in adapter.tensors.items() if not tensor.isfinite().all()]
    if problems or not shapes:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise ValueError(
            f"{adapter.path} is not of this model: {'; '.join(problems[:3]) or 'it holds no tensors'}{more}. Give the "
            "model that it was trained on as --model_name_or_path, or download the adapter again"
        )


__all__ = [
    "CONFIG_FILE",
    "WEIGHTS_FILE",
    "Adapter",
    "adapter_folder",
    "adapter_of",
    "merged_adapters",
    "read_adapter",
    "split",
    "write_adapter",
]
