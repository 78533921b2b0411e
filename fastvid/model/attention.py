"""Causal attention over packed rows, by whichever library the machine has.

Dimensions: N query rows, M key/value rows, C constant ones, H query heads, K key/value heads, d channels per head,
S segments.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastvid_kernels import cpu
from fastvid_kernels.dispatch import use_triton
from fastvid_kernels.rope_keys import place_keys, rope_keys
from torch import Tensor
from torch.nn import functional

from fastvid.batch import AttentionLayout
from fastvid.model.branches import Parts, attend_behind, attend_in_parts, read_twice
from fastvid.model.decoding import DecodingLayout, shared_attention
from fastvid.model.flash import flash_libraries, kernel_obstacle, torch_library
from fastvid.model.fp8_block import Fp8Product
from fastvid.model.gathered_keys import Gathered, GatherRows, Placed, saving_no_copy
from fastvid.model.rows import Rows

# Copies of keys of at most so many times the packed rows wait for backward: with the queries they take about as much as
# the product that they come from, which goes. More are made again.
MOST_KEPT = 1.25


@dataclass(frozen=True)
class Attention:
    """Causal attention by one library: what a decoder calls, chosen when it is built (`choose_attention`).

    Attributes:
        name: of the implementation or the library.
        call: function of queries, keys, values and layout; keys and values lie in its order.
        takes_rows: instead, `call` takes the packed rows as they are, and `constant` ones, by the layout's `kv_rows`.
        parts: computes the two parts of a layout with `branches`; None: those gather keys as other segments do.
    """

    name: str
    call: Callable[..., Tensor]
    takes_rows: bool = False
    parts: Parts | None = None

    def __str__(self) -> str:
        return self.name

    def __call__(
        self,
        q_NHd: Tensor,
        k_NKd: Tensor,
        v_NKd: Tensor,
        layout: AttentionLayout | DecodingLayout,
        *,
        constant: tuple[Tensor, Tensor] | None = None,
        regather: bool = True,
        inplace: bool = True,
    ) -> Tensor:
        """Scaled dot-product attention, causal and aligned at each segment's last row (arXiv:2307.08691).

        Args:
            q_NHd, k_NKd, v_NKd: packed rows, any row stride; H a multiple of K. Scale is d**-0.5.
            layout: segments; with `kv_rows`, keys and values are gathered from the constant and the packed rows, those
                of a beginning once where there are `parts`. Or that of answers that grow by a row each, without
                gradient.
            constant: keys and values [C, K, d] without gradient, which `kv_rows` counts before the packed rows.
            regather: with `kv_rows`, save no gathered copy for backward but gather again. Leave off under
                recomputation, where the copy lives only during its layer's backward. Where `takes_rows`, there is none.
            inplace: as of `attend_in_parts`.

        Returns:
            [N, H, d]. Gradients of rows that several segments share are summed in fp32, segment after segment:
            repeatable. Those of a beginning, where there are `parts`: see `attend_in_parts`.
        """
        if q_NHd.shape[0] == 0:
            return q_NHd.clone()
        if isinstance(layout, DecodingLayout):
            n, rows = layout.sizes_alone
            alone = layout.alone
            outs = [] if alone is None else [self(q_NHd[:n], k_NKd[:rows], v_NKd[:rows], alone)]
            outs += [shared_attention(q_NHd[n:], k_NKd, v_NKd, layout.shared)] if layout.shared else []
            return torch.cat(outs)
        assert constant is None or layout.kv_rows is not None
        if self.takes_rows:
            return self.call(q_NHd, k_NKd, v_NKd, layout, constant)
        layout, attend = self.placed(layout, inplace=inplace)
        if layout.kv_rows is None:
            return attend(q_NHd, k_NKd, v_NKd)
        keys, values = (
            Gathered(constant_CKd, own_NKd, layout.kv_rows)
            for constant_CKd, own_NKd in zip(constant or (None, None), (k_NKd, v_NKd))
        )
        k_MKd, v_MKd = (
            GatherRows.apply(own_NKd, gathered, layout.own_keys, regather)
            for own_NKd, gathered in ((k_NKd, keys), (v_NKd, values))
        )
        with saving_no_copy(keys, values) if regather else nullcontext():
            return attend(q_NHd, k_MKd, v_MKd)

    def placed(
        self, layout: AttentionLayout, *, inplace: bool = True
    ) -> tuple[AttentionLayout, Callable[[Tensor, Tensor, Tensor], Tensor]]:
        """(Layout that says where keys are to lie, attention of queries to keys and values that lie so).

        Args:
            inplace: as of `attend_in_parts`.
        """
        if self.parts is None or layout.branches is None:
            return layout, lambda q_NHd, k_MKd, v_MKd: self.call(q_NHd, k_MKd, v_MKd, layout)
        return layout.placed, partial(attend_in_parts, layout=layout, parts=self.parts, inplace=inplace)

    def behind(
        self,
        live: tuple[Any, ...],
        every: tuple[Tensor, ...],
        layouts: tuple[AttentionLayout, ...],
        *,
        inplace: bool = True,
    ) -> Rows:
        """Attention where only the last queries and keys get gradients.

        Args:
            live, every: as of `attend_behind`; keys lie as `layout.placed` says where there are `parts`, else as
                `layout`.
            layouts: of every query, of those without gradients, and of those with.
            inplace: as of `attend_in_parts`.
        """
        layout, frozen, own = layouts
        first = len(every[0]) - len(live[0])
        if not first:
            return Rows(self.placed(own, inplace=inplace)[1](*live))
        if self.parts is not None:
            return Rows(*attend_behind(live, every, (layout, own), self.parts, inplace=inplace))
        keys = len(every[1]) - len(live[1])
        with torch.no_grad():
            before = self.call(every[0][:first], *(x[:keys] for x in every[1:]), frozen)
        after = self.call(*live, own)
        return Rows(after, torch.cat([before, after.detach()]))


def attend_rotated(
    qkv: Rows,
    positions_N: Tensor,
    rope: tuple[Tensor, float],
    heads: tuple[int, int],
    layouts: tuple[AttentionLayout, ...],
    attention: Attention,
    *,
    constant: tuple[Tensor, Tensor] | None = None,
    queries: Rows | None = None,
    recomputed: bool = False,
    inplace: bool = True,
) -> Rows:
    """Rotary embedding and `attention` in one: keys are rotated to where segments read them.

    Args:
        qkv: [N, (H+2K)·d] product of the QKV projection, or an `Fp8Product`, which may be overwritten unless
            `recomputed`; see `DecoderLayer`.
        positions_N: of all its rows.
        rope: radians per position [d/2], factor on cosine and sine.
        heads: H, K.
        layouts: as for `attention`; with `kv_rows` its `way_back` must be known. Where rows without gradients stand
            before: of all queries, of theirs, and of the others', whose `way_back` must be known.
        attention: one for which `rotates_to_keys`.
        constant: as for `attention`; contiguous.
        queries: rotated queries [L, H, d] of other rows, in the place of the product's (H is 0 then).
        recomputed: backward computes this again: the product is kept as it is, and copies of keys with it.
        inplace: as of `attend_in_parts`.

    Returns:
        [N, H, d], or [L, H, d]; gradients as `attention`'s.
    """
    (num_heads, num_kv_heads), (inv_freq_h, scale) = heads, rope
    lie = [layout if attention.parts is None else layout.placed for layout in layouts]
    layout, own = lie[0], lie[-1]
    kept = recomputed or (layout.kv_rows is not None and len(layout.kv_rows) <= MOST_KEPT * len(positions_N))
    settings = positions_N, inv_freq_h, num_heads, num_kv_heads
    options = {
        "scale": scale,
        "rows_M": layout.kv_rows,
        "way_back": own.way_back,
        "constant": constant,
        "inplace": not kept,
    }
    branches = None if attention.parts is None else layouts[-1].branches
    if branches is not None:
        options["twice"] = read_twice(branches)
    apart = len(layouts) > 1
    live_keys = len(own.kv_rows) if apart and own.kv_rows is not None else None
    if isinstance(qkv.live, Fp8Product):
        product_NE, *found = qkv.live.rope_keys(*settings, live_keys=live_keys, **options)
    else:
        every = None if live_keys is None or qkv.every is None else (qkv.every, live_keys)
        product_NE, found = qkv.all, rope_keys(qkv.live, *settings, every=every, **options)
    size = 3 if branches is None else 6
    live: tuple[Any, ...] = tuple(found[:size])
    every = tuple(found[size:])
    if queries is not None:
        second = (None, *live[4:]) if branches is not None else ()  # gradients of both parts' queries are added before
        live, every = (queries.live, *live[1:3], *second), (queries.all, *every[1:])

    def attend():
        if apart:
            return attention.behind(live, every, layouts, inplace=inplace)
        return Rows(attention.placed(layouts[0], inplace=inplace)[1](*live))

    if layout.kv_rows is None or kept:
        return attend()
    rows = Placed(
        live[1],
        partial(
            place_keys,
            product_NE.detach(),
            positions_N,
            inv_freq_h,
            num_heads,
            num_kv_heads,
            scale,
            layout.kv_rows,
            constant,
        ),
    )
    with saving_no_copy(rows):
        return attend()


def rotates_to_keys(attention: Attention, qkv_NE: Tensor) -> bool:
    """Whether the kernel of `rope_keys` can run, and `attention` takes keys that it has put into their places."""
    return not attention.takes_rows and use_triton("auto", qkv_NE, name="rope_keys")


def choose_attention(implementation: str, device: torch.device, dtype: torch.dtype, channels: int) -> Attention:
    """The attention of tensors on `device` in `dtype`, with so many channels per head.

    Args:
        implementation: "flash" (flash-attn), "varlen" (torch's own FlashAttention), "avx512" (for bfloat16 on CPUs that
            multiply it), "sdpa" (one call per segment), or "auto": the first of these that the tensors allow.

    Raises:
        ValueError: `implementation` is none, or cannot be used here; says why.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(
            f"attention implementation {implementation!r}: choose one of auto, {', '.join(IMPLEMENTATIONS)}"
        )
    if implementation == "sdpa":
        return SDPA
    reason = None
    for find in (_FIND[implementation],) if implementation in _FIND else _FIND.values():
        found = find(device, dtype, channels)
        if isinstance(found, Attention):
            return found
        reason = found
    if implementation == "auto":
        return SDPA
    raise ValueError(f"attention implementation {implementation!r} is impossible: {reason}; choose auto or sdpa")


