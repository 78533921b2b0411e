"""What a run is made of, known by content: its data, features, tokenizer and starting weights, wherever they lie.

Digests do not depend on names, folders or (of weights) on how they are spread over files. Large things are sampled:
another file, another model or other features are noticed, a single changed value of gigabytes need not be.
"""

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvid.batch import by_tower
from fastvid.config import TrainConfig
from fastvid.data.dataset import SampleSet
from fastvid.files import model_folder
from fastvid.training.state import TrainState
from fastvid.weights.adapter import read_adapter
from fastvid.weights.model_folder import ModelFolder
from fastvid.weights.projector_file import read_projector

_WHOLE = 2**20  # bytes of a tensor up to which all of it is looked at; of larger ones as many, in so many pieces:
_PIECES = 16
_RECORDS = 16  # records, spread over the data, whose features are looked at
# What of state.json's "content" each flag decides.
FLAGS = {
    "data_path": "data",
    "video_folder": "features",
    "video_folder_2": "features",
    "model_name_or_path": "weights",
    "pretrain_mm_mlp_adapter": "projector",
    "lora_weights": "adapter",
}


def content_of(state: TrainState) -> dict[str, Any]:
    """JSON values that are equal for equal content: "data", "features", "weights", "tokenizer", "chat_template",
    "model", "projector", "adapter".

    Reads all data files, and of weights and features a part. For rank 0: the others have the same.
    """
    config = state.config
    folder = model_folder(config.model_name_or_path)
    projector, template = config.pretrain_mm_mlp_adapter, state.tokenizer.template
    adapter = config.lora_weights and read_adapter(config.lora_weights, state.model.config.decoder)
    return {
        "data": [_of_file(path) for path in config.data_path],
        "features": _of_features(state.loader.samples),
        "weights": _of_tensors(ModelFolder(folder)),
        "tokenizer": next(
            (_of_file(folder / name) for name in ("tokenizer.model", "tokenizer.json") if (folder / name).is_file()),
            None,
        ),
        "chat_template": template and hashlib.sha256(template.source.encode()).hexdigest(),
        "model": json.loads(json.dumps(asdict(replace(state.model.config, vision_tower=None)))),
        "projector": projector and _of_tensors(read_projector(projector, state.tokenizer.tokens)),
        "adapter": adapter and _of_tensors(adapter.tensors),
    }


def changes(saved: dict[str, Any], now: dict[str, Any], config: TrainConfig) -> list[str]:
    """What differs between the content of the run that a checkpoint belongs to and this run's, a line each.

    Args:
        saved, now: what `content_of` returned; entries that one of them lacks are not compared.
        config: `TrainConfig` of this run, for the names of files.
    """
    found = []
    if len(saved.get("data", ())) == len(now["data"]):
        found += [
            f"the content of --data_path {path}"
            for path, was, is_ in zip(config.data_path, saved["data"], now["data"])
            if was != is_ and None not in (was, is_)
        ]
    elif "data" in saved:
        found.append(f"the number of --data_path files ({len(saved['data'])} before, {len(now['data'])} now)")
    for was, is_ in zip(saved.get("features", ()), now["features"]):
        if was != is_ and was[1] and is_[1]:  # those that could be read
            second = f", or in --video_folder_2 {config.video_folder_2}" if config.video_folder_2 else ""
            found.append(f"the features of {is_[0]} in --video_folder {config.video_folder}{second}")
            break
    for name, said in (
        ("weights", f"the weights in --model_name_or_path {config.model_name_or_path}"),
        ("tokenizer", f"the tokenizer in --model_name_or_path {config.model_name_or_path}"),
        ("chat_template", f"the chat template in --model_name_or_path {config.model_name_or_path}"),
        (
            "projector",
            f"the content of --pretrain_mm_mlp_adapter {config.pretrain_mm_mlp_adapter}"
            if config.pretrain_mm_mlp_adapter
            else "the projector to start from (--pretrain_mm_mlp_adapter is not given now)",
        ),
        (
            "adapter",
            f"the content of --lora_weights {config.lora_weights}"
            if config.lora_weights
            else "the LoRA adapter to start from (--lora_weights is not given now)",
        ),
    ):
        if name in saved and saved[name] != now[name]:
            found.append(said)
    was, is_ = _flat(saved.get("model", {})), _flat(now["model"])
    found += [
        f"{name} of --model_name_or_path {config.model_name_or_path} ({was[name]!r} before, {is_[name]!r} now)"
        for name in was.keys() & is_.keys()
        if was[name] != is_[name]
    ]
    return found


def completed(found: dict[str, Any], samples: SampleSet) -> dict[str, Any]:
    """What `content_of` returned, also of features that were not made yet."""
    if all(digest for _, digest in found["features"]):
        return found
    return {**found, "features": _of_features(samples)}


def _of_file(path):
    """None of a pipe, which can be read once."""
    if not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_features(samples):
    """[(video, digest or None)] of some records."""
    found = []
    for i in range(0, len(samples), max(1, len(samples) // _RECORDS)):
        for name in samples.records.videos(i)[:1] if samples.features else ():
            if not samples.features.is_made(name):
                found.append([name, None])
                continue
            try:
                features, _ = samples.features.load(name)
            except (ValueError, OSError):  # such samples are skipped, and told
                found.append([name, None])
                continue
            found.append([name, _of_tensors({"2" * i: each for i, each in enumerate(by_tower(features))})])
    return found


def _of_tensors(tensors):
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        for piece in _pieces(tensor):
            digest.update(piece)
    return digest.hexdigest()


def _pieces(tensor: Tensor):
    """The bytes of a tensor, or some of them."""
    content = tensor.detach().contiguous().reshape(-1)
    width = content.element_size()
    if content.nbytes <= _WHOLE:
        return [_bytes(content)]
    length = _WHOLE // _PIECES // width
    begins = [(len(content) - length) * i // (_PIECES - 1) for i in range(_PIECES)]
    return [_bytes(content[begin : begin + length]) for begin in begins]


def _bytes(flat):
    return flat.view(torch.uint8).numpy().tobytes()


def _flat(values, prefix=""):
    """{dotted name: value} of nested dicts."""
    found = {}
    for name, value in values.items():
        found |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return found
