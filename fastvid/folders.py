"""What a path that a user gives as a model's means, and the remedy where it is something else."""

import json
import os
from pathlib import Path

from fastvid.files import shown


def is_url(value) -> bool:
    """Whether an address was given where a path is wanted."""
    return "://" in os.fspath(value)


def model_folder(path) -> Path:
    """The folder that a model's path means: itself, or of a folder in the hub's cache its one snapshot; of several
    the one that the hub calls main.

    Raises:
        ValueError: a URL; a file; a LoRA adapter; a folder that training wrote, which holds no whole model, with what
            to give instead; a cache folder of several snapshots. Whatever else is wrong with a folder its readers say.
    """
    if is_url(path):
        raise ValueError(f"{shown(path)} is a URL; --model_name_or_path takes a folder on this machine "
                         "(`hf download NAME --local-dir FOLDER` makes one)")
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{shown(folder)} is a file, where a model's folder is wanted (`hf download NAME --local-dir "
                         "FOLDER` makes one)")
    if (folder / "adapter_config.json").is_file() and not [*folder.glob("model*.safetensors"),
                                                           *folder.glob("pytorch_model*.bin")]:
        raise ValueError(f"{shown(folder)} is a LoRA adapter, which is not computed: merge it into its base model, and "
                         "give the folder of that")
    if (folder / "config.json").exists() or not folder.is_dir():
        return folder
    if folder.name.startswith("models--") and (folder / "snapshots").is_dir():
        folder = folder / "snapshots"
    if folder.name == "snapshots" and folder.absolute().parent.name.startswith("models--"):
        return _snapshot(folder)
    if (folder / "model" / "config.json").is_file():
        raise ValueError(f"{folder} is an --output_dir; its model is {folder / 'model'}: give that")
    checkpoints = _checkpoints(folder)
    if (folder / "mm_projector.bin").is_file() or (folder / "mm_projector.safetensors").is_file():
        start = next(filter(None, map(_start, checkpoints)), "the model that training started from")
        raise ValueError(f"{folder} is an --output_dir of adapter training, which holds a projector and no model: give "
                         f"{start}, and {folder} as --projector (chat) or --pretrain_mm_mlp_adapter (train)")
    if checkpoints or _is_checkpoint(folder):
        what = "an --output_dir of checkpoints" if checkpoints else "a checkpoint"
        raise ValueError(f"{folder} is {what}, not a whole model; export it (fastvid export --checkpoint "
                         f"{folder} --format llama --output FOLDER) and give that folder")
    return folder


def _snapshot(folder):
    """The snapshot in a ``models--*/snapshots`` folder of the hub's cache."""
    found = sorted(path for path in folder.iterdir() if path.is_dir())
    if len(found) == 1:
        return found[0]
    try:
        main = folder / (folder.parent / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        main = None
    if main in found:
        return main
    if not found:
        raise ValueError(f"{folder} is empty: download the model again (`hf download NAME`)")
    raise ValueError(f"{folder} holds {len(found)} snapshots of the model: give one of them, such as {found[0]}")


def _is_checkpoint(folder):
    return (folder / "state.json").is_file() and (folder / "checksums.json").is_file()


def _checkpoints(folder):
    """Checkpoint folders of an --output_dir, the newest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdecimal() and _is_checkpoint(path)]
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def _start(checkpoint):
    """The model folder that a checkpoint's training started from, as its state says; None if it does not."""
    try:
        start = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))["config"]["model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return shown(start) if isinstance(start, str) else None
