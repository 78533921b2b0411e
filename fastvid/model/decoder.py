"""The LLaMA decoder on packed rows (arXiv:2302.13971), and those of its kind, equal to transformers' models.

Dimensions: N packed rows, L supervised ones or live ones, C constant rows whose keys and values are known, D channels,
E = (H + 2K)·d columns of fused queries, keys and values, H query heads, K key/value heads, d channels per head,
F channels of the feed-forward block.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from fastvid_kernels.dispatch import use_triton
from fastvid_kernels.quantize_fp8 import Fp8Rows
from fastvid_kernels.rope_qk import rope_qk
from fastvid_kernels.swiglu import swiglu
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastvid.batch import AttentionLayout, BatchPart
from fastvid.config.policy import Lora
from fastvid.model.attention import SDPA, Attention, attend_rotated, rotates_to_keys
from fastvid.model.cache import Cache, LayerCache, PoolLayer
from fastvid.model.config import DecoderConfig, Precision, rotary_frequencies
from fastvid.model.fp8_block import Fp8Product, gate_up_swiglu, product_back_in_fp8
from fastvid.model.linear import Linear, make_linear
from fastvid.model.lora import LoraBranch, beside
from fastvid.model.norm import RMSNorm
from fastvid.model.quantize import Fp8Linear
from fastvid.model.recompute import keep_products, recomputed_layers
from fastvid.model.rows import Rows, rows_of, take_rows
from fastvid.model.stream import Stream


class DecoderLayer(nn.Module):
    """Attention and feed-forward block.

    Args:
        (others: as for `Decoder`.)
        keeps_products: recomputation keeps the products of matrices, and attention, which must not be overwritten.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        trained: bool,
        precision: Precision,
        attention: Attention,
        lora: Lora | None = None,
        keeps_products: bool = False,
    ):
        super().__init__()
        heads, kv_heads, d = config.num_heads, config.num_kv_heads, config.head_dim
        frozen_dtype = None if trained else precision.frozen
        linear = partial(make_linear, dtype=precision.stored(trained), trained=trained, frozen_dtype=frozen_dtype)
        norm = partial(
            RMSNorm,
            eps=config.rms_norm_eps,
            trained=trained,
            precision=precision,
        )
        places = {} if lora is None else beside(config, lora)
        self.lora = nn.ModuleDict(
            {
                matrix: LoraBranch(place, lora, dtype=precision.trained, inplace=not keeps_products)
                for matrix, place in places.items()
                if lora is not None
            }
        )
        fp8 = frozen_dtype == "fp8"  # low-rank products read rows as they are
        self.input_norm = norm(config.hidden_size, for_fp8=fp8 and "qkv" not in places)
        self.qkv = linear(config.hidden_size, (heads + 2 * kv_heads) * d, bias=config.qkv_bias)
        head_norm = partial(norm, d, precision=replace(precision, fp32_residual=False))  # no residual stream
        self.q_norm, self.k_norm = (head_norm(), head_norm()) if config.qk_norm else (None, None)
        self.o = linear(heads * d, config.hidden_size)
        self.post_norm = norm(config.hidden_size, for_fp8=fp8 and not {"gate_up", "down"} & places.keys())
        self.gate_up = linear(config.hidden_size, 2 * config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)
        # Products whose gradients the next norm's backward quantises, where kernels run.
        self.back_in_fp8 = {"o", "down"} - places.keys() if fp8 else set()
        self.heads = heads, kv_heads
        self.attention = attention
        self._inplace = not keeps_products

    def forward(
        self,
        stream: Stream,
        rope: tuple[Tensor, float],
        prefix: tuple[Tensor, Tensor] | None,
        *,
        last: bool = False,
        cache: LayerCache | PoolLayer | None = None,
        recomputed: bool = False,
    ) -> Stream:
        """The stream after this layer.

        Args:
            rope: angular frequencies and scale, as of `rotary_frequencies`.
            prefix: keys and values [C, K, d] of constant rows before the stream's, or None.
            last: only supervised rows go on.
            cache: of the rows, or None.
            recomputed: whether backward computes this again.
        """
        last = last and stream.supervised is not None
        attend = self._attend_by_kernel if cache is None and self._kernel_places_keys(stream, last) else self._attend
        residual, x, positions = attend(stream, prefix, rope=rope, last=last, recomputed=recomputed, cache=cache)
        x = Rows(*(None if x_NHd is None else x_NHd.flatten(1) for x_NHd in x))
        residual, x = self.post_norm(residual, self._product_to_add("o", x))
        if isinstance(x.live, Fp8Rows):
            assert isinstance(self.gate_up, Fp8Linear), "the norm before it makes such rows for it"
            h = Rows(gate_up_swiglu(x.live, self.gate_up))
        else:
            gate_up = self._product("gate_up", x)
            h = rows_of(swiglu(gate_up.live, every_NF=gate_up.every))
        return stream._replace(residual=residual, branch=self._product_to_add("down", h), positions_N=positions)

    def _product(self, matrix, x, outputs=None):
        """`Rows` x times a matrix of this name, with what LoRA adds to it."""
        if matrix not in self.lora:
            return rows_of(getattr(self, matrix)(x.live, outputs=outputs, every=x.every))
        assert x.every is None, "no row is frozen where LoRA adds to it"
        return Rows(self.lora[matrix](getattr(self, matrix), x.live, outputs))

    def _product_to_add(self, matrix, x):
        """The same, for the norm that adds it to the residual stream."""
        values = x.live.bits_ND if isinstance(x.live, Fp8Rows) else x.live
        by_kernel = torch.is_grad_enabled() and use_triton("auto", values, name="add_rms_norm")
        if by_kernel and matrix in self.back_in_fp8:
            return Rows(*product_back_in_fp8(x.live, getattr(self, matrix), x.every))
        return self._product(matrix, x)

    def _product_to_rotate(self, x, outputs=None):
        """What `attend_rotated` takes of rows for queries, keys and values."""
        if not isinstance(x.live, Fp8Rows):
            return self._product("qkv", x, outputs)
        assert isinstance(self.qkv, Fp8Linear), "the norm before it makes such rows for it"
        return Rows(Fp8Product(x.live, self.qkv, outputs or slice(None)))

    def _attend(self, stream, constant, *, rope, last, recomputed, cache):
        """(residual stream, attention's output, positions) of the rows that go on.

        Rows without gradients attend by themselves.
        """
        residual, x = self.input_norm(stream.residual, stream.branch)
        (heads, kv_heads), (inv_freq, scale) = self.heads, rope
        # In place, but not where recomputation keeps the product that would be overwritten.
        rotate = partial(rope_qk, scale=scale, inplace=not recomputed)
        num_heads = 0 if last else heads
        qkv = self._product("qkv", x, slice(heads * 2 * inv_freq.shape[0], None) if last else None)
        positions = stream.positions_N
        if last:
            residual, positions, queries = self._supervised_queries(stream, residual, rotate, inv_freq)

        def attended(qkv_NE, positions_N, q_LHd, layout, constant, joined=False):
            """(attention's output, or None without queries; keys and values)."""
            qkv_NE = rotate(self._normalised(qkv_NE, num_heads, kv_heads), positions_N, inv_freq, num_heads, kv_heads)
            q_NHd, k_NKd, v_NKd = qkv_NE.unflatten(-1, (num_heads + 2 * kv_heads, -1)).split(
                [num_heads, kv_heads, kv_heads], 1
            )
            if joined and constant is not None:  # once, for this attention and for whoever else reads them
                k_NKd, v_NKd = (torch.cat(parts) for parts in zip(constant, (k_NKd, v_NKd)))
                constant = None
            if cache is not None:
                k_NKd, v_NKd = cache.append(k_NKd, v_NKd)
            q_NHd = q_NHd if q_LHd is None else q_LHd
            if joined and not len(q_NHd):
                return None, (k_NKd, v_NKd)
            options = {"constant": constant, "regather": not recomputed, "inplace": self._inplace}
            x_NHd = self.attention(q_NHd, k_NKd, v_NKd, layout, **options)
            return x_NHd, (k_NKd, v_NKd)

        if stream.parts is None:
            layout = stream.supervised[1] if last else stream.layout
            x_NHd, _ = attended(qkv.live, stream.positions_N, queries.live if last else None, layout, constant)
            return residual, Rows(x_NHd), positions
        frozen, live = ((part.loss_layout if last else part.layout) for part in stream.parts)
        first = len(stream.positions_N) - len(qkv.live)
        with torch.no_grad():
            q_FHd = queries.all[: len(queries.all) - len(queries.live)] if last else None
            before, constant = attended(
                qkv.without(first), stream.positions_N[:first], q_FHd, frozen, constant, joined=True
            )
            constant = tuple(x.contiguous() for x in constant)
        after, _ = attended(qkv.live, stream.positions_N[first:], queries.live if last else None, live, constant)
        assert after is not None, "some live row is supervised"
        return residual, Rows(after) if before is None else Rows.behind(before, after), positions

    def _attend_by_kernel(self, stream, constant, *, rope, last, recomputed, cache):
        """The same, where a kernel puts rotated keys into their places."""
        residual, x = self.input_norm(stream.residual, stream.branch)
        (heads, kv_heads), (inv_freq, scale) = self.heads, rope
        qkv = self._product_to_rotate(x, slice(heads * 2 * inv_freq.shape[0], None) if last else None)
        positions, queries = stream.positions_N, None
        if last:
            rotate = partial(rope_qk, scale=scale, inplace=not recomputed)
            residual, positions, queries = self._supervised_queries(stream, residual, rotate, inv_freq)
        attended = attend_rotated(
            qkv,
            stream.positions_N,
            rope,
            (0 if last else heads, kv_heads),
            self._layouts(stream, last),
            self.attention,
            constant=constant,
            queries=queries,
            recomputed=recomputed,
            inplace=self._inplace,
        )
        return residual, attended, positions

    @staticmethod
    def _layouts(stream, last):
        """Of all queries; and where rows without gradients stand before, of theirs and the others'."""
        of = [stream.supervised[1] if last else stream.layout]
        return (*of, *((part.loss_layout if last else part.layout) for part in stream.parts or ()))

    def _kernel_places_keys(self, stream, last):
        """Whether `_attend_by_kernel` is possible, and some row's keys are still wanted.

        The kernel takes keys from their product: it knows no norm in between.
        """
        if self.k_norm is not None:
            return False
        layout = self._layouts(stream, last)[-1]
        if (last and not len(stream.supervised[0])) or (layout.kv_rows is not None and layout.way_back is None):
            return False
        return rotates_to_keys(self.attention, stream.residual.live)

    def _supervised_queries(self, stream, residual, rotate, inv_freq):
        """(residual stream, positions, queries) of the stream's supervised rows."""
        rows_L, _ = stream.supervised
        heads, _ = self.heads
        positions_L = stream.positions_N.index_select(0, rows_L)

        def of(residual_ND, rows, positions):
            residual_LD = take_rows(residual_ND, rows)
            # Normalised again rather than taken from x: one gradient less to scatter.
            x = self.input_norm(Rows(residual_LD), None)[1]
            q_LE = self._normalised(self._product("qkv", x, slice(heads * 2 * inv_freq.shape[0])).live, heads, 0)
            return residual_LD, rotate(q_LE, positions, inv_freq, heads, 0).unflatten(-1, (heads, -1))

        if stream.parts is None:
            residual_LD, q_LHd = of(residual.live, rows_L, positions_L)
            return Rows(residual_LD), positions_L, Rows(q_LHd)
        frozen, live = stream.parts
        first = len(frozen.loss_rows)
        live_rows = of(residual.live, live.loss_rows, positions_L[first:])
        if not first:
            return Rows(live_rows[0]), positions_L, Rows(live_rows[1])
        with torch.no_grad():
            others = of(residual.every, frozen.loss_rows, positions_L[:first])
        residual, queries = (Rows.behind(*pair) for pair in zip(others, live_rows))
        return residual, positions_L, queries

    def _normalised(self, qkv_NE, heads, kv_heads):
        """Columns of `heads` queries and `kv_heads` keys and values, where queries and keys are normalised per head.

        Without norms they are the given tensor; with them a new one, which nothing saves.
        """
        if self.q_norm is None or self.k_norm is None:
            return qkv_NE
        parts = qkv_NE.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
        normalised = [
            norm(Rows(x_NGd.flatten(0, 1)), None)[1].live.view_as(x_NGd) if x_NGd.shape[1] else x_NGd
            for norm, x_NGd in zip((self.q_norm, self.k_norm), parts)
        ]
        return torch.cat([*normalised, parts[2]], 1).flatten(1)


