"""Causal attention over packed rows, by whichever library the machine has.

Dimensions: N query rows, M key/value rows, C constant ones, H query heads, K key/value heads, d channels per head,
S segments.
"""

import functools
import importlib
import inspect
import logging
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
from fastvid.model.decoding import DecodingLayout, shared_attention
from fastvid.model.fp8_block import Fp8Product
from fastvid.model.gathered_keys import Gathered, GatherRows, Placed, saving_no_copy

log = logging.getLogger("fastvid")

# Copies of keys of at most so many times the packed rows wait for backward: with the queries they take about as much as
# the product that they come from, which goes. More are made again.
MOST_KEPT = 1.25

# Where flash-attn's generations keep `flash_attn_varlen_func`: 3 (Hopper), 4 (Hopper and later), 2.
FLASH_MODULES = ("flash_attn_interface", "flash_attn.cute", "flash_attn")


@dataclass(frozen=True)
class Attention:
    """Causal attention by one library: what a decoder calls, chosen when it is built (`choose_attention`).

    Attributes:
        name: of the implementation or the library.
        call: function of queries, keys, values and layout; keys and values lie in its order.
        takes_rows: instead, `call` takes the packed rows as they are, and `constant` ones, by the layout's `kv_rows`.
    """

    name: str
    call: Callable[..., Tensor]
    takes_rows: bool = False

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
    ) -> Tensor:
        """Scaled dot-product attention, causal and aligned at each segment's last row (arXiv:2307.08691).

        Args:
            q_NHd, k_NKd, v_NKd: packed rows, any row stride; H a multiple of K. Scale is d**-0.5.
            layout: segments; with `kv_rows`, keys and values are gathered from the constant and the packed rows. Or
                that of answers that grow by a row each, without gradient.
            constant: keys and values [C, K, d] without gradient, which `kv_rows` counts before the packed rows.
            regather: with `kv_rows`, save no gathered copy for backward but gather again. Leave off under
                recomputation, where the copy lives only during its layer's backward. Where `takes_rows`, there is none.

        Returns:
            [N, H, d]. Gradients of rows that several segments share are summed in fp32, segment after segment:
            repeatable.
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
        if layout.kv_rows is None:
            return self.call(q_NHd, k_NKd, v_NKd, layout)
        keys, values = (
            Gathered(constant_CKd, own_NKd, layout.kv_rows)
            for constant_CKd, own_NKd in zip(constant or (None, None), (k_NKd, v_NKd))
        )
        k_MKd, v_MKd = (
            GatherRows.apply(own_NKd, gathered, layout.own_keys, regather)
            for own_NKd, gathered in ((k_NKd, keys), (v_NKd, values))
        )
        with saving_no_copy(keys, values) if regather else nullcontext():
            return self.call(q_NHd, k_MKd, v_MKd, layout)


def attend_rotated(
    qkv_NE: Tensor | Fp8Product,
    positions_N: Tensor,
    rope: tuple[Tensor, float],
    heads: tuple[int, int],
    layout: AttentionLayout,
    attention: Attention,
    *,
    constant: tuple[Tensor, Tensor] | None = None,
    queries_LHd: Tensor | None = None,
    recomputed: bool = False,
) -> Tensor:
    """Rotary embedding and `attention` in one: keys are rotated to where segments read them.

    Args:
        qkv_NE: [N, (H+2K)·d] product of the QKV projection, which may be overwritten unless `recomputed`; see
            `DecoderLayer`.
        positions_N: of its rows.
        rope: radians per position [d/2], factor on cosine and sine.
        heads: H, K.
        layout: as for `attention`; with `kv_rows` its `way_back` must be known.
        attention: one for which `rotates_to_keys`.
        constant: as for `attention`; contiguous.
        queries_LHd: rotated queries of other rows, in the place of the product's (H is 0 then).
        recomputed: backward computes this again: the product is kept as it is, and copies of keys with it.

    Returns:
        [N, H, d], or [L, H, d]; gradients as `attention`'s.
    """
    (num_heads, num_kv_heads), (inv_freq_h, scale) = heads, rope
    kept = recomputed or (layout.kv_rows is not None and len(layout.kv_rows) <= MOST_KEPT * len(positions_N))
    settings = positions_N, inv_freq_h, num_heads, num_kv_heads
    options = {
        "scale": scale,
        "rows_M": layout.kv_rows,
        "way_back": layout.way_back,
        "constant": constant,
        "inplace": not kept,
    }
    if isinstance(qkv_NE, Fp8Product):
        qkv_NE, q_NHd, k_MKd, v_MKd = qkv_NE.rope_keys(*settings, **options)
    else:
        q_NHd, k_MKd, v_MKd = rope_keys(qkv_NE, *settings, **options)
    q_NHd = q_NHd if queries_LHd is None else queries_LHd
    if layout.kv_rows is None or kept:
        return attention.call(q_NHd, k_MKd, v_MKd, layout)
    rows = Placed(
        k_MKd,
        partial(
            place_keys,
            qkv_NE.detach(),
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
        return attention.call(q_NHd, k_MKd, v_MKd, layout)


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
    obstacle = {
        "flash": _flash_obstacle,
        "varlen": _varlen_obstacle,
        "avx512": partial(_avx512_obstacle, channels),
    }
    if implementation == "auto":
        return next((IMPLEMENTATIONS[name] for name, find in obstacle.items() if find(device, dtype) is None), SDPA)
    if implementation in obstacle and (reason := obstacle[implementation](device, dtype)):
        raise ValueError(f"attention implementation {implementation!r} is impossible: {reason}; choose auto or sdpa")
    return IMPLEMENTATIONS[implementation]


def kernel_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no FlashAttention kernel can run, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16 only, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def _flash_obstacle(device, dtype):
    reason = kernel_obstacle(device, dtype)
    return reason or (None if _flash_functions() else "no flash-attn package is installed")


def _varlen_obstacle(device, dtype):
    reason = kernel_obstacle(device, dtype)
    return reason or (None if _varlen_function() else f"torch {torch.__version__} has no varlen_attn")


def _avx512_obstacle(channels, device, dtype):
    if device.type != "cpu":
        return f"it is for the CPU, not {device.type}"
    if dtype != torch.bfloat16:
        return f"it is for bfloat16, not {dtype}"
    return cpu.attention_obstacle() if channels % 16 == 0 else f"heads of {channels} channels are no multiple of 16"


@functools.cache
def _flash_functions():
    """{module: its function} of every flash-attn that is here, best first."""
    found = {module: _find(module, "flash_attn_varlen_func") for module in FLASH_MODULES}
    return {module: function for module, function in found.items() if function}


@functools.cache
def _varlen_function():
    return _find("torch.nn.attention.varlen", "varlen_attn")


def gpu_libraries() -> list[Attention]:
    """Attention of every library for GPUs that is here, best first."""
    flash = [Attention(module, partial(_flash, function=function)) for module, function in _flash_functions().items()]
    return [*flash, *([Attention("torch's varlen_attn", _varlen)] if _varlen_function() else [])]


def _find(module, name):
    """What a module that may not be installed, or may be broken, calls `name`; None without."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception as error:  # a library that does not fit its own libraries raises anything
        if not (isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}.")):
            log.warning("attention: %s is installed but cannot be imported: %s", module, said(error))
        return None


