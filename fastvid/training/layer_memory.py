"""Bytes that a step's tensors take: measured on a model of the same width and few layers, on the meta device.

Its tensors have shapes but no numbers, so that nothing is allocated or computed; functions allocate as they would on
the device that runs (`fastvid_kernels.dispatch.meta_stands_for`). Libraries of attention do not say what they allocate:
functions that do stand for them.

Dimensions: N packed rows, M keys of all segments, H query heads, K key/value heads, d channels per head.
"""

import functools
import math
from dataclasses import dataclass, replace
from functools import partial

import torch
from fastvid_kernels.dispatch import meta_stands_for
from fastvid_kernels.quantize_fp8 import BackInFp8
from fastvid_kernels.way_back import WayBack
from torch.autograd.function import once_differentiable

from fastvid.batch import AttentionLayout, BatchPart, Branches, Channels, PackedBatch
from fastvid.config.policy import Trainable
from fastvid.model.attention import AVX512, Attention
from fastvid.model.branches import Parts
from fastvid.model.config import DecoderConfig, ModelConfig, Precision
from fastvid.model.lora import draw_dropout
from fastvid.model.quantize import QuantizedLinear, matrix_bytes
from fastvid.model.recompute import recomputed_layers
from fastvid.model.video_llava import VideoLlava
from fastvid.training.live_bytes import LiveBytes

_FLASH_BLOCK = 128  # FlashAttention 2 rounds each segment of the queries' fp32 gradient up to so many rows


@dataclass(frozen=True)
class BatchRows:
    """What of a micro-batch decides the memory of its step.

    Attributes:
        rows: N, without rows before the first trained one.
        supervised_rows: those of them that leave the last layer.
        video_rows: those of them that are projected; None: all.
        second_rows: those of `video_rows` that are of a second vision tower.
        prefix_rows: rows of the constant prefix, of which the model holds keys and values.
        frozen_rows: rows after those and before the first trained one.
        key_rows, last_key_rows: M, where keys are gathered (`AttentionLayout.kv_rows`), in a layer and in the last one;
            0: every segment attends to its own rows.
        segments: of queries.
        masked_pairs, last_masked_pairs: (query, key) pairs of the segments that "sdpa" needs a mask for, in a layer and
            in the last one (`masked_pairs`).
        branch_rows, last_branch_rows: queries of branches, where attention has two parts (`fastvid.batch.Branches`).
        beginning_rows, last_beginning_rows: keys of what those go on from.
        frozen_keys: keys of the frozen rows' segments; 0: those rows and the prefix, once.
    """

    rows: int
    supervised_rows: int
    video_rows: int | None = None
    prefix_rows: int = 0
    frozen_rows: int = 0
    key_rows: int = 0
    last_key_rows: int = 0
    segments: int = 0
    masked_pairs: int = 0
    last_masked_pairs: int = 0
    branch_rows: int = 0
    last_branch_rows: int = 0
    beginning_rows: int = 0
    last_beginning_rows: int = 0
    frozen_keys: int = 0
    second_rows: int = 0

    def on_meta(self, channels: Channels) -> PackedBatch:
        """A batch of such rows without numbers, with features of so many channels."""
        first, second = (channels, None) if isinstance(channels, int) else channels
        videos = self.rows if self.video_rows is None else self.video_rows
        before, rows = self.prefix_rows + self.frozen_rows, self.rows + self.frozen_rows
        own = _layout(self.rows, self.key_rows or (self.rows + before if before else 0), before, self.rows)
        own = _in_parts(own, self.branch_rows, self.beginning_rows, own_keys=0)
        last_keys = self.last_key_rows or self.rows + before
        last = _layout(self.supervised_rows, last_keys, before, self.rows)
        last = _in_parts(last, self.last_branch_rows, self.last_beginning_rows, own_keys=last_keys)
        parts = None
        if self.frozen_rows:
            frozen = _layout(self.frozen_rows, self.frozen_keys or before, self.prefix_rows, self.frozen_rows)
            none = AttentionLayout.of_lengths([], [], _indices(0))
            supervised = _indices(self.supervised_rows)
            parts = BatchPart(frozen, _indices(0), none), BatchPart(own, supervised, last)
            own, last = _behind(frozen, own), _behind(none, last)
        return PackedBatch(
            token_ids=_indices(rows),
            positions=_indices(rows, torch.int32),
            layout=own,
            video_rows=_indices(videos),
            features=_features(videos - self.second_rows, first),
            features_2=None if second is None else _features(self.second_rows, second),
            boundary_rows=_indices(2 * max(self.segments, 1)),  # as if each had a video
            loss_rows=_indices(self.supervised_rows),
            targets=_indices(self.supervised_rows),
            loss_layout=last,
            prefix_rows=self.prefix_rows,
            frozen_rows=self.frozen_rows,
            parts=parts,
        )


