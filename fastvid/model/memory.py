"""How much memory a training step takes, from what autograd saves; and which recomputation makes it fit.

Dimensions: N packed rows, D channels, E = (H + 2K)·d columns of queries, keys and values, A = H·d, F channels of the
feed-forward block, V tokens of the vocabulary, C channels of the vision tower.
"""

import math
from dataclasses import dataclass, fields
from functools import partial

import torch
from fastvid_kernels import avx512_rows
from fastvid_kernels.linear_cross_entropy import chunk_rows
from fastvid_kernels.row_blocks import BLOCK_NUMBERS

from fastvid.model.decoder import RECOMPUTE_MODES
from fastvid.model.quantize import matrix_bytes
from fastvid.model.video_llava import ModelConfig

# AdamW keeps two moments: fp32, or codes and the scale of each block of 256. Paged ones leave the device when a step's
# activations need their place.
OPTIMIZER_BYTES = {"adamw": 8, "adamw_torch": 8, "adamw_8bit": 2 + 8 / 256, "paged_adamw_8bit": 0}
# Parts whose gradient passes through the decoder.
BELOW_THE_HEAD = frozenset({"projector", "boundary", "embed", "decoder"})


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank at the peak of a step.

    Attributes:
        weights: parameters as they are stored, copies in the compute dtype that live until backward, copies in tiles,
            and the constant rows' keys and values.
        gradients: of trained parameters, in their dtype, or in fp32 where they are sums.
        optimizer: its moments.
        activations: saved for backward, and the gradients that the loss keeps until then.
        working: the largest temporaries: a chunk of logits, or one layer's, with what it recomputes.
        recompute: the mode that this is for.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
    recompute: str

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self) if f.type is int)

    def __str__(self):
        lines = [(f.name, getattr(self, f.name)) for f in fields(self) if f.type is int] + [("total", self.total)]
        table = "\n".join(f"  {name:<12}{size / 2**30:10.3f} GiB" for name, size in lines)
        return f"memory per rank (recompute {self.recompute}):\n{table}"


def parameter_counts(config: ModelConfig, trainable: frozenset[str]) -> dict[str, int]:
    """Elements of each part of the model that exists."""
    c = config.decoder
    D, V = c.hidden_size, c.vocab_size
    projector = config.mm_hidden_size * D + D + (D * D + D if config.projector_type == "mlp2x_gelu" else 0)
    counts = {"embed": V * D, "projector": projector, "decoder": c.num_layers * (_linears(c) + 2 * D) + D}
    if "boundary" in trainable:
        counts["boundary"] = 2 * D
    if not c.tie_word_embeddings:
        counts["head"] = V * D
    return counts


def whole_gradient_bytes(config: ModelConfig, trainable: frozenset[str]) -> int:
    """Bytes of a whole gradient in fp32, as a rank of FSDP2 holds it that adds up micro-batches before it reduces."""
    return 4 * sum(count for part, count in parameter_counts(config, trainable).items() if part in trainable)


def saved_bytes(config: ModelConfig, *, trainable: frozenset[str], rows: int, supervised_rows: int | None = None,
                video_rows: int | None = None, compute_dtype: torch.dtype, fp32_residual: bool = False,
                recompute: str = "none", one_call_per_segment: bool = False) -> int:
    """Bytes of activations that wait for backward: what autograd saves, and the rows that enter the decoder.

    Args:
        rows: N, without rows before the first trained one.
        supervised_rows: those of them that leave the last layer; None: all.
        video_rows: those of them that are projected; None: all.
        one_call_per_segment: attention runs on the CPU: by "sdpa", so that its output exists twice where `o` is trained,
            or, in bf16, by "avx512" or "blocked", which save their inputs only.
        (others: as for `VideoLlava`.)
    """
    c = config.decoder
    if not trainable & BELOW_THE_HEAD:
        return 0
    size, residual = compute_dtype.itemsize, 4 if fp32_residual else compute_dtype.itemsize
    D = c.hidden_size
    layer = partial(_layer_bytes, c, "decoder" in trainable, size, residual, recompute, one_call_per_segment)
    last = layer(rows, supervised_rows)
    leaving = rows if supervised_rows is None else supervised_rows
    projected = 0
    if "projector" in trainable:
        projected = config.mm_hidden_size + (2 * D if config.projector_type == "mlp2x_gelu" else 0)
    return ((c.num_layers - 1) * layer(rows) + last + leaving * (D * residual + 4)  # the final norm's
            + (rows if video_rows is None else video_rows) * projected * size)


