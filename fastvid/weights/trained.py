"""What training made of a model: its tensors, whole, and the projector file that it leaves.

D: hidden size.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastvid.batch import VideoTokens
from fastvid.files import StrPath
from fastvid.provenance import Provenance
from fastvid.weights.model_config import read_model_config
from fastvid.weights.names import projector_parts
from fastvid.weights.projector_file import save_tensors
from fastvid.weights.starting import StartingWeights


def trained_weights(
    base_folder: StrPath,
    trained: Mapping[str, Tensor],
    *,
    tokens: VideoTokens,
    projector: StrPath | None = None,
    projector_type: str | None = None,
    seed: int = 42,
    adapter: StrPath | None = None,
) -> StartingWeights:
    """The StartingWeights that a training run had, as far as its trained tensors leave them in use.

    Args:
        base_folder: the model folder that training started from.
        trained: {our name: whole tensor} of what it trained.
        tokens: of the run.
        projector: the projector file that it started from, if any; need not exist any more once all of it was trained.
        projector_type: as the run was told.
        seed: of the run.
        adapter: the LoRA adapter to merge into the model's matrices, if any.

    Raises:
        ValueError: as `read_model_config`.
    """
    weight = trained.get("projector.0.weight")
    if weight is not None:
        projector_type = "mlp2x_gelu" if "projector.2.weight" in trained else "linear"
        if tokens.start is None or {"boundary.weight", "embed.weight"} & set(trained):
            projector = None
    config = read_model_config(
        base_folder, projector_type=projector_type, vocab_size=tokens.vocab_size, projector=projector
    )
    if weight is not None:
        second = trained.get("projector.second.0.weight")
        config = dataclasses.replace(
            config, mm_hidden_size=weight.shape[1], mm_hidden_size_2=None if second is None else second.shape[1]
        )
    return StartingWeights(config, base_folder, tokens=tokens, projector=projector, seed=seed, adapter=adapter)


def trained_tensor(name: str, starting: StartingWeights, trained: Mapping[str, Tensor]) -> Tensor:
    """Our tensor `name` after training, whole, on the CPU: the trained one, else the one that training started from.

    The rows of <vid_start> and <vid_end> in the embedding table are those of a trained "boundary.weight".
    """
    pieces = [trained[name].detach().cpu()] if name in trained else starting.pieces(name)
    if name == "embed.weight" and "boundary.weight" in trained:
        table = torch.cat([piece.float() for piece in pieces])
        table[[starting.tokens.start, starting.tokens.end]] = trained["boundary.weight"].detach().to("cpu", table.dtype)
        return table
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def write_upstream_projector(
    path: StrPath,
    trained: Mapping[str, Tensor],
    base_folder: StrPath,
    tokens: VideoTokens,
    *,
    projector: StrPath | None = None,
    projector_type: str | None = None,
    seed: int = 42,
    provenance: Provenance | None = None,
) -> None:
    """Write what the reference's adapter training leaves: the embedding table, then the projector, all fp32.

    Keys and shapes are the reference's: ``model.embed_tokens.weight`` [tokens.vocab_size, D], then
    ``model.mm_projector.{0,2}.{weight,bias}``, or ``model.mm_projector.{weight,bias}`` of a linear one. Behind these
    come ``model.mm_projector_2…`` of a second vision tower.

    Args:
        path: ends in .bin (torch.save) or .safetensors.
        trained: {our name: whole tensor}; of it "projector.*", "boundary.weight" and "embed.weight" are used.
        base_folder, tokens, projector, projector_type, seed: as for `trained_weights`.
        provenance: goes into the file.

    Raises:
        ValueError: as `read_model_config`, and for another ending.
    """
    starting = trained_weights(
        base_folder, trained, tokens=tokens, projector=projector, projector_type=projector_type, seed=seed
    )
    state = {"model.embed_tokens.weight": trained_tensor("embed.weight", starting, trained)[: tokens.vocab_size]}
    c = starting.config
    for ours, theirs in projector_parts(c.projector_type, second=c.mm_hidden_size_2 is not None).items():
        state[theirs] = trained_tensor(ours, starting, trained)
    # Copies, because torch.save writes all that lies behind a view.
    save_tensors(Path(path), {name: tensor.to(torch.float32, copy=True) for name, tensor in state.items()}, provenance)