def gpu_libraries(device: torch.device) -> list[Attention]:
    """Attention of every library for GPUs that is here and fits the card, best first."""
    return [_of_library(each) for each in (*flash_libraries(device), torch_library()) if each]


def _of_library(library):
    return Attention(library.name, library.call, parts=library.parts)


def _find_flash(device, dtype, channels):
    if reason := kernel_obstacle(device, dtype):
        return reason
    libraries = flash_libraries(device)
    return (
        _of_library(libraries[0])
        if libraries
        else f"no flash-attn package for {torch.cuda.get_device_name(device)} is installed"
    )


def _find_varlen(device, dtype, channels):
    if reason := kernel_obstacle(device, dtype):
        return reason
    library = torch_library()
    return _of_library(library) if library else f"torch {torch.__version__} has no varlen_attn"


def _find_avx512(device, dtype, channels):
    if device.type != "cpu":
        return f"it is for the CPU, not {device.type}"
    if dtype != torch.bfloat16:
        return f"it is for bfloat16, not {dtype}"
    if channels % 16:
        return f"heads of {channels} channels are no multiple of 16"
    return cpu.attention_obstacle() or AVX512


def _sdpa(q_NHd, k_MKd, v_MKd, layout):
    gqa = q_NHd.shape[1] != k_MKd.shape[1]
    q_sizes, k_sizes = layout.lengths
    outs = []
    # Split, not sliced: each slice's gradient would be a tensor of all rows.
    for q_nHd, k_mKd, v_mKd in zip(q_NHd.split(q_sizes), k_MKd.split(k_sizes), v_MKd.split(k_sizes), strict=True):
        queries, keys = len(q_nHd), len(k_mKd)
        lacking = keys - queries
        # A few queries more, of nobody, cost less than a mask over the rectangle, which is also saved for backward.
        more = lacking if 4 * lacking <= queries else 0
        q_nHd = functional.pad(q_nHd, (0, 0, 0, 0, more, 0)) if more else q_nHd
        q_1Hnd, k_1Kmd, v_1Kmd = (x.transpose(0, 1)[None] for x in (q_nHd, k_mKd, v_mKd))
        square = more == lacking
        mask = None if square or queries == 1 else _last_rows_aligned(queries, keys, q_NHd.device)
        out_1Hnd = functional.scaled_dot_product_attention(
            q_1Hnd, k_1Kmd, v_1Kmd, attn_mask=mask, is_causal=square, enable_gqa=gqa
        )
        outs.append(out_1Hnd[0].transpose(0, 1)[more:])
    return torch.cat(outs)


def _last_rows_aligned(queries, keys, device):
    """is_causal would align the first rows. (torch's own causal_lower_right fails under selective recomputation.)"""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril_(keys - queries)


def _avx512(q_NHd, k_RKd, v_RKd, layout, constant):
    return cpu.avx512_attention(q_NHd, k_RKd, v_RKd, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.kv_rows, constant)


SDPA = Attention("sdpa", _sdpa)  # serves everywhere
AVX512 = Attention("avx512", _avx512, takes_rows=True)
# Each: (device, dtype, channels) → the attention, or why there is none; best first.
_FIND: dict[str, Callable[..., Attention | str]] = {
    "flash": _find_flash,
    "varlen": _find_varlen,
    "avx512": _find_avx512,
}
IMPLEMENTATIONS = (*_FIND, "sdpa")
