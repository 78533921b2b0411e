"""Bytes that one decoder layer takes: what it saves for backward, and the temporaries of its backward.

Dimensions: N packed rows, M keys of all segments, D channels, E = (H + 2K)·d columns of queries, keys and values,
A = H·d, B = K·d, F channels of the feed-forward block.
"""

import math
from dataclasses import dataclass

from fastvid_kernels import cpu

from fastvid.model.config import DecoderConfig
from fastvid.model.quantize import matrix_bytes

_FLASH_BLOCK = 128  # FlashAttention 2 rounds each segment of the queries' fp32 gradient up to so many rows


@dataclass(frozen=True)
class BatchRows:
    """What of a micro-batch decides the memory of its step.

    Attributes:
        rows: N, without rows before the first trained one.
        supervised_rows: those of them that leave the last layer.
        video_rows: those of them that are projected; None: all.
        prefix_rows: rows of the constant prefix, of which the model holds keys and values.
        frozen_rows: rows after those and before the first trained one.
        key_rows, last_key_rows: M, where keys are gathered (`AttentionLayout.kv_rows`), in a layer and in the last one;
            0: every segment attends to its own rows.
        segments: of queries.
        masked_pairs, last_masked_pairs: (query, key) pairs of the segments that "sdpa" needs a mask for, in a layer and
            in the last one (`masked_pairs`).
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


def masked_pairs(layout) -> int:
    """(Query, key) pairs of the segments of an `AttentionLayout` that "sdpa" needs a mask for. On the CPU."""
    queries, keys = (bounds.diff().long() for bounds in (layout.cu_seqlens_q, layout.cu_seqlens_k))
    return int((queries * keys * (4 * (keys - queries) > queries)).sum())


def matrices(c: DecoderConfig) -> tuple[tuple[int, int], ...]:
    """(inputs, outputs) of one layer's matrices."""
    queries, keys = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    D, F = c.hidden_size, c.intermediate_size
    return (D, queries + 2 * keys), (queries, D), (D, 2 * F), (F, D)


def linears(c: DecoderConfig) -> int:
    """Elements of one layer's matrices."""
    return sum(map(math.prod, matrices(c)))


def vectors(c: DecoderConfig) -> int:
    """Elements of one layer's norms and biases."""
    biases = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim if c.qkv_bias else 0
    return 2 * c.hidden_size + biases + (2 * c.head_dim if c.qk_norm else 0)


def frozen_matrix_bytes(c: DecoderConfig, frozen_dtype: str) -> int:
    """Bytes of one layer's matrices as `frozen_dtype` stores them."""
    return sum(matrix_bytes(frozen_dtype, *shape) for shape in matrices(c))


