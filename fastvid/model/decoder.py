"""The LLaMA decoder on packed rows (arXiv:2302.13971), and those of its kind, equal to transformers' models.

Dimensions: N packed rows, L supervised ones, C constant rows whose keys and values are known, D channels,
E = (H + 2K)·d columns of fused queries, keys and values, H query heads, K key/value heads, d channels per head,
F channels of the feed-forward block.
"""

from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_fp8
from fastvid_kernels.dispatch import use_triton
from fastvid_kernels.quantize_fp8 import BackInFp8, Fp8Rows
from fastvid_kernels.rope_qk import rope_qk
from fastvid_kernels.swiglu import swiglu
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from fastvid.batch import AttentionLayout
from fastvid.model.attention import SDPA, Attention, attend_rotated, rotates_to_keys
from fastvid.model.cache import Cache, LayerCache, PoolLayer
from fastvid.model.config import DecoderConfig, Precision, rotary_frequencies
from fastvid.model.fp8_block import Fp8Product, gate_up_swiglu, product_back_in_fp8
from fastvid.model.linear import Linear, make_linear
from fastvid.model.lora import LoraBranch, beside
from fastvid.model.quantize import Fp8Linear
from fastvid.model.rows import take_rows
from fastvid.policy import Lora

RECOMPUTE_MODES = ("none", "selective", "full")


def recomputed_layers(recompute: str | int, num_layers: int) -> int:
    """How many layers, the first ones, keep nothing but their input ("selective" keeps part of every layer: 0).

    Raises:
        ValueError: `recompute` is neither a mode nor a number of so many layers.
    """
    modes = {"none": 0, "selective": 0, "full": num_layers}
    whole = modes.get(recompute) if isinstance(recompute, str) else recompute
    if not isinstance(whole, int) or not 0 <= whole <= num_layers:
        raise ValueError(
            f"recompute {recompute!r}: choose one of {', '.join(RECOMPUTE_MODES)}, or how many of the "
            f"first layers, 0 to {num_layers}"
        )
    return whole


class RMSNorm(nn.Module):
    """Adds a branch to the residual stream, and normalises the sum into the compute dtype.

    `for_fp8`: the rows' only readers are FP8 products, so that they are `Fp8Rows` where kernels run.
    """

    def __init__(
        self,
        channels: int,
        eps: float,
        *,
        trained: bool,
        precision: Precision,
        for_fp8: bool = False,
    ):
        super().__init__()
        dtype = torch.float32 if trained else precision.residual
        self.weight = nn.Parameter(torch.empty(channels, dtype=dtype), requires_grad=trained)
        self.eps = eps
        self.compute_dtype = precision.compute
        self.for_fp8 = for_fp8

    def forward(self, residual_ND: Tensor, branch_ND: Tensor | BackInFp8 | None) -> tuple[Tensor, Tensor | Fp8Rows]:
        fp8 = self.for_fp8 and use_triton("auto", residual_ND, name="add_rms_norm_fp8")
        return (add_rms_norm_fp8 if fp8 else add_rms_norm)(
            residual_ND, branch_ND, self.weight, self.eps, self.compute_dtype
        )