def _layer_bytes(c, trained, size, residual, recompute, twice, rows, leaving=None):
    """Bytes that one layer saves; only `leaving` of its rows go on (None: all), as those of the last layer do."""
    D, E, A, F = c.hidden_size, (c.num_heads + 2 * c.num_kv_heads) * c.head_dim, c.num_heads * c.head_dim, \
        c.intermediate_size
    norm = D * residual + 4
    if recompute == "full":
        return rows * D * residual
    some = leaving is not None
    leaving = leaving if some else rows
    inputs_only = twice and size == 2
    output = 0 if inputs_only and not trained and recompute == "none" else A
    products = rows * (E - A) + leaving * (A + output + 2 * F)
    statistics = 0 if inputs_only else leaving * 4 * c.num_heads  # attention's log-sum-exp
    if recompute == "selective":
        return rows * D * residual + size * (products + leaving * 2 * D) + statistics
    inputs = rows * D + leaving * (D + F + (A if twice and not inputs_only else 0) + (D if some else 0)) if trained else 0
    norms = rows * norm + leaving * norm * (2 if some else 1)
    return norms + size * (products + inputs) + statistics


def estimate(config: ModelConfig, *, trainable: frozenset[str], rows: int, supervised_rows: int,
             compute_dtype: torch.dtype, optimizer: str = "adamw", world_size: int = 1, sharded: bool = False,
             recompute: str = "none", shard_trained: bool | None = None, video_rows: int | None = None,
             fp32_residual: bool = False, one_call_per_segment: bool = False,
             trained_dtype: torch.dtype = torch.float32, frozen_dtype: str | None = None,
             constant_rows: int = 0, key_rows: int = 0, tiled: bool = False,
             summed: bool = False) -> MemoryEstimate:
    """Memory of one rank's step.

    Args:
        rows, supervised_rows, video_rows: of the largest micro-batch.
        key_rows: keys of all its segments, where they are gathered (`AttentionLayout.kv_rows`).
        constant_rows: rows before the first trained one, of which keys and values are held.
        sharded: FSDP2 shards every part over `world_size` ranks.
        shard_trained: it shards the trained parts; None: as `sharded`.
        tiled: the decoder's matrices are there twice more (`Linear.tile`).
        summed: gradients are added up in fp32, over micro-batches or, of replicated parameters, over ranks.
        (others: as for `VideoLlava` and `saved_bytes`.)
    """
    c = config.decoder
    trainable = frozenset(trainable)
    counts = parameter_counts(config, trainable)
    size, residual = compute_dtype.itemsize, 4 if fp32_residual else compute_dtype.itemsize
    trained = sum(count for part, count in counts.items() if part in trainable)
    frozen = sum(counts.values()) - trained
    shard_trained = sharded if shard_trained is None else shard_trained
    trained_ranks, frozen_ranks = (world_size if flag else 1 for flag in (shard_trained, sharded))

    stored = trained_dtype.itemsize
    weights = stored * trained // trained_ranks + size * frozen // frozen_ranks
    if frozen_dtype is not None:
        assert not sharded and "decoder" not in trainable
        weights += c.num_layers * sum(matrix_bytes(frozen_dtype, *shape) - size * math.prod(shape)
                                      for shape in _matrices(c))
    if tiled:
        weights += 2 * size * c.num_layers * _linears(c)
    if fp32_residual and "embed" not in trainable:
        weights += (4 - size) * counts["embed"] // frozen_ranks
    if sharded and world_size > 1:
        # Gathered: the tables and the projector, which stay, and two layers: one computes, the next is on its way.
        unrounded = {"embed", *trainable} - {"projector"} if fp32_residual else ()
        weights += sum(count * (4 if part in unrounded else size) for part, count in counts.items() if part != "decoder")
        weights += size * 2 * _linears(c)
    elif "decoder" in trainable and size < stored:
        weights += size * _linears(c) * (c.num_layers if recompute == "none" else 1)

    options = {"trainable": trainable, "rows": rows, "supervised_rows": supervised_rows,
               "video_rows": video_rows, "compute_dtype": compute_dtype, "fp32_residual": fp32_residual,
               "one_call_per_segment": one_call_per_segment}
    keys_values = constant_rows * 2 * c.num_kv_heads * c.head_dim * size * c.num_layers
    kept, at_once = _loss_bytes(c, trainable, supervised_rows, size)
    turned = size * max(map(math.prod, _matrices(c))) if tiled else 0  # on its way to tiles of the other direction
    return MemoryEstimate(
        weights=weights + keys_values, gradients=(4 if summed else stored) * trained // trained_ranks,
        optimizer=int(OPTIMIZER_BYTES[optimizer] * trained) // trained_ranks,
        activations=saved_bytes(config, recompute=recompute, **options) + kept,
        working=turned + max(at_once, _layer_working_bytes(
            c, trainable, rows, supervised_rows, key_rows, size, residual, recompute, one_call_per_segment,
            _quantized_product_bytes(c, frozen_dtype, rows, size))), recompute=recompute)