def _features(rows, channels):
    return torch.empty(rows, channels, dtype=torch.float16, device="meta")


def _indices(count, dtype=torch.int64):
    return torch.empty(count, dtype=dtype, device="meta")


def _layout(queries, keys, before, rows):
    """Of so many queries and keys, which lie among `rows` packed rows behind `before` others; 0 keys: their own."""
    if not keys:
        return AttentionLayout.of_lengths([queries]).map(_without_numbers)
    layout = AttentionLayout.of_lengths([queries], [keys], _indices(keys)).map(_without_numbers)
    return layout.replaced(way_back=WayBack(_indices(rows + 1, torch.int32), _indices(keys, torch.int32), before))


def _without_numbers(tensor):
    return tensor.to("meta")


def _behind(frozen, live):
    """A layout of both, whose keys lie end to end."""
    queries, keys = (one + other for one, other in zip(frozen.lengths, live.lengths))
    branches = live.branches and replace(
        live.branches,
        causal=_behind(frozen, live.branches.causal),
        first_query=sum(frozen.lengths[0]) + live.branches.first_query,
        first_key=sum(frozen.lengths[1]) + live.branches.first_key,
    )
    rows = _indices(len(frozen.kv_rows) + len(live.kv_rows))
    return AttentionLayout.of_lengths(queries, keys, rows, branches).map(_without_numbers)


def _in_parts(layout, branches, beginnings, *, own_keys):
    """With so many queries of branches, which go on from so many keys.

    Args:
        own_keys: the layout's keys, if the last of them are those of beginnings, and only branches attend to these.
    """
    if not branches:
        return layout
    (queries,), (keys,) = layout.lengths
    first = max(own_keys - beginnings, 0)
    causal = AttentionLayout.of_lengths([queries], [first or keys]).map(_without_numbers)
    causal = causal.replaced(kv_rows=layout.kv_rows, way_back=layout.way_back)
    full = AttentionLayout.of_lengths([branches], [beginnings]).map(_without_numbers)
    return layout.replaced(branches=Branches(causal, full, queries - branches, first))


def masked_pairs(layout: AttentionLayout) -> int:
    """(Query, key) pairs of the segments of an `AttentionLayout` that "sdpa" needs a mask for. On the CPU."""
    queries, keys = (bounds.diff().long() for bounds in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    return int((queries * keys * (4 * (keys - queries) > queries)).sum())


def linears(c: DecoderConfig) -> int:
    """Elements of one layer's matrices."""
    return sum(map(math.prod, matrices(c)))


def vectors(c: DecoderConfig) -> int:
    """Elements of one layer's norms and biases."""
    biases = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim if c.qkv_bias else 0
    return 2 * c.hidden_size + biases + (2 * c.head_dim if c.qk_norm else 0)


def matrices(c: DecoderConfig) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of one layer's matrices."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    D, F = c.hidden_size, c.intermediate_size
    return (D, queries + 2 * keys), (queries, D), (D, 2 * F), (F, D)


def frozen_matrix_bytes(c: DecoderConfig, frozen_dtype: str) -> int:
    """Bytes of one layer's matrices as `frozen_dtype` stores them."""
    return sum(matrix_bytes(frozen_dtype, *shape) for shape in matrices(c))


# Under a name by which selective recomputation keeps the results, as it keeps those of the libraries.
_LIBRARY = torch.library.Library("fastvid_measured", "DEF")
_LIBRARY.define("attention(Tensor q) -> (Tensor, Tensor)")
_LIBRARY.impl("attention", lambda q: (q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)), "Meta")


