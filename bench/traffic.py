"""What a step moves and computes, counted as it runs on the meta device: bytes, launches and operations.

Every kernel of ours is asked for at its launch (`fastvid_kernels.dispatch.watch_launches`), every other operation as
torch dispatches it. What is counted is the fewest bytes that an operation can move: each input and output once, of a
gather the chosen rows. Attention's libraries do not say what they do, so `flash` stands for them: its operations are
those of the segments' pairs of a query and a key. It attends to shared videos in two merged parts, as libraries for
GPUs do; `gathering` copies each segment's keys.

Dimensions: N query rows, M key rows, H query heads, K key heads, d channels per head.
"""

from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from typing import NamedTuple

import torch
from fastvid_kernels.dispatch import meta_stands_for, watch_launches
from fastvid_kernels.launch_bytes import launch_bytes, name_of, tensor_bytes
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.executed import BACKWARD, FORWARD
from fastvid.model.attention import Attention
from fastvid.model.branches import Parts

MOVED, PRODUCT, FP8_PRODUCT = "moved", "product", "fp8 product"
ATTENTION, ATTENTION_BACKWARD = "attention", "attention, backward"
BACKWARD_LAUNCHES = 3  # FlashAttention 2: sums of gradient and output, the gradients, the queries' rounded


class Call(NamedTuple):
    """One kind of operation, by what a roof is applied to.

    Attributes:
        kind: MOVED, PRODUCT, FP8_PRODUCT, ATTENTION or ATTENTION_BACKWARD.
        name: of the kernel or of torch's operation.
        bytes: that it moves; a product's factors and result, and 0 of attention.
        flops: operations of products and attention.
        launches: of kernels.
    """

    kind: str
    name: str
    bytes: int
    flops: int = 0
    launches: int = 1


_MAKE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_to_copy_view")
_FILL = ("zero", "zeros", "new_zeros", "zeros_like", "full", "new_full", "full_like", "fill", "ones", "ones_like")
_GATHER = ("index_select", "index", "embedding", "gather")
_SCATTER = ("index_copy", "index_add", "index_put", "scatter")


class Traffic(TorchDispatchMode):
    """Counts what is called while it is entered, `calls` by kind; meta tensors stand for a GPU's.

    `leading` holds the first sizes of all tensors of more than one dimension that are made.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.leading = Counter(), set()
        self._inside = ExitStack()

    def __enter__(self):
        self._inside.enter_context(meta_stands_for("cuda"))
        self._inside.enter_context(watch_launches(self._launched))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._inside.close()

    def _launched(self, kernel, arguments, options):
        self.calls[Call(MOVED, name_of(kernel), launch_bytes(kernel, arguments, options))] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.leading.update(len(x) for x in _flat([out]) if isinstance(x, torch.Tensor) and x.dim() > 1)
        call = _call(function, args, kwargs or {}, out)
        if call is not None:
            self.calls[call] += 1
        return out


def _call(function, args, kwargs, out):
    """What an operation of torch's is; None where it launches nothing."""
    name = function._overloadpacket.__name__
    base = name.removesuffix("_")
    if base.startswith("counted_"):
        return Call(ATTENTION_BACKWARD if "backward" in name else ATTENTION, name, 0, *_of_pairs(name, args))
    outputs = [x for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, torch.Tensor)]
    inputs = [x for x in _flat([*args, *kwargs.values()]) if isinstance(x, torch.Tensor)]
    if base in _MAKE or not outputs or not any(x.numel() for x in outputs):
        return None
    packet = getattr(torch.ops.aten, base, None)
    if packet in flop_registry:
        flops = flop_registry[packet](*(x for x in args if not isinstance(x, torch.dtype)), out_val=out)
        kind = FP8_PRODUCT if "scaled" in name else PRODUCT
        return Call(kind, name, sum(map(tensor_bytes, _distinct([*inputs, *outputs]))), flops)
    written = sum(map(tensor_bytes, outputs))
    if base in _FILL:
        return Call(MOVED, name, written)
    if base in _GATHER:
        return Call(MOVED, name, 2 * written)
    if base in _SCATTER:
        return Call(MOVED, name, 2 * tensor_bytes(inputs[-1]))
    if not function._schema.is_mutable and all(_shares(x, inputs) for x in outputs):
        return None  # a view
    if base == "copy":
        inputs = inputs[1:]
    return Call(MOVED, name, written + sum(map(tensor_bytes, _distinct(inputs))))


def _flat(values):
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def _distinct(tensors):
    return {(x.untyped_storage()._cdata, x.storage_offset(), x.numel()): x for x in tensors}.values()


def _shares(tensor, others):
    return any(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata for other in others)


# Operations that stand for a library's attention, so that a dispatch mode sees them.
_LIBRARY = torch.library.Library("fastvid_counted", "DEF")
_LIBRARY.define("counted_attention(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor)")
_LIBRARY.define("counted_attention_backward(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl(
    "counted_attention",
    lambda q, k, v, pairs: (q.new_empty(q.shape), q.new_empty(q.shape[1::-1], dtype=torch.float32)),
    "Meta",
)
_LIBRARY.impl(
    "counted_attention_backward",
    lambda q, k, v, pairs: tuple(x.new_empty(x.shape) for x in (q, k, v)),
    "Meta",
)


def _of_pairs(name, args):
    """(operations, launches) of attention."""
    q_NHd, *_, pairs = args
    backward = "backward" in name
    flops = 2 * q_NHd.shape[1] * q_NHd.shape[2] * pairs * (BACKWARD if backward else FORWARD)
    return flops, BACKWARD_LAUNCHES if backward else 1


def _pairs(layout, causal):
    return sum(q * k - causal * (q * (q - 1) // 2) for q, k in zip(*layout.lengths))


def _forward(q_NHd, k_MKd, v_MKd, layout, causal):
    return torch.ops.fastvid_counted.counted_attention(q_NHd, k_MKd, v_MKd, _pairs(layout, causal))


def _backward(grad_NHd, q_NHd, k_MKd, v_MKd, out_NHd, lse_HN, layout, causal):
    return torch.ops.fastvid_counted.counted_attention_backward(q_NHd, k_MKd, v_MKd, _pairs(layout, causal))


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_NHd, k_MKd, v_MKd, layout):
        ctx.layout = layout
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd)
        return _forward(q_NHd, k_MKd, v_MKd, layout, True)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        return *_backward(grad_NHd, *ctx.saved_tensors, None, None, ctx.layout, True), None


flash = Attention("flash", _Counted.apply, parts=Parts(_forward, _backward))
gathering = replace(flash, parts=None)