class Decoder(nn.Module):
    """Layers and final norm.

    Args:
        config: sizes.
        trained: parameters require gradients.
        precision: what it is stored and computed in.
        recompute: "none"; "full": a layer's activations are computed again in backward; "selective": all but its
            matrix products and attention; a number: as "full" in the first so many layers, "none" in the others.
        attention: of every layer; SDPA serves on every device.
        lora: low-rank matrices beside those of every layer, which are trained.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        trained: bool,
        precision: Precision,
        recompute: str | int = "none",
        attention: Attention = SDPA,
        lora: Lora | None = None,
    ):
        super().__init__()
        whole = recomputed_layers(recompute, config.num_layers)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                trained=trained,
                precision=precision,
                attention=attention,
                lora=lora,
                keeps_products=recompute == "selective",
            )
            for _ in range(config.num_layers)
        )
        self.norm = RMSNorm(
            config.hidden_size,
            config.rms_norm_eps,
            trained=trained,
            precision=precision,
        )
        self._selective = recompute == "selective"
        self.recomputed = config.num_layers if self._selective else whole  # so many layers, in whole or in part
        self._rope = rotary_frequencies(config)  # not a buffer: survives the meta device, and no checkpoint holds it
        self._unrotated = config.unrotated_layers

    def forward(
        self,
        x_ND: Tensor,
        positions_N: Tensor,
        layout: AttentionLayout,
        cache: Cache | None = None,
        *,
        supervised: tuple[Tensor, AttentionLayout] | None = None,
        frozen: tuple[Tensor, tuple[BatchPart, BatchPart]] | None = None,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Rows after the final norm, [N, D] in the compute dtype; of `supervised` rows, [L, D].

        Args:
            x_ND: residual stream, in its own dtype.
            positions_N: rotary position of each row.
            layout: who attends to whom; `kv_rows` counts those of `prefix`, and of x.
            cache: its rows are among the layout's keys; None without.
            supervised: (rows of x, ascending; who they attend to), if no others are wanted.
            frozen: rows before those of x that need no gradient, and how the batch is parted between them and x.
                `positions_N`, `layout` and `supervised` are of all rows. An operation takes all in one call.
            prefix: for each layer, keys and values [C, K, d] of constant rows.
        """
        if self._rope[0].device != x_ND.device:
            self._rope = self._rope[0].to(x_ND.device), self._rope[1]
        # Angles of 0 turn nothing, to the bit.
        still = (torch.zeros_like(self._rope[0]), 1.0) if self._unrotated else None
        recomputed = self.recomputed if torch.is_grad_enabled() else 0
        x = Rows(x_ND) if frozen is None else Rows.behind(frozen[0], x_ND)
        stream = Stream(x, None, positions_N, layout, supervised, frozen and frozen[1])
        for i, layer in enumerate(self.layers):
            options = {"last": i == len(self.layers) - 1}
            constant = None if prefix is None else prefix[i]
            rope = still if i in self._unrotated else self._rope
            if i < recomputed:
                # Added here, so that the layer's one saved input is the sum.
                stream = self._checkpointed(layer, stream.summed(), rope, constant, **options)
            else:
                stream = layer(stream, rope, constant, cache=None if cache is None else cache[i], **options)
        h = self.norm(stream.residual, stream.branch)[1]
        if h.every is None:
            return h.live
        return torch.cat([h.every[: len(h.every) - len(h.live)], h.live])

    def prepack(self) -> None:
        """`Linear.prepack` of every matrix; of a frozen decoder."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                assert isinstance(linear, Linear), "matrices in few bits are not prepacked"
                linear.prepack()

    def _checkpointed(self, layer, *inputs, **options):
        context: dict[str, Any] = {"context_fn": keep_products} if self._selective else {}
        return checkpoint(
            layer, *inputs, recomputed=True, use_reentrant=False, preserve_rng_state=False, **options, **context
        )
