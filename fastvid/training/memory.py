"""How much memory a training step takes, from what autograd saves; and which recomputation makes it fit.

Dimensions: D channels, V tokens of the vocabulary, W of a padded row of logits.
"""

import math
from dataclasses import dataclass, fields

import torch
from fastvid_kernels.cpu import BLOCK_NUMBERS
from fastvid_kernels.linear_cross_entropy import ROW, chunk_rows

from fastvid.model.config import ModelConfig
from fastvid.model.decoder import recomputed_layers
from fastvid.training.layer_memory import BatchRows, LayerMemory, frozen_matrix_bytes, linears, matrices, vectors

# AdamW keeps two moments: fp32, or codes and the scale of each block of 256. Paged ones leave the device when a step's
# activations need their place.
OPTIMIZER_BYTES = {
    "adamw": 8,
    "adamw_torch": 8,
    "adamw_torch_fused": 8,
    "adamw_8bit": 2 + 8 / 256,
    "paged_adamw_8bit": 0,
}
# Parts whose gradient passes through the decoder.
BELOW_THE_HEAD = frozenset({"projector", "boundary", "embed", "decoder"})
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

    def __str__(self):
        lines = [(f.name, getattr(self, f.name)) for f in fields(self) if f.type is int] + [("total", self.total)]
        table = "\n".join(f"  {name:<12}{size / 2**30:10.3f} GiB" for name, size in lines)
        layers = " layers" if isinstance(self.recompute, int) else ""
        return f"memory per rank (recompute {self.recompute}{layers}):\n{table}"


def parameter_counts(config: ModelConfig, trainable: frozenset[str]) -> dict[str, int]:
    """Elements of each part of the model that exists."""
    c = config.decoder
    D, V = c.hidden_size, c.vocab_size
    projector = config.mm_hidden_size * D + D + (D * D + D if config.projector_type == "mlp2x_gelu" else 0)
    counts = {"embed": V * D, "projector": projector, "decoder": c.num_layers * (linears(c) + vectors(c)) + D}
    if "boundary" in trainable:
        counts["boundary"] = 2 * D
    if not c.tie_word_embeddings:
        counts["head"] = V * D
    return counts


def whole_gradient_bytes(config: ModelConfig, trainable: frozenset[str]) -> int:
    """Bytes of a whole gradient in fp32, as a rank of FSDP2 holds it that adds up micro-batches before it reduces."""
    return 4 * sum(count for part, count in parameter_counts(config, trainable).items() if part in trainable)


def estimate(
    config: ModelConfig,
    *,
    trainable: frozenset[str],
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
    tiled: bool = False,
    sums_replicated: bool = False,
    summed: bool = False,
    **more_rows: int,
) -> MemoryEstimate:
    """Memory of one rank's step.

    Args:
        rows, supervised_rows, more_rows: of the largest micro-batch: fields of `BatchRows`.
        sharded: FSDP2 shards every part over `world_size` ranks.
        shard_trained: it shards the trained parts; None: as `sharded`.
        recompute: as for `Decoder`.
        on_cpu, one_call_per_segment: as `LayerMemory` takes them.
        tiled: the decoder's matrices are there twice more (`Linear.prepack`).
        sums_replicated: gradients are summed over ranks in one flat copy (`parallel.sum_replicated_gradients`).
        summed: gradients are added up in fp32, over micro-batches or, of replicated parameters, over ranks.
        (others: as for `VideoLlava`.)
    """
    c = config.decoder
    trainable = frozenset(trainable)
    batch = BatchRows(rows, supervised_rows, **more_rows)
    kept_layers = c.num_layers - recomputed_layers(recompute, c.num_layers)
    counts = parameter_counts(config, trainable)
    size, residual = compute_dtype.itemsize, 4 if fp32_residual else compute_dtype.itemsize
    trained = sum(count for part, count in counts.items() if part in trainable)
    frozen = sum(counts.values()) - trained
    shard_trained = sharded if shard_trained is None else shard_trained
    trained_ranks, frozen_ranks = (world_size if flag else 1 for flag in (shard_trained, sharded))

    stored = trained_dtype.itemsize
    # The projector's matrices, until backward.
    copied = size * counts["projector"] if "projector" in trainable and size < stored else 0
    weights = stored * trained // trained_ranks + size * frozen // frozen_ranks
    if frozen_dtype is not None:
        assert not sharded and "decoder" not in trainable
        weights += c.num_layers * (frozen_matrix_bytes(c, frozen_dtype) - size * linears(c))
    if tiled:
        weights += 2 * size * c.num_layers * linears(c)
    if fp32_residual and "embed" not in trainable:
        weights += (4 - size) * counts["embed"] // frozen_ranks
    if sharded and world_size > 1:
        # Gathered: the tables and the projector, which stay, and two layers: one computes, the next is on its way.
        unrounded = {"embed", *trainable} - {"projector"} if fp32_residual else ()
        weights += sum(
            count * (4 if part in unrounded else size) for part, count in counts.items() if part != "decoder"
        )
        weights += size * 2 * linears(c) - copied
    elif "decoder" in trainable and size < stored:
        layers = 1 if recompute == "selective" else min(c.num_layers, kept_layers + 1)  # one is recomputed at a time
        weights += size * linears(c) * layers

    keys_values = batch.prefix_rows * 2 * c.num_kv_heads * c.head_dim * size * c.num_layers
    kept, at_once = _loss_bytes(c, trainable, supervised_rows, size, on_cpu)
    turned = size * max(map(math.prod, matrices(c))) if tiled else 0  # on its way to tiles of the other direction
    layer = LayerMemory(
        c,
        batch,
        trained="decoder" in trainable,
        size=size,
        residual=residual,
        stored=stored,
        frozen_dtype=frozen_dtype,
        on_cpu=on_cpu,
        one_call_per_segment=one_call_per_segment,
    )
    saved, backward = _decoder_bytes(layer, recompute, c.num_layers - kept_layers)
    if not trainable & BELOW_THE_HEAD:
        saved, backward = 0, layer.forward()
    elif sharded and world_size > 1 and "decoder" in trainable:
        # One layer's whole gradients, and in fp32, on their way to the ranks that own them, those of the one before.
        backward += (size + 4) * linears(c)
    gradients = (4 if summed else stored) * trained // trained_ranks
    activations = saved + _projector_bytes(config, trainable, batch, size) + copied + kept
    working = turned + max(at_once, backward) + (0 if on_cpu else _CUBLAS_WORKSPACES)
    if sums_replicated:  # when a step's activations are gone
        working = max(working, gradients - activations)
    return MemoryEstimate(
        weights=weights + keys_values,
        gradients=gradients,
        optimizer=int(OPTIMIZER_BYTES[optimizer] * trained) // trained_ranks,
        activations=activations,
        working=working,
        recompute=recompute,
    )


