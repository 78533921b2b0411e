"""The small file that adapter training leaves: the projector, and the embeddings of <vid_start> and <vid_end>.

The reference's form is ``mm_projector.bin``: the whole embedding table, of which two rows were trained, then the
projector (Video-LLaVA 0c8810f, VideoChatGPTTrainer._save).
"""

import json
from pathlib import Path

import torch
from torch import Tensor

from fastvid.batch import VideoTokens
from fastvid.checkpoints import checkpoint
from fastvid.checkpoints.shards import naming_tensors
from fastvid.files import StrPath, atomic_path
from fastvid.provenance import KEY, Provenance, add_to_bin
from fastvid.weights.model_folder import open_tensors
from fastvid.weights.names import projector_parts, projector_type, standard_name


def read_projector(path: StrPath, tokens: VideoTokens | None = None) -> dict[str, Tensor]:
    """A trained projector by our names, and "boundary.weight" [2, D] if the file holds start and end embeddings.

    Of two vision towers the projectors of both are read.

    Read are the reference's ``mm_projector.bin`` (an embedding table and ``model.mm_projector.*``), LLaVA's pretrained
    projectors (``model.`` may lack), the same as ``.safetensors``, and a checkpoint-N folder of adapter training.

    Args:
        path: file or folder.
        tokens: which rows of a whole table are the start's and the end's. None: the projector alone.

    Raises:
        ValueError: names a file that cannot be read, or a tensor that is missing, unexpected or too small.
    """
    path = Path(path)
    tensors = checkpoint.read_full(path, "model") if path.is_dir() else _by_our_names(path)
    names = set(tensors)
    low_rank = {name for name in names if ".lora." in name}  # `weights.adapter` reads those
    parts = projector_parts("mlp2x_gelu", second=True)
    other = sorted(names - {"embed.weight", "boundary.weight"} - set(parts) - low_rank)
    if other:
        larger = f"{path} holds more than a projector ({other[0]}, …): it is "
        if not path.is_dir():
            raise ValueError(larger + "a model's weights. Give the folder that it belongs to as --model_name_or_path")
        raise ValueError(
            f"{larger}a checkpoint of a larger part of the model. Export it (fastvid export --checkpoint "
            f"{path} --format llama --output FOLDER) and start from that folder."
        )
    found = {name: tensors[name] for name in names if name.startswith("projector.")}
    if tokens is not None and tokens.start is not None:
        if "boundary.weight" in names:
            found["boundary.weight"] = tensors["boundary.weight"]
        elif "embed.weight" in names:
            found["boundary.weight"] = _boundary_rows(path, tensors["embed.weight"], tokens)
    return found


def _by_our_names(path):
    """{our name: tensor} of a projector file in LLaVA's names."""
    file = open_tensors(path)
    keys = {name: key for key in file if (name := standard_name(key)) is not None}
    kind = projector_type(keys)
    if kind is None:
        raise ValueError(
            f"{path} holds no projector (mm_projector.weight, or mm_projector.0 and .2): "
            f"found {', '.join(list(file)[:4]) or 'nothing'}"
        )
    if kind not in ("linear", "mlp2x_gelu"):
        odd = next(
            name
            for name in keys
            if name.startswith("model.mm_projector.") and name not in projector_parts("mlp2x_gelu").values()
        )
        what = f"an {kind} projector" if kind != "unknown" else "a projector of another kind"
        raise ValueError(f"{path} holds {what} ({keys[odd]}, …), which is not computed; only linear and mlp2x_gelu are")
    parts = projector_parts(kind, second=projector_type(keys, second=True) is not None)
    missing = sorted(theirs for theirs in parts.values() if theirs not in keys)
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is not a whole projector")
    ours = {theirs: name for name, theirs in parts.items()}
    ours["model.embed_tokens.weight"] = "embed.weight"
    return {ours.get(name, name): file[key] for name, key in keys.items()}


def _boundary_rows(path, table, tokens):
    """[2, D]: start and end of an embedding table that is whole, or that holds just those two rows.

    A table that is whole has a row for each token, or as many as a multiple of 64, 128 or 256 that tables are padded
    to. Any other was trained with another tokenizer, whose start and end tokens have other rows.
    """
    if table.dim() == 2 and table.shape[0] == 2:
        return table
    whole = {tokens.vocab_size} | {-(-tokens.vocab_size // multiple) * multiple for multiple in (64, 128, 256)}
    if table.dim() != 2 or table.shape[0] not in whole:
        raise ValueError(
            f"{path}: model.embed_tokens.weight is {list(table.shape)}, the tokenizer of the model folder "
            f"has {tokens.vocab_size} tokens: it was trained on another model folder, whose <vid_start> "
            "and <vid_end> have other rows; give that one as --model_name_or_path"
        )
    return table[[tokens.start, tokens.end]]


def _order_metadata(path):
    """Sort the metadata of a .safetensors file in its place: the library's order differs from process to process."""
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        table = json.loads(file.read(length))
        table["__metadata__"] = dict(sorted(table["__metadata__"].items()))
        text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same text in another order"
        file.seek(8)
        file.write(text.ljust(length))


def save_tensors(path: StrPath, tensors: dict[str, Tensor], provenance: Provenance | None = None) -> None:
    """Write a file of named tensors, as .safetensors or with torch.save by its ending; whole or not at all.

    Args:
        provenance: to keep in it; the tensors are the same without.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.suffix not in (".bin", ".safetensors"):
        raise ValueError(f"{path}: a projector file ends in .bin (the reference's form) or .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    with naming_tensors(path), atomic_path(path) as temporary:
        if path.suffix == ".bin":
            _save_pickle(tensors, temporary)
            if provenance is not None:
                add_to_bin(temporary, provenance)
        else:
            held = {} if provenance is None else {KEY: json.dumps(provenance.to_json())}
            save_file(tensors, temporary, metadata={"format": "pt", **held})
            _order_metadata(temporary)


def _save_pickle(tensors, path):
    """``torch.save`` that raises an OSError, such as of a full disk, as one: torch puts a RuntimeError in its place."""
    with open(path, "wb") as file:
        try:
            torch.save(tensors, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