class Stream(NamedTuple):
    """Rows on their way through the layers. (A tuple, in which FSDP finds the tensors that need gradients.)

    Attributes:
        residual_ND: residual stream, in its own dtype.
        branch_ND: what the last block adds to it; its gradient may go back in e4m3. None: nothing, or added already.
        positions_N: rotary positions.
        layout: who attends to whom.
        supervised: (rows [L], ascending; who they attend to): the only rows that the last layer must put out; None:
            all.
    """

    residual_ND: Tensor
    branch_ND: Tensor | BackInFp8 | None
    positions_N: Tensor
    layout: AttentionLayout
    supervised: tuple[Tensor, AttentionLayout] | None = None

    def summed(self) -> "Stream":
        """The same with the branch added."""
        if self.branch_ND is None:
            return self
        branch_ND = self.branch_ND.plain() if isinstance(self.branch_ND, BackInFp8) else self.branch_ND
        return self._replace(residual_ND=self.residual_ND + branch_ND, branch_ND=None)


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
        live: Stream,
        frozen: Stream | None,
        rope: tuple[Tensor, float],
        prefix: tuple[Tensor, Tensor] | None,
        *,
        last: bool = False,
        cache: LayerCache | PoolLayer | None = None,
        recomputed: bool = False,
    ) -> tuple[Stream, Stream | None]:
        """Both streams after this layer.

        Args:
            live: the rows that need gradients.
            frozen: rows before them that need none, or None.
            rope: angular frequencies and scale, as of `rotary_frequencies`.
            prefix: keys and values [C, K, d] of constant rows before all those, or None.
            last: only supervised rows go on.
            cache: of the live rows, or None.
            recomputed: whether backward computes this again.

        Returns:
            (live, frozen); frozen is None after the last layer if none of its rows is supervised.
        """
        advance = partial(self._advance, rope=rope, last=last, recomputed=recomputed)
        if frozen is not None:
            with torch.no_grad():
                frozen, keys_values = advance(frozen, prefix, joined=True)
                assert keys_values is not None, "no kernel places them"
                # Copied in any case: the product that they lie in need not live until backward.
                keys, values = (x.contiguous() for x in keys_values)
                prefix = keys, values
        live_after, _ = advance(live, prefix, cache=cache, by_kernel=cache is None)
        assert live_after is not None, "some live row is supervised"
        return live_after, frozen

    def _advance(self, stream, constant, *, cache=None, by_kernel=False, joined=False, **options):
        """(`stream` after this layer, or None if nothing of it goes on; its keys and values, where no kernel places
        them).

        Args:
            by_kernel: let a kernel put keys into their places, if it can.
            joined: keys and values come out behind those of `constant`.
        """
        if by_kernel and self._kernel_places_keys(stream, options["last"]):
            attended, keys_values = self._attend_by_kernel(stream, constant, **options)
        else:
            attended, keys_values = self._attend(stream, constant, cache=cache, joined=joined, **options)
        if attended is None:
            return None, keys_values
        residual_ND, x_NHd, positions_N, layout = attended
        del attended
        residual_ND, x_ND = self.post_norm(residual_ND, self._product_to_add("o", x_NHd.flatten(1)))
        if isinstance(x_ND, Fp8Rows):
            assert isinstance(self.gate_up, Fp8Linear), "the norm before it makes such rows for it"
            h_NF = gate_up_swiglu(x_ND, self.gate_up)
        else:
            h_NF = swiglu(self._product("gate_up", x_ND))
        branch = self._product_to_add("down", h_NF)
        return Stream(residual_ND, branch, positions_N, layout, stream.supervised), keys_values

    def _product(self, matrix, x_NI, outputs=None):
        """x times a matrix of this name, with what LoRA adds to it."""
        y_NO = getattr(self, matrix)(x_NI, outputs=outputs)
        return self.lora[matrix](y_NO, x_NI, outputs) if matrix in self.lora else y_NO

    def _product_to_add(self, matrix, x_NI):
        """The same, for the norm that adds it to the residual stream."""
        values = x_NI.bits_ND if isinstance(x_NI, Fp8Rows) else x_NI
        by_kernel = torch.is_grad_enabled() and use_triton("auto", values, name="add_rms_norm")
        if by_kernel and matrix in self.back_in_fp8:
            return product_back_in_fp8(x_NI, getattr(self, matrix))
        return self._product(matrix, x_NI)

    def _product_to_rotate(self, x_ND, outputs=None):
        """What `attend_rotated` takes of rows for queries, keys and values."""
        if not isinstance(x_ND, Fp8Rows):
            return self._product("qkv", x_ND, outputs)
        assert isinstance(self.qkv, Fp8Linear), "the norm before it makes such rows for it"
        return Fp8Product(x_ND, self.qkv, outputs or slice(None))

    def _attend(self, stream, constant, *, rope, last, recomputed, cache=None, joined=False):
        """((residual stream, attention's output, positions, layout) of the rows that go on; keys and values).

        The first is None where no row goes on.
        """
        (heads, kv_heads), (inv_freq, scale) = self.heads, rope
        # In place, but not where recomputation keeps the product that would be overwritten.
        rotate = partial(rope_qk, scale=scale, inplace=not recomputed)
        residual_ND, x_ND = self.input_norm(stream.residual_ND, stream.branch_ND)
        positions_N, layout = stream.positions_N, stream.layout
        if not (last and stream.supervised is not None):
            qkv_NE = self._normalised(self._product("qkv", x_ND), heads, kv_heads)
            qkv_NE = rotate(qkv_NE, positions_N, inv_freq, heads, kv_heads)
            q_NHd, k_NKd, v_NKd = qkv_NE.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
        else:
            rows_L, layout = stream.supervised
            queries = heads * 2 * inv_freq.shape[0]
            kv_NE = self._normalised(self._product("qkv", x_ND, slice(queries, None)), 0, kv_heads)
            kv_NE = rotate(kv_NE, positions_N, inv_freq, 0, kv_heads)
            k_NKd, v_NKd = kv_NE.unflatten(-1, (2 * kv_heads, -1)).chunk(2, 1)
            q_NHd = None
        if joined and constant is not None:  # once, for this attention and for whoever else reads them
            k_NKd, v_NKd = (torch.cat(parts) for parts in zip(constant, (k_NKd, v_NKd)))
            constant = None
        if q_NHd is None:
            if not len(rows_L):
                return None, (k_NKd, v_NKd)
            residual_ND, positions_N, q_NHd = self._supervised_queries(stream, residual_ND, rotate, inv_freq)
        if cache is not None:
            k_NKd, v_NKd = cache.append(k_NKd, v_NKd)
        options = {"constant": constant, "regather": not recomputed, "inplace": self._inplace}
        x_NHd = self.attention(q_NHd, k_NKd, v_NKd, layout, **options)
        return (residual_ND, x_NHd, positions_N, layout), (k_NKd, v_NKd)

    def _attend_by_kernel(self, stream, constant, *, rope, last, recomputed):
        """The same, where a kernel puts rotated keys into their places."""
        (heads, kv_heads), (inv_freq, scale) = self.heads, rope
        residual_ND, x_ND = self.input_norm(stream.residual_ND, stream.branch_ND)
        options = {"constant": constant, "recomputed": recomputed, "inplace": self._inplace}
        positions_N = stream.positions_N
        if not (last and stream.supervised is not None):
            qkv_NE = self._product_to_rotate(x_ND)
            x_NHd = attend_rotated(qkv_NE, positions_N, rope, self.heads, stream.layout, self.attention, **options)
            return (residual_ND, x_NHd, positions_N, stream.layout), None
        layout = stream.supervised[1]
        kv_NE = self._product_to_rotate(x_ND, slice(heads * 2 * inv_freq.shape[0], None))
        rotate = partial(rope_qk, scale=scale, inplace=not recomputed)
        residual_LD, positions_L, q_LHd = self._supervised_queries(stream, residual_ND, rotate, inv_freq)
        x_LHd = attend_rotated(
            kv_NE, positions_N, rope, (0, kv_heads), layout, self.attention, queries_LHd=q_LHd, **options
        )
        return (residual_LD, x_LHd, positions_L, layout), None

    def _kernel_places_keys(self, live, last):
        """Whether `_attend_by_kernel` is possible, and some row's keys are still wanted.

        The kernel takes keys from their product: it knows no norm in between.
        """
        if self.k_norm is not None:
            return False
        rows_L, layout = live.supervised if last and live.supervised is not None else (None, live.layout)
        if (rows_L is not None and not len(rows_L)) or (layout.kv_rows is not None and layout.way_back is None):
            return False
        return rotates_to_keys(self.attention, live.residual_ND)

    def _supervised_queries(self, stream, residual_ND, rotate, inv_freq):
        """(residual stream, positions, queries) of the stream's supervised rows."""
        rows_L, _ = stream.supervised
        heads, _ = self.heads
        residual_LD, positions_L = take_rows(residual_ND, rows_L), stream.positions_N.index_select(0, rows_L)
        # Normalised again rather than taken from x: one gradient less to scatter.
        q_LE = self._product("qkv", self.input_norm(residual_LD, None)[1], slice(heads * 2 * inv_freq.shape[0]))
        q_LE = self._normalised(q_LE, heads, 0)
        return residual_LD, positions_L, rotate(q_LE, positions_L, inv_freq, heads, 0).unflatten(-1, (heads, -1))

    def _normalised(self, qkv_NE, heads, kv_heads):
        """Columns of `heads` queries and `kv_heads` keys and values, where queries and keys are normalised per head.

        Without norms they are the given tensor; with them a new one, which nothing saves.
        """
        if self.q_norm is None or self.k_norm is None:
            return qkv_NE
        parts = qkv_NE.unflatten(-1, (heads + 2 * kv_heads, -1)).split([heads, kv_heads, kv_heads], 1)
        normalised = [
            norm(x_NGd.flatten(0, 1), None)[1].view_as(x_NGd) if x_NGd.shape[1] else x_NGd
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
        frozen: Stream | None = None,
        prefix: list[tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Rows after the final norm, [N, D] in the compute dtype; of `supervised` rows, [L, D].

        Args:
            x_ND: residual stream, in its own dtype.
            positions_N: rotary position of each row.
            layout: who attends to whom; `kv_rows` counts those of `prefix`, of `frozen`, and of x.
            cache: its rows are among the layout's keys; None without.
            supervised: (rows of x, ascending; who they attend to), if no others are wanted.
            frozen: rows of no gradient that x attends to, computed and saved as such. Those of them that are supervised
                come out first.
            prefix: for each layer, keys and values [C, K, d] of constant rows.
        """
        if self._rope[0].device != x_ND.device:
            self._rope = self._rope[0].to(x_ND.device), self._rope[1]
        # Angles of 0 turn nothing, to the bit.
        still = (torch.zeros_like(self._rope[0]), 1.0) if self._unrotated else None
        recomputed = self.recomputed if torch.is_grad_enabled() else 0
        live = Stream(x_ND, None, positions_N, layout, supervised)
        for i, layer in enumerate(self.layers):
            options = {"last": i == len(self.layers) - 1}
            constant = None if prefix is None else prefix[i]
            rope = still if i in self._unrotated else self._rope
            if i < recomputed:
                # Added here, so that the layer's one saved input is the sum.
                live, frozen = live.summed(), frozen and frozen.summed()
                live, frozen = self._checkpointed(layer, live, frozen, rope, constant, **options)
            else:
                live, frozen = layer(live, frozen, rope, constant, cache=None if cache is None else cache[i], **options)
        h_LD = self.norm(live.residual_ND, live.branch_ND)[1]
        if frozen is None:
            return h_LD
        with torch.no_grad():
            frozen_LD = self.norm(frozen.residual_ND, frozen.branch_ND)[1]
        return torch.cat([frozen_LD, h_LD])

    def prepack(self) -> None:
        """`Linear.prepack` of every matrix; of a frozen decoder."""
        for layer in self.layers:
            assert isinstance(layer, DecoderLayer)
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down):
                assert isinstance(linear, Linear), "matrices in few bits are not prepacked"
                linear.prepack()

    def _checkpointed(self, layer, *inputs, **options):
        context: dict[str, Any] = {"context_fn": _keep_products} if self._selective else {}
        return checkpoint(
            layer, *inputs, recomputed=True, use_reentrant=False, preserve_rng_state=False, **options, **context
        )


_PRODUCTS = ("aten::mm", "aten::addmm", "aten::_scaled_mm", "mkldnn::_linear_pointwise")


def _keep_products():
    return create_selective_checkpoint_contexts(_policy)


def _policy(context, operation, *args, **options):
    name = operation.name()
    kept = name in _PRODUCTS or "attention" in name or "attn" in name
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