class _Flash(torch.autograd.Function):
    """What FlashAttention 2 takes, which is most of its kind: its backward sums the queries' gradient in fp32, and
    makes those of fewer key heads for each query head."""

    @staticmethod
    def forward(ctx, q_NHd, k_MKd, v_MKd, segments):
        out_NHd, lse_NH = torch.ops.fastvid_measured.attention(q_NHd)
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd, out_NHd, lse_NH)
        ctx.segments = segments
        return out_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        q_NHd, k_MKd, v_MKd, *_ = ctx.saved_tensors
        return *_flash_backward(q_NHd, k_MKd, v_MKd, ctx.segments), None


def _flash(q_NHd, k_MKd, v_MKd, layout, segments):
    return _Flash.apply(q_NHd, k_MKd, v_MKd, segments)


def _flash_backward(q_NHd, k_MKd, v_MKd, segments):
    (N, H, d), (M, K, _) = q_NHd.shape, k_MKd.shape
    grads = q_NHd.new_empty(q_NHd.shape), k_MKd.new_empty(k_MKd.shape), v_MKd.new_empty(v_MKd.shape)
    workspace = [
        q_NHd.new_empty(N + _FLASH_BLOCK * segments, H, d, dtype=torch.float32),
        q_NHd.new_empty(2, N, H, dtype=torch.float32),
        k_MKd.new_empty(2 if K != H else 0, M, H, d),
    ]
    del workspace
    return grads


def _flash_parts(segments):
    """The same, of branches."""

    def forward(q_NHd, k_MKd, v_MKd, layout, causal):
        out_NHd, lse_NH = torch.ops.fastvid_measured.attention(q_NHd)
        return out_NHd, lse_NH.T

    def backward(grad_NHd, q_NHd, k_MKd, v_MKd, *_):
        return _flash_backward(q_NHd, k_MKd, v_MKd, segments)

    return Parts(forward, backward)


class _OneSegment(torch.autograd.Function):
    """What `scaled_dot_product_attention` takes, beside a mask and copies with more rows, of which `others` are."""

    @staticmethod
    def forward(ctx, q_NHd, k_MKd, v_MKd, *others):
        out_NHd, lse_NH = torch.ops.fastvid_measured.attention(q_NHd)
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd, out_NHd, lse_NH, *others)
        return out_NHd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        return *(x.new_empty(x.shape) for x in ctx.saved_tensors[:3]), None, None


