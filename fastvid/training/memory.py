"""How much memory a training step takes, from what autograd saves; and which recomputation makes it fit.

Dimensions: D channels, V tokens of the vocabulary, W of a padded row of logits.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass, fields
from typing import Any

import torch

from fastvid.config.policy import Trainable
from fastvid.model.config import ModelConfig, Precision
from fastvid.model.lora import shapes
from fastvid.training.adamw8bit import takes_8_bits
from fastvid.training.layer_memory import BatchRows, frozen_matrix_bytes, linears, matrices, measured, vectors

# AdamW keeps two moments: fp32, or codes and the scale of each block of 256. Paged ones leave the device when a step's
# activations need their place.
OPTIMIZER_BYTES = {
    "adamw": 8,
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 0,
}
# torch gives cuBLAS 32 MiB on Hopper (8 before), for the thread that runs forward and for that of backward.
_CUBLAS_WORKSPACES = 2 * 32 * 2**20


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step.

    Attributes:
        weights: parameters as they are stored, copies in the compute dtype that live until backward, copies in tiles,
            and the constant rows' keys and values.
        gradients: of trained parameters, in their dtype.
        optimizer: its moments.
        activations: saved for backward, with the projector's matrices in the compute dtype, and the gradients that the
            loss keeps until then.
        working: the largest temporaries: a chunk of logits, or one layer's, with what it recomputes.
        recompute: what this is for, as `Decoder` takes it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    recompute: str | int

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.type is int)

    def __str__(self) -> str:
        lines = [(f.name, getattr(self, f.name)) for f in fields(self) if f.type is int] + [("total", self.total)]
        table = "\n".join(f"  {name:<12}{size / 2**30:10.3f} GiB" for name, size in lines)
        layers = " layers" if isinstance(self.recompute, int) else ""
        return f"memory per rank (recompute {self.recompute}{layers}):\n{table}"


def parameter_counts(config: ModelConfig, trainable: Trainable) -> dict[str, int]:
    """Elements of each part of the model that exists."""
    c = config.decoder
    D, V = c.hidden_size, c.vocab_size
    towers = [config.mm_hidden_size, config.mm_hidden_size_2]
    second_layer = D * D + D if config.projector_type == "mlp2x_gelu" else 0
    projector = sum(channels * D + D + second_layer for channels in towers if channels is not None)
    counts = {"embed": V * D, "projector": projector, "decoder": c.num_layers * (linears(c) + vectors(c)) + D}
    if trainable.boundary:
        counts["boundary"] = 2 * D
    if trainable.lora:
        counts["lora"] = c.num_layers * sum(map(math.prod, shapes(c, trainable.lora).values()))
    if not c.tie_word_embeddings:
        counts["head"] = V * D
    return counts


def whole_gradient_bytes(config: ModelConfig, trainable: Trainable) -> int:
    """Bytes of a whole gradient in fp32, as a rank of FSDP2 holds it that adds up micro-batches before it reduces."""
    return 4 * sum(count for part, count in parameter_counts(config, trainable).items() if part in trainable)


def estimate(
    config: ModelConfig,
    *,
    trainable: Trainable,
    rows: int,
    supervised_rows: int,
    compute_dtype: torch.dtype,
    optimizer: str = "adamw",
    world_size: int = 1,
    sharded: bool = False,
    recompute: str | int = "none",
    shard_trained: bool | None = None,
    fp32_residual: bool = False,
    on_cpu: bool = False,
    one_call_per_segment: bool = False,
    trained_dtype: torch.dtype = torch.float32,
    frozen_dtype: str | None = None,
    prepacked: bool = False,
    asked: bool = False,
    sums_replicated: bool = False,
    summed: bool = False,
    averaged: bool = False,
    sent_rounded: bool = False,
    **more_rows: int,
) -> MemoryEstimate:
    """Memory of one rank's step.

    Args:
        rows, supervised_rows, more_rows: of the largest micro-batch: fields of `BatchRows`.
        sharded: FSDP2 shards every part over `world_size` ranks.
        shard_trained: it shards the trained parts; None: as `sharded`.
        recompute: as for `Decoder`.
        on_cpu, one_call_per_segment: as `measured` takes them.
        prepacked: the decoder's matrices are there twice more (`Linear.prepack`).
        asked: questions are answered beside steps: of what is prepacked the last layer's whole queries, keys and
            values stay, of which steps take parts.
        sums_replicated: gradients are summed over ranks in one flat copy (`parallel.sum_replicated_gradients`).
        summed: gradients are added up in fp32, over micro-batches or, of replicated parameters, over ranks.
        averaged: an average of what is trained is kept (`fastvid.training.average`).
        sent_rounded: ranks send gradients in bf16.
        (others: as for `VideoLlava`.)
    """
    c = config.decoder
    batch = BatchRows(rows, supervised_rows, **more_rows)
    counts = parameter_counts(config, trainable)
    size, stored = compute_dtype.itemsize, trained_dtype.itemsize
    trained = sum(count for part, count in counts.items() if part in trainable)
    frozen = sum(counts.values()) - trained
    shard_trained = sharded if shard_trained is None else shard_trained
    trained_ranks, frozen_ranks = (world_size if flag else 1 for flag in (shard_trained, sharded))

    weights = stored * trained // trained_ranks + size * frozen // frozen_ranks
    if frozen_dtype is not None:
        assert not sharded and not trainable.decoder
        weights += c.num_layers * (frozen_matrix_bytes(c, frozen_dtype) - size * linears(c))
    if prepacked:
        weights += 2 * size * c.num_layers * linears(c) + asked * size * math.prod(matrices(c)[0])
    if fp32_residual:  # frozen embeddings and norms
        norms = (2 * c.num_layers + 1) * c.hidden_size
        wide = counts["embed"] * (not trainable.embed) + norms * (not trainable.decoder)
        weights += (4 - size) * wide // frozen_ranks
    gathers = sharded and world_size > 1
    if gathers:
        # The tables and the projector, which stay, and two layers: one computes, the next is on its way.
        unrounded = {"embed", *trainable} - {"projector"} if fp32_residual else ()
        weights += sum(
            count * (4 if part in unrounded else size)
            for part, count in counts.items()
            if part not in ("decoder", "lora")
        )
        weights += size * 2 * linears(c)
    # LoRA's matrices are gathered with their layer, also where nothing else of it is.
    of_a_layer = counts.get("lora", 0) // c.num_layers
    gathers_lora = of_a_layer > 0 and shard_trained and world_size > 1
    if gathers_lora:
        weights += size * 2 * of_a_layer
    if gathers_lora and not gathers:
        weights += size * sum(counts[part] for part in ("projector", "boundary") if part in trainable)
    keys_values = batch.prefix_rows * 2 * c.num_kv_heads * c.head_dim * size * c.num_layers
    activations, working = measured(
        config,
        batch,
        trainable=trainable,
        precision=Precision(
            compute=compute_dtype,
            trained=compute_dtype if gathers or gathers_lora else trained_dtype,  # FSDP2 gathers what it casts
            frozen=frozen_dtype,
            fp32_residual=fp32_residual,
        ),
        recompute=recompute,
        on_cpu=on_cpu,
        one_call_per_segment=one_call_per_segment,
        prepacked=prepacked,
    )
    on_the_way = size + 4 + 2 * sent_rounded  # a gradient as computed, in fp32, and in what it is sent in
    if gathers and trainable.decoder:
        # One layer's whole gradients, and in fp32, on their way to the ranks that own them, those of the one before.
        working += on_the_way * linears(c)
    if gathers_lora:
        working += on_the_way * of_a_layer
    if prepacked:  # a matrix on its way to tiles of the other direction
        working += size * max(map(math.prod, matrices(c)))
    if not on_cpu:
        working += _CUBLAS_WORKSPACES
    gradients = (4 if summed else stored) * trained // trained_ranks
    # Elements of LoRA's whose moments stay in fp32, be the rank no multiple of the blocks.
    whole = 0
    if trainable.lora and optimizer.endswith("8bit"):
        whole = c.num_layers * sum(
            math.prod(shape) for shape in shapes(c, trainable.lora).values() if not takes_8_bits(shape)
        )
    if sums_replicated:  # when a step's activations are gone
        working = max(working, gradients - activations)
    return MemoryEstimate(
        weights=weights + keys_values,
        gradients=gradients,
        optimizer=int(
            OPTIMIZER_BYTES[optimizer] * (trained - whole)
            + OPTIMIZER_BYTES["adamw"] * whole
            + (4 * trained if averaged else 0)
        )
        // trained_ranks,
        activations=activations,
        working=working,
        recompute=recompute,
    )


def choose_recompute(available: int, config: ModelConfig, **options: Any) -> str | int:
    """The fewest recomputed layers with which a step fits into `available` bytes; "full" if all are too few.

    Args:
        options: as for `estimate`, without `recompute`.

    Returns:
        As `Decoder` takes it; "none" for no layer, "full" for all.
    """
    choices = ["none", *range(1, config.decoder.num_layers), "full"]

    def fits(recompute):
        return estimate(config, recompute=recompute, **options).total <= available

    return choices[bisect_left(choices[:-1], True, key=fits)]