@dataclass(frozen=True)
class LayerMemory:
    """One layer of a decoder in which gradients pass.

    Attributes:
        config: sizes.
        batch: `BatchRows`.
        trained: its parameters get gradients.
        size, residual, stored: bytes of a number in the compute dtype, the residual stream and a parameter's gradient.
        frozen_dtype: how frozen matrices are stored; None: in the compute dtype.
        on_cpu: the model runs on the CPU.
        one_call_per_segment: attention is "sdpa", so that its output exists twice where `o` is trained. Otherwise it
            is, on the CPU, "avx512", which saves its inputs only; on a GPU FlashAttention 2, which takes most.
    """

    config: DecoderConfig
    batch: BatchRows
    trained: bool
    size: int
    residual: int
    stored: int
    frozen_dtype: str | None
    on_cpu: bool
    one_call_per_segment: bool

    @property
    def _widths(self):
        c = self.config
        return c.hidden_size, c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim, c.intermediate_size

    @property
    def _inputs_only(self):
        """Whether attention takes keys from where they lie, and saves neither a copy nor its output."""
        return self.on_cpu and not self.one_call_per_segment

    def saved(self, recompute: str, *, last: bool = False) -> int:
        """Bytes that wait for backward, with the layer recomputed as "none", "selective" or "full".

        Args:
            last: it is the last layer, of which only supervised rows go on.
        """
        (D, A, B, F), size, batch = self._widths, self.size, self.batch
        rows, frozen = batch.rows, batch.frozen_rows
        if recompute == "none":  # keys and values of all rows before the first trained one
            before = (batch.prefix_rows + frozen) * 2 * B * size if frozen else 0
        else:  # the frozen stream that the layer begins with; "selective" keeps its products too
            before = frozen * (D * self.residual + (size * 2 * (A + B + D + F) if recompute == "selective" else 0))
        if recompute == "full":
            return rows * D * self.residual + before
        leaving = batch.supervised_rows if last else rows
        inputs_only = self._inputs_only
        output = 0 if inputs_only and not self.trained and recompute == "none" else A
        products = rows * 2 * B + leaving * (A + output + 2 * F)
        statistics = 0 if inputs_only else leaving * 4 * self.config.num_heads  # attention's log-sum-exp
        if recompute == "selective":  # which makes masks again
            return rows * D * self.residual + size * (products + leaving * 2 * D) + statistics + before
        twice = A if self.one_call_per_segment else 0
        inputs = rows * D + leaving * (D + F + twice + (D if last else 0)) if self.trained else 0
        norm = D * self.residual + 4
        norms = (rows + leaving * (2 if last else 1)) * norm
        if self.config.qk_norm:  # each head's rows, and a number for each
            norms += leaving * (A * size + 4 * self.config.num_heads) + rows * (B * size + 4 * self.config.num_kv_heads)
        return norms + size * (products + inputs) + statistics + self._of_segments(last) + before

    def _of_segments(self, last):
        """Of segments with more keys than queries: masks, or queries and outputs of up to a quarter more rows."""
        if not self.one_call_per_segment:
            return 0
        batch = self.batch
        queries, gathered, masked = (
            (batch.supervised_rows, batch.last_key_rows, batch.last_masked_pairs)
            if last
            else (batch.rows, batch.key_rows, batch.masked_pairs)
        )
        # On the CPU they stand in the place of the queries, which on a GPU lie in one tensor with keys and values.
        more = queries * self._widths[1] * 3 // 2 if gathered and not self.on_cpu else 0
        return self.size * (masked + more)

    def backward(self, recompute: str, *, last: bool = False) -> int:
        """Most bytes that its backward takes beyond what the layer had saved.

        Args:
            last: as for `saved`. What then takes most is the gradient of keys and values, which all rows have.
        """
        made_again = self._made_again(recompute, last)
        if last:
            return made_again + max(self._attention(recompute == "none", last), self._keys_and_values())
        phases = self._feed_forward(), self._attention(recompute == "none"), self._quantized_product()
        return made_again + self._residual_gradient() + max(phases)

    def forward(self) -> int:
        """Most bytes that its forward takes, where nothing is saved."""
        rows, F, size = self.batch.rows, self.config.intermediate_size, self.size
        return max(rows * 3 * F * size + self._block(), self._quantized_product()) + self._residual_gradient()

    def _made_again(self, recompute, last):
        """What recomputation brings back for the layer's backward, less what it kept for that alone."""
        if recompute == "none":
            return 0
        gathered = 0 if self._inputs_only else 2 * self.batch.key_rows * self._widths[2] * self.size
        if recompute == "selective":  # the last product, which nothing saved needs, is not asked for again
            gathered += (self.batch.supervised_rows if last else self.batch.rows) * self.config.hidden_size * self.size
        return self.saved("none", last=last) - self.saved(recompute, last=last) + gathered

    def _residual_gradient(self):
        rows, size, residual = self.batch.rows, self.size, self.residual
        return rows * self.config.hidden_size * (residual + (size if size != residual else 0))

    def _block(self):
        """Temporaries of SwiGLU where it is a chain of torch's operations."""
        chains = self.on_cpu and (self.size == 4 or cpu.rows_obstacle() is not None)
        numbers = min(self.batch.rows * self.config.intermediate_size, cpu.BLOCK_NUMBERS)
        return numbers * (20 if self.size < 4 else 8) if chains else 0

    def _feed_forward(self):
        (D, _, _, F), rows, size = self._widths, self.batch.rows, self.size
        if not self.trained:
            return rows * 3 * F * size + self._block()
        # A weight's gradient, in the compute dtype and then in its own, beside the one that it is added to.
        each = size + (self.stored if self.stored != size else 0)
        down = rows * F * size + each * D * F
        swiglu = rows * 2 * F * size + self._block()  # down's input is gone
        gate_up = rows * (D - F) * size + each * 2 * D * F  # SwiGLU's too
        return max(down, swiglu, gate_up)

    def _attention(self, regathers, last=False):
        """Of attention, when the feed-forward block's saved tensors are gone."""
        (D, A, B, F), batch, size = self._widths, self.batch, self.size
        rows, gathered = batch.rows, batch.last_key_rows if last else batch.key_rows
        keys, queries = gathered or rows, batch.supervised_rows if last else rows
        gone = queries * (D * self.residual + 4 + size * (2 * F + (D + F if self.trained else 0)))
        gradients = size * (2 * queries * A + 2 * keys * B)  # of the output and the queries; of keys and values
        again = size * 2 * gathered * B if regathers else 0
        if self._inputs_only:
            return size * 2 * queries * A + 2 * rows * B * (4 + size) - gone
        if self.one_call_per_segment:  # each segment's, and all of them, when a GPU's copies of keys are gone
            joined = size * max(queries * A, keys * B)
            call = again + joined if self.on_cpu else max(again, joined)
        else:  # the queries' in fp32 until all blocks of keys are done; with fewer heads of keys, theirs for each head
            call = again + 4 * A * (queries + _FLASH_BLOCK * batch.segments) + 8 * self.config.num_heads * queries
            call += size * 2 * keys * A if A != B else 0
        if not self.on_cpu:  # rope_keys' kernel sums shared keys' in registers, when the output's is gone
            summed = size * (rows * ((0 if last else A) + 2 * B) - queries * A)
        elif gathered:  # in fp32: of K and then of V the rows widened, and their sums
            summed = 2 * 4 * B * (rows + batch.frozen_rows + batch.prefix_rows) + (0 if size == 4 else 4 * B * gathered)
        else:
            summed = 0
        return gradients + max(call, summed) - gone

    def _keys_and_values(self):
        """Of the last layer's keys and values, when nothing else of the layer is left but its first norm's."""
        (D, A, B, _), rows, size = self._widths, self.batch.rows, self.size
        kept = rows * (D * self.residual + 4 + (size * D if self.trained else 0))
        each = (size + (self.stored if self.stored != size else 0)) if self.trained else 0
        angles = 4 * rows * self.config.head_dim * 2
        taken = 2 * self._residual_gradient() + rows * size * 4 * B + angles + each * D * (A + 2 * B)
        return taken + kept - self.saved("none", last=True)

    def _quantized_product(self):
        """Temporaries of the gradient of the widest product with a matrix in few bits: the matrix or the rows anew."""
        if self.frozen_dtype is None:
            return 0
        (inputs, outputs), rows = max(matrices(self.config), key=math.prod), self.batch.rows
        made = rows * outputs if self.frozen_dtype == "fp8" else self.size * inputs * outputs
        return made + rows * self.size * (inputs + outputs)