def said(error: BaseException) -> str:
    """An exception in one line."""
    return " ".join([f"{type(error).__name__}:", *str(error).strip().splitlines()[:1]])


@functools.cache
def _arguments(function):
    return frozenset(inspect.signature(function).parameters)


def _flash(q_NHd, k_MKd, v_MKd, layout, function=None):
    function = function or next(iter(_flash_functions().values()))
    options = {
        "max_seqlen_q": layout.max_seqlen_q,
        "max_seqlen_k": layout.max_seqlen_k,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }
    out = function(
        q_NHd,
        k_MKd,
        v_MKd,
        cu_seqlens_q=layout.cu_seqlens_q,
        cu_seqlens_k=layout.cu_seqlens_k,
        causal=True,
        **{name: value for name, value in options.items() if name in _arguments(function)},
    )
    return out[0] if isinstance(out, tuple) else out  # some generations also return the log-sum-exp


def _varlen(q_NHd, k_MKd, v_MKd, layout):
    function = _varlen_function()
    assert function is not None, "it was there when it was chosen"
    known = _arguments(function)  # they changed from one torch to the next
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
    if q_NHd.shape[1] != k_MKd.shape[1] and "enable_gqa" in known:  # before it was known, fewer key heads just worked
        options["enable_gqa"] = True
    return function(
        q_NHd,
        k_MKd,
        v_MKd,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        **options,
    )


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
IMPLEMENTATIONS = {
    each.name: each
    for each in (Attention("flash", _flash), Attention("varlen", _varlen), Attention("avx512", _avx512, True), SDPA)
}