def _decoder_bytes(layer, recompute, recomputed):
    """(what all layers save, what the backward of one of them takes beyond that at the worst moment).

    Args:
        layer: `LayerMemory`.
        recomputed: so many layers, the first ones, are recomputed whole.
    """
    layers = layer.config.num_layers
    of_kept = "selective" if recompute == "selective" else "none"
    modes = ["full"] * recomputed + [of_kept] * (layers - recomputed)
    saved = [layer.saved(mode, last=i == layers - 1) for i, mode in enumerate(modes)]
    # Layers alike take most in the first backward, while the others' still wait.
    first = max(0, layers - 2)
    worst = max(layer.backward(modes[i]) - sum(saved[i + 1 :]) for i in {first, min(first, max(0, recomputed - 1))})
    worst = max(worst, layer.backward(modes[-1], last=True))
    rows = layer.batch.supervised_rows
    return sum(saved) + rows * (layer.config.hidden_size * layer.residual + 4), worst  # and the final norm's


def _projector_bytes(config, trainable, batch, size):
    """What the projector saves."""
    if "projector" not in trainable:
        return 0
    each = config.mm_hidden_size + (2 * config.decoder.hidden_size if config.projector_type == "mlp2x_gelu" else 0)
    return (batch.rows if batch.video_rows is None else batch.video_rows) * each * size


def _loss_bytes(c, trainable, supervised_rows, size, on_cpu):
    """What the loss keeps until backward, and what exists at once while it is computed."""
    V, D = c.vocab_size, c.hidden_size
    width = -(-V // ROW) * ROW
    chunk = min(supervised_rows, chunk_rows(V)) * width
    trained = ("embed" if c.tie_word_embeddings else "head") in trainable
    table, padded = V * D * trained, 0 if on_cpu or width == V else width * D  # the kernel's copy of the head
    copies = size if size < 4 else 0  # of a trained head
    rows = supervised_rows * c.hidden_size * size if trainable & BELOW_THE_HEAD else 0
    block = min(chunk, BLOCK_NUMBERS) * (12 if size < 4 else 8) if on_cpu else 0  # where no kernel can run
    # A trained head's copy goes before its gradient is scaled.
    return rows + 4 * max(table, padded * trained), chunk * size + block + max(table * (size + copies), padded * size)


def choose_recompute(available: int, config: ModelConfig, **options) -> str | int:
    """The fewest recomputed layers with which a step fits into `available` bytes; "full" if all are too few.

    Args:
        options: as for `estimate`, without `recompute`.

    Returns:
        As `Decoder` takes it; "none" for no layer, "full" for all.
    """
    layers = config.decoder.num_layers
    for recompute in ("none", *range(1, layers)):
        if estimate(config, recompute=recompute, **options).total <= available:
            return recompute
    return "full"
