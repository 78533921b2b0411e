"""FlashAttention for GPUs, in whichever library has it: which are here and fit the card, and how each is called.

Dimensions: N query rows, M key/value rows, H query heads, K key/value heads, d channels per head.
"""

import functools
import importlib
import importlib.metadata
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastvid.batch import AttentionLayout
from fastvid.model.branches import Parts

log = logging.getLogger("fastvid")


@dataclass(frozen=True)
class FlashPackage:
    """A generation of flash-attn.

    Attributes:
        name: for people.
        module: which has `flash_attn_varlen_func`.
        capabilities: majors of the compute capabilities that it has kernels for; None: of any since 8.
        backward: (module, name) of what takes log-sum-exps.
        distribution: without which the module is another's: flash-attn 2.8.3 brings a sketch of FlashAttention 4, which
            wants packages that it does not require, and has no backward of packed rows.
    """

    name: str
    module: str
    capabilities: tuple[int, ...] | None
    backward: tuple[str, str]
    distribution: str | None = None

    def fits(self, device: torch.device) -> bool:
        """Whether its kernels, forward and backward, are made for this card."""
        major, _ = torch.cuda.get_device_capability(device)
        return self.capabilities is None or major in self.capabilities


# Best first, of those that fit a card. FlashAttention 4's backward refuses capability 8.
PACKAGES = (
    FlashPackage("FlashAttention 3", "flash_attn_interface", (9,), ("flash_attn_interface", "_flash_attn_backward")),
    FlashPackage(
        "FlashAttention 4",
        "flash_attn.cute",
        (9, 10, 11, 12),
        ("flash_attn.cute.interface", "_flash_attn_bwd"),
        distribution="flash-attn-4",
    ),
    FlashPackage(
        "FlashAttention 2", "flash_attn", None, ("flash_attn.flash_attn_interface", "_flash_attn_varlen_backward")
    ),
)


@dataclass(frozen=True)
class Library:
    """Attention of packed rows, causal and aligned at each segment's last row, by one library.

    Attributes:
        name: of it.
        call: (queries [N, H, d], keys, values [M, K, d], layout) → [N, H, d], with gradients.
        parts: the same with log-sum-exps; None: the library keeps them to itself.
    """

    name: str
    call: Callable[[Tensor, Tensor, Tensor, AttentionLayout], Tensor]
    parts: Parts | None = None


def kernel_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no FlashAttention kernel can run, or None."""
    if device.type != "cuda":
        return f"it needs a CUDA device, not {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it computes in float16 and bfloat16 only, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def flash_libraries(device: torch.device) -> list[Library]:
    """Of every flash-attn that is here and fits the card, best first."""
    return [library for package in PACKAGES if package.fits(device) and (library := _library(package))]


@functools.cache
def torch_library() -> Library | None:
    """torch's own FlashAttention 2; None where this torch has none."""
    function = find("torch.nn.attention.varlen", "varlen_attn")
    if function is None:
        return None
    operations = [getattr(torch.ops.aten, f"_flash_attention_{way}", None) for way in ("forward", "backward")]
    parts = Parts(_torch_forward, _torch_backward) if all(operations) else None
    return Library("torch's varlen_attn", functools.partial(_varlen, function=function), parts)


@functools.cache
def _library(package):
    if package.distribution is not None and not _installed(package.distribution):
        return None
    function = find(package.module, "flash_attn_varlen_func")
    if function is None:
        return None
    backward, parts = find(*package.backward), None
    if backward is not None:
        parts = Parts(functools.partial(_flash_forward, function), functools.partial(_flash_backward, backward))
    return Library(package.name, functools.partial(_flash, function=function), parts)


def _installed(distribution):
    try:
        return bool(importlib.metadata.distribution(distribution))
    except importlib.metadata.PackageNotFoundError:
        return False


def find(module: str, name: str) -> Callable[..., Any] | None:
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
def _parameters(function):
    """{name: parameter} of a function, also of one that torch has made an operation."""
    return dict(inspect.signature(getattr(function, "_init_fn", function)).parameters)


def _segments(layout):
    """As all generations name them."""
    return {
        "cu_seqlens_q": layout.cu_seqlens_q,
        "cu_seqlens_k": layout.cu_seqlens_k,
        "max_seqlen_q": layout.max_seqlen_q,
        "max_seqlen_k": layout.max_seqlen_k,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


def _known(function, options):
    return {name: value for name, value in options.items() if name in _parameters(function)}


def _flash(q_NHd, k_MKd, v_MKd, layout, *, function):
    out = function(q_NHd, k_MKd, v_MKd, causal=True, **_known(function, _segments(layout)))
    return out[0] if isinstance(out, tuple) else out  # some generations also return the log-sum-exp


def _flash_forward(function, q_NHd, k_MKd, v_MKd, layout, causal):
    options = _segments(layout) | {"return_attn_probs": True, "return_lse": True}  # of 2 and 3; of 4
    found = function(q_NHd, k_MKd, v_MKd, causal=causal, **_known(function, options))
    if not isinstance(found, tuple) or found[1] is None:
        raise TypeError("it gives no log-sum-exp")
    return found[:2]


# What a backward wants that has no meaning here; the others leave such things to defaults.
_UNUSED = {
    "dropout_p": 0.0,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "sequed_q": None,
    "sequed_k": None,
}


def _flash_backward(function, grad_NHd, q_NHd, k_MKd, v_MKd, out_NHd, lse_HN, layout, causal):
    parameters = _parameters(function)
    grads = [x.new_empty(x.shape) for x in (q_NHd, k_MKd, v_MKd)]
    values = _segments(layout) | dict(zip(("dq", "dk", "dv"), grads))
    values |= {
        "dout": grad_NHd,
        "q": q_NHd,
        "k": k_MKd,
        "v": v_MKd,
        "out": out_NHd,
        "softmax_lse": lse_HN,
        "lse": lse_HN,
        "softmax_scale": q_NHd.shape[-1] ** -0.5,
        "causal": causal,
        "is_causal": causal,
    }
    values |= {
        name: value
        for name, value in _UNUSED.items()
        if name in parameters and parameters[name].default is inspect.Parameter.empty
    }
    function(**_known(function, values))
    return tuple(grads)


def _varlen(q_NHd, k_MKd, v_MKd, layout, *, function):
    known = _parameters(function)  # they changed from one torch to the next
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


def _of_torch(layout, causal):
    bounds = layout.cu_seqlens_q, layout.cu_seqlens_k, layout.max_seqlen_q, layout.max_seqlen_k
    return *bounds, 0.0, causal  # no dropout


def _torch_forward(q_NHd, k_MKd, v_MKd, layout, causal):
    out_NHd, lse_HN, *_ = torch.ops.aten._flash_attention_forward(
        q_NHd, k_MKd, v_MKd, *_of_torch(layout, causal), False
    )
    return out_NHd, lse_HN


def _torch_backward(grad_NHd, q_NHd, k_MKd, v_MKd, out_NHd, lse_HN, layout, causal):
    state = q_NHd.new_zeros(2, dtype=torch.uint64)  # of random numbers, for dropout
    return torch.ops.aten._flash_attention_backward(
        grad_NHd,
        q_NHd,
        k_MKd,
        v_MKd,
        out_NHd,
        lse_HN,
        *_of_torch(layout, causal),
        state,
        q_NHd.new_empty(0),
    )
