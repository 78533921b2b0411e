"""A model filled with the weights that training starts from."""

import logging

import torch

from fastvid.batch import VideoTokens
from fastvid.dist.sharding import held_part
from fastvid.files import StrPath
from fastvid.model.finite import not_finite
from fastvid.model.quantize import QuantizedLinear
from fastvid.model.video_llava import VideoLlava
from fastvid.weights.starting import StartingWeights

log = logging.getLogger("fastvid")


def load_weights(
    model: VideoLlava,
    folder: StrPath,
    *,
    tokens: VideoTokens,
    projector: StrPath | None = None,
    seed: int = 42,
    adapter: StrPath | None = None,
) -> None:
    """Fill every parameter of a VideoLlava, a tensor at a time; of a sharded one each rank copies its own rows.

    Matrices in few bits are quantised on the model's device, one after the other, from what the files hold: no two of
    them exist there in full at once.

    Args:
        model: plain or FSDP2-sharded on dimension 0; may come from ``to_empty``. Values are cast to the
            parameters' dtypes.
        folder: model folder in any form that `read_model_config` reads; `model.config` was read from it.
        tokens: `added` are the ids whose rows are made new.
        projector: projector file or checkpoint folder; its projector and its start and end rows replace the folder's.
        seed: of what no file holds.
        adapter: folder of LoRA's matrices (`read_adapter`): what a model with LoRA starts from, and what is merged into
            the matrices of one without.

    Raises:
        ValueError: names missing, mis-shaped and unexpected tensors, their file and the remedy; nothing was copied.
            Or tensors with values that are not finite.
    """
    starting = StartingWeights(
        model.config,
        folder,
        tokens=tokens,
        projector=projector,
        seed=seed,
        lora=model.trainable.lora,
        adapter=adapter,
    )
    starting.check()
    if starting.makes_projector:
        log.warning(
            "%s holds no %s projector and no projector file was given: the projector starts untrained",
            folder,
            model.config.projector_type,
        )
    if starting.makes_second and not model.trainable.projector:
        raise ValueError(
            f"{projector or folder} holds no projector of a second vision tower, and none is trained: leave "
            "--freeze_mm_mlp_adapter and --freeze_backbone out, or give one with --pretrain_mm_mlp_adapter"
        )
    if starting.makes_second:
        log.warning("no file holds a projector of the second vision tower: it starts untrained")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(parameter, starting.pieces(name))
        for name, linear in model.named_modules():
            if isinstance(linear, QuantizedLinear):
                weight = torch.cat([piece.to(model.embed.weight.device) for piece in starting.pieces(f"{name}.weight")])
                if not_finite({name: weight}):
                    starting.refuse_not_finite(f"{name}.weight")
                linear.quantize_(weight)
    for name in not_finite(dict(model.named_parameters())):
        starting.refuse_not_finite(name)


def _fill(parameter, pieces):
    """Copy the rows that this rank holds of the tensor that `pieces` make, one under the other."""
    held, _ = held_part(parameter)
    local, first, at = held.local, held.offset, 0
    for piece in pieces:
        start, end = max(at, first), min(at + len(piece), first + len(local))
        if start < end:
            local[start - first : end - first].copy_(piece[start - at : end - at])
        at += len(piece)
    assert at == parameter.shape[0], f"{at} rows for a parameter of {list(parameter.shape)}"
