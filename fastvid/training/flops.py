"""Floating-point operations of a training step, counted on the host from the batch, and what a device could do.

Dimensions: N packed rows, L supervised rows, D channels, H query heads, K key/value heads, d channels per head.
"""

from collections.abc import Iterable
from typing import NamedTuple

from fastvid.batch import PackedBatch
from fastvid.config.policy import Trainable
from fastvid.model.config import ModelConfig
from fastvid.model.lora import beside

# Dense bf16 TFLOP/s, with sums in fp32, by words of the name that CUDA gives the device. Sources: NVIDIA's data sheets
# (whose larger figures are for sparse matrices) of the data-centre cards, and its architecture white papers of GA102,
# AD102 and GB202 for GeForce and RTX cards. The first that fits counts.
PEAK_BF16 = (
    ("GB300", 2500.0),
    ("B300", 2250.0),
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("H100 PCIe", 756.0),
    ("H100 NVL", 835.0),
    ("H100", 989.0),
    ("H800 PCIe", 756.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A30", 165.0),
    ("A40", 150.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX PRO 6000 Blackwell Workstation Edition", 503.0),
    ("RTX 6000 Ada Generation", 364.0),
    ("RTX A6000", 155.0),
    ("GeForce RTX 5090", 209.0),
    ("GeForce RTX 4090", 165.0),
    ("GeForce RTX 3090", 71.0),
)
# Other cards than the one without such a word: lower clocks, fewer units, or a slice.
_OTHER_CARDS = ("Laptop", "Max-Q", "D", "Ti", "SUPER", "MIG")


class StepCounts(NamedTuple):
    """What one step takes; those of micro-batches and ranks add up.

    Attributes:
        samples: packed samples.
        rows: packed rows.
        supervised: supervised rows.
        sample_rows: rows of the samples laid end to end without sharing (`PackedBatch.sample_rows`).
        padding_rows: rows that stand for no sample (a rank that has none still takes part with one row).
        flops: as `Formula` counts them.
    """

    samples: int = 0
    rows: int = 0
    supervised: int = 0
    sample_rows: int = 0
    padding_rows: int = 0
    flops: int = 0


class Formula:
    """Counts the operations that a batch's loss and gradient need; a multiplication and an addition are two.

    Of a weight matrix with W entries: 2 W per row forward, 2 W per row whose input needs a gradient, 2 W per row for
    the gradient of the matrix if it is trained: 4 W in a frozen backbone, 6 W where it is trained (Kaplan et al. 2020,
    appendix B) and of LoRA's. Of attention: 4 H d per pair of a query and a key that the causal mask lets through, 8 H
    d backward (Chowdhery et al. 2022, appendix B). What need not be computed does not count:

    - recomputation, and what a kernel computes twice;
    - backward of rows before the first trained one (`PackedBatch.frozen_rows`);
    - in the last layer everything but keys and values, and in the head, of rows without supervision;
    - the constant prefix, whose keys and values are kept, but for the pairs that attend to it;
    - what is no matrix product: norms, rotations, embeddings, softmax, the optimizer.

    Args:
        config: of the model.
        trainable: parts that get a gradient.
    """

    def __init__(self, config: ModelConfig, trainable: Trainable):
        sizes = config.decoder
        width, kv_width = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.trainable, self.width, self.layers = trainable, width, sizes.num_layers
        # Weights of a layer that every row passes, and those that only rows with a query pass.
        self.keys_values = 2 * sizes.hidden_size * kv_width
        self.others = 2 * sizes.hidden_size * width + 3 * sizes.hidden_size * sizes.intermediate_size
        self.head = sizes.hidden_size * sizes.vocab_size
        # LoRA's, of the same two kinds.
        self.low_rank_keys_values = self.low_rank_others = 0
        lora = trainable.lora
        for place in beside(sizes, lora).values() if lora else ():
            for target, (first, last) in place.columns.items():
                weights = lora.rank * (place.inputs + last - first) if lora else 0
                if target in ("k_proj", "v_proj"):
                    self.low_rank_keys_values += weights
                else:
                    self.low_rank_others += weights
        second_layer = [] if config.projector_type == "linear" else [sizes.hidden_size**2]
        self.projector, self.projector_2 = (
            [channels * sizes.hidden_size, *second_layer]
            for channels in (config.mm_hidden_size, config.mm_hidden_size_2 or 0)
        )

    def of_batch(self, batch: PackedBatch) -> int:
        """Operations of one micro-batch, forward and backward; `batch` is on the host."""
        rows, live, supervised = batch.num_rows, batch.num_rows - batch.frozen_rows, batch.num_supervised
        supervised_live = int((batch.loss_rows >= batch.frozen_rows).sum())
        pairs, live_pairs = _pairs(batch.layout, batch.layout.cu_seqlens_q[:-1] >= batch.frozen_rows)
        last_rows, last_live, last_pairs, last_live_pairs = rows, live, pairs, live_pairs
        if batch.loss_layout is not None:
            last_rows, last_live = supervised, supervised_live
            first_of_runs = batch.loss_rows[batch.loss_layout.cu_seqlens_q[:-1].long()]
            last_pairs, last_live_pairs = _pairs(batch.loss_layout, first_of_runs >= batch.frozen_rows)

        def matrix(weights, rows, live, trained):
            return 2 * weights * (rows + live + (rows if trained else 0))

        decoder_trained, full_layers = self.trainable.decoder, self.layers - 1
        total = self.layers * matrix(self.keys_values, rows, live, decoder_trained)
        total += full_layers * matrix(self.others, rows, live, decoder_trained)
        total += matrix(self.others, last_rows, last_live, decoder_trained)
        total += self.layers * matrix(self.low_rank_keys_values, rows, live, True)
        total += full_layers * matrix(self.low_rank_others, rows, live, True)
        total += matrix(self.low_rank_others, last_rows, last_live, True)
        total += self.width * (full_layers * (4 * pairs + 8 * live_pairs) + 4 * last_pairs + 8 * last_live_pairs)
        total += matrix(self.head, supervised, supervised_live, self.trainable.head)
        projector_trained = self.trainable.projector
        second = batch.second_rows
        for projected, projector in ((batch.video_rows.numel() - second, self.projector), (second, self.projector_2)):
            for i, weights in enumerate(projector):  # the features themselves need no gradient
                total += matrix(weights, projected, projected if i and projector_trained else 0, projector_trained)
        return total

    def counts(self, batch: PackedBatch) -> StepCounts:
        """`StepCounts` of one micro-batch; `batch` is on the host."""
        return StepCounts(
            samples=len(batch.sample_ids),
            rows=batch.num_rows,
            supervised=batch.num_supervised,
            sample_rows=(batch.sample_rows or batch.num_rows) if batch.sample_ids else 0,
            padding_rows=0 if batch.sample_ids else batch.num_rows,
            flops=self.of_batch(batch),
        )

    def __str__(self) -> str:
        layer = self.keys_values + self.others
        kind, factor = ("trained", 6) if self.trainable.decoder else ("frozen", 4)
        low_rank = self.low_rank_keys_values + self.low_rank_others
        lora = f"6 x {low_rank:,} weights of LoRA x tokens x {self.layers} layers + " if low_rank else ""
        return (
            f"{factor} x {layer:,} {kind} weights x tokens x {self.layers} layers + {lora}12 x {self.width:,} x causal "
            f"pairs x {self.layers} layers + {6 if self.trainable.head else 4} x {self.head:,} x supervised "
            "tokens + projector; of the last layer only keys and values see unsupervised tokens, those before the "
            "first trained one have no backward, neither the constant prefix nor recomputation counts"
        )


def total(counts: Iterable[StepCounts]) -> StepCounts:
    """The sum of several `StepCounts`."""
    return StepCounts(*map(sum, zip(StepCounts(), *counts)))


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 operations per second of a GPU that `PEAK_BF16` knows, else None."""
    name = " ".join(_words(device_name))
    if any(f" {word.lower()} " in f" {name} " for word in _OTHER_CARDS):
        return None
    return next((tera * 1e12 for part, tera in PEAK_BF16 if f" {' '.join(_words(part))} " in f" {name} "), None)


def _words(name):
    return name.lower().replace("-sxm", " sxm").replace("-pcie", " pcie").split()


def _pairs(layout, live):
    """(query, key) pairs of all segments and of those where `live` [S] bool holds, per head."""
    queries, keys = (bounds.diff().long() for bounds in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    pairs = queries * keys - queries * (queries - 1) // 2
    return int(pairs.sum()), int((pairs * live).sum())