def _attention(batch, on_cpu, one_call_per_segment):
    """What allocates as a model's attention does."""
    if not one_call_per_segment and on_cpu:
        return AVX512
    if not one_call_per_segment:
        call = partial(_flash, segments=batch.segments)
        return Attention("flash", call, parts=_flash_parts(batch.segments))

    def call(q_NHd, k_MKd, v_MKd, layout):
        """As for each of many segments: tensors are split, and outputs and gradients joined."""
        last = len(q_NHd) != batch.rows
        masked = q_NHd.new_empty(batch.last_masked_pairs if last else batch.masked_pairs)
        # Queries and outputs of up to a quarter more rows. On a CPU they stand in the place of the queries, which on a
        # GPU lie in one tensor with keys and values.
        longer = not on_cpu and (batch.last_key_rows if last else batch.key_rows)
        more = q_NHd.new_empty(q_NHd.numel() * 3 // 2 if longer else 0)
        parts = (x.split([len(x)])[0] for x in (q_NHd, k_MKd, v_MKd))
        return torch.cat([_OneSegment.apply(*parts, masked, more)])

    return Attention("sdpa", call)


def measured(
    config: ModelConfig,
    batch: BatchRows,
    *,
    trainable: Trainable,
    precision: Precision,
    recompute: str | int,
    on_cpu: bool,
    one_call_per_segment: bool,
    prepacked: bool = False,
) -> tuple[int, int]:
    """(Bytes that wait for backward when a micro-batch's loss is there, most bytes of its step beyond those).

    Neither counts parameters, their gradients, the batch, and the constant prefix.

    Args:
        trainable, precision, recompute: as for `VideoLlava`.
        on_cpu: the model runs on the CPU.
        one_call_per_segment: attention is "sdpa". Otherwise it is, on the CPU, "avx512", which saves its inputs only;
            on a GPU FlashAttention 2, which takes most.
        prepacked: the decoder is (`Decoder.prepack`): its products save nothing, so that recomputation begins later.
    """
    layers = config.decoder.num_layers
    whole = recomputed_layers(recompute, layers)
    # Layers alike take alike, but for the first of a kind, and the model's last.
    few_whole, few_kept = min(whole, 3), min(layers - whole, 3)
    few = replace(config, decoder=replace(config.decoder, num_layers=few_whole + few_kept))
    recompute = recompute if recompute == "selective" else few_whole
    saved, begun, turns = _measured(
        few, batch, trainable, precision, recompute, on_cpu, one_call_per_segment, prepacked
    )
    more_whole = (whole - few_whole) * (begun[2] - begun[1] if few_whole == 3 else 0)
    more_kept = (layers - whole - few_kept) * (begun[-1] - begun[-2] if few_kept == 3 else 0)
    peak = max(peak + more_whole * (i > 0) + more_kept * (i > few_whole) for i, peak in enumerate(turns))
    saved += more_whole + more_kept
    return saved, peak - saved


@functools.lru_cache(maxsize=64)
def _measured(config, batch, trainable, precision, recompute, on_cpu, one_call_per_segment, prepacked):
    """(Bytes after forward, bytes when each layer begins, most bytes while it is each layer's turn to go backward).

    The last layer's turn begins with the step, and the first one's lasts until its end.
    """
    if precision.frozen == "nf4":  # bitsandbytes keeps the first table that it makes, for everybody
        precision = replace(precision, frozen="int8")  # which makes a matrix anew for each product too
    options = {"trainable": trainable, "precision": precision, "recompute": recompute}
    with meta_stands_for("cpu" if on_cpu else "cuda"):
        with torch.device("meta"):
            model = VideoLlava(config, attention=_attention(batch, on_cpu, one_call_per_segment), **options)
        for module in model.modules():
            if isinstance(module, QuantizedLinear):
                module.quantize_(torch.empty(module.outputs, module.inputs, dtype=precision.compute, device="meta"))
        if prepacked:
            model.decoder.prepack()
        for parameter in model.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None
        if batch.prefix_rows:
            model.keep_prefix([0] * batch.prefix_rows)
        draw_dropout(model, (0,))
        rows, live, begun, turns = batch.on_meta(config.channels), LiveBytes(), [], []

        def begin(layer, inputs):
            if len(begun) < config.decoder.num_layers:  # it is not being recomputed
                begun.append(live.now)

        def end(layer, inputs, outputs):
            branch = outputs.branch.live
            branch = branch.bits_ND if isinstance(branch, BackInFp8) else branch
            if branch.requires_grad and len(begun) < config.decoder.num_layers:
                branch.register_hook(turn)

        def turn(_):
            turns.append(live.peak)
            live.peak = live.now

        for layer in model.decoder.layers:
            layer.register_forward_pre_hook(begin)
            layer.register_forward_hook(end)
        with live:
            loss = model(rows)
            saved = live.now
            loss.backward()
    return saved, begun, [*turns, live.peak][::-1]