def _loss_bytes(c, trainable, supervised_rows, size):
    """What the loss keeps until backward, and what exists at once while it is computed."""
    chunk = min(supervised_rows, chunk_rows(c.vocab_size)) * c.vocab_size
    table = c.vocab_size * c.hidden_size if ("embed" if c.tie_word_embeddings else "head") in trainable else 0
    copies = size if size < 4 else 0  # of a trained head
    rows = supervised_rows * c.hidden_size * size if trainable & BELOW_THE_HEAD else 0
    block = min(chunk, BLOCK_NUMBERS) * (12 if size < 4 else 8)  # where no kernel can run
    return rows + 4 * table, chunk * size + block + table * (size + copies)


def _layer_working_bytes(c, trainable, rows, supervised_rows, key_rows, size, residual, recompute, on_cpu, product):
    """Temporaries of a layer at their widest, in SwiGLU's backward (a chain of torch's operations, or one), attention's,
    or a quantised `product`'s; what is recomputed for it; less what the last layer has let go of by then."""
    per_row = c.intermediate_size * 3 * size + c.hidden_size * (residual + (size if size != residual else 0))
    chains = on_cpu and (size == 4 or avx512_rows.obstacle() is not None)
    block = min(rows * c.intermediate_size, BLOCK_NUMBERS) * (20 if size < 4 else 8) if chains else 0
    if not trainable & BELOW_THE_HEAD:
        return max(rows * per_row + block, product)  # of its forward
    layer = partial(_layer_bytes, c, "decoder" in trainable, size, residual, twice=on_cpu and size == 2, rows=rows)
    recomputed = max(0, layer("none") - layer(recompute))
    gone = layer(recompute, leaving=supervised_rows) if c.num_layers > 1 else 0
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    if on_cpu and size == 2:  # gradients: of the output and the queries; of keys and values, summed in fp32, then rounded
        attention = rows * (size * 2 * queries + 2 * keys * (4 + size) + c.hidden_size * residual)
    else:  # keys and values are gathered again; their gradients, and the sum of those in fp32
        attention = 4 * keys * (key_rows * size + (key_rows + rows if key_rows else 0))
    return max(rows * per_row + block, attention, product) + recomputed - gone


def _quantized_product_bytes(c, frozen_dtype, rows, size):
    """Temporaries of the gradient of the widest product with a matrix in few bits: the matrix or the rows anew."""
    if frozen_dtype is None:
        return 0
    inputs, outputs = max(_matrices(c), key=math.prod)
    made = rows * outputs if frozen_dtype == "fp8" else size * inputs * outputs
    return made + rows * size * (inputs + outputs)


def choose_recompute(available: int, config: ModelConfig, **options) -> str:
    """The cheapest recomputation with which a step fits into `available` bytes; "full" if none does.

    Args:
        options: as for `estimate`, without `recompute`.
    """
    return next((mode for mode in RECOMPUTE_MODES
                 if estimate(config, recompute=mode, **options).total <= available), "full")


def _matrices(c):
    """(inputs, outputs) of one layer's matrices."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    D, F = c.hidden_size, c.intermediate_size
    return (D, queries + 2 * keys), (queries, D), (D, 2 * F), (F, D)


def _linears(c):
    """Elements of one layer's matrices."""
    return sum(map(math.prod, _matrices(c)))
