"""What a step moves and computes, counted as it runs on the meta device: bytes, launches and operations.

Every kernel of ours is asked for at its launch (`fastvid_kernels.dispatch.watch_launches`), every other operation as
torch dispatches it. What is counted is the fewest bytes that an operation can move: each input and output once, of a
gather the chosen rows. Attention's libraries do not say what they do, so `flash` stands for them: its operations are
those of the segments' causal pairs.

Dimensions: N query rows, M key rows, H query heads, K key heads, d channels per head.
"""

import inspect
from collections import Counter
from contextlib import ExitStack
from typing import NamedTuple

import torch
from fastvid_kernels.dispatch import meta_stands_for, watch_launches
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from bench.executed import BACKWARD, FORWARD
from fastvid.model.attention import Attention

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


def size(tensor):
    """Bytes that reading or writing all of a tensor moves; of an expanded one those that exist."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _rotated(a):
    d = 2 * a["half"]
    rows = a["x_ptr"].shape[0]
    return rows * a["written_heads"] * d * (a["x_ptr"].element_size() + a["out_ptr"].element_size()) + size(
        a["positions_ptr"]
    )


def _placed(a):
    """Of the packed rows keys and values alone, once, however many segments share them; constant rows too."""
    row = 2 * a["kv_heads"] * 2 * a["half"] * a["k_ptr"].element_size()
    keys, sources = a["rows_ptr"].shape[0], a["qkv_ptr"].shape[0] + a["C"]
    return row * (keys + min(keys, sources)) + size(a["rows_ptr"])


def _collected(a):
    """Of the keys' gradients those that packed rows are, without those of constant rows."""
    if not a["GATHERED"]:
        return once(a)
    grads = a["grad_k_ptr"], a["grad_v_ptr"]
    row = 2 * a["kv_heads"] * a["half"] * a["grad_k_ptr"].element_size()
    return once(a) - sum(map(size, grads)) + 2 * row * a["places_ptr"].shape[0]


def _softmax(a):
    """Whole padded rows of logits, read, and written where their gradient is due."""
    logits = a["logits_ptr"]
    row = a["row_stride"] * logits.element_size()
    others = {name: x for name, x in a.items() if name != "logits_ptr"}
    return once(others) + logits.shape[0] * row * (2 if a["GRADIENT"] else 1)


def _in_place(*names):
    return lambda a: once(a) + sum(size(a[name]) for name in names)


def _spliced(a):
    """Of the table the chosen rows."""
    return 2 * size(a["out_ptr"]) + size(a["sources_ptr"]) + size(a["token_ids_ptr"])


def _boundary_sums(a):
    rows = a["boundary_rows_ptr"]
    return rows.shape[0] * a["D"] * a["grad_ptr"].element_size() + size(rows) + size(a["grad_boundary_ptr"])


# Bytes of a launch by the kernel's arguments, where it is not `once`.
KERNELS = {
    "_rope_qk_kernel": _rotated,
    "_place_keys_kernel": _placed,
    "_collect_kernel": _collected,
    "_collect_fp8_kernel": _collected,
    "_softmax_gradient_kernel": _softmax,
    "_splice_map_kernel": lambda a: 12 * (a["P"] + a["boundaries"]),
    "_splice_fwd_kernel": _spliced,
    "_splice_video_bwd_kernel": lambda a: 2 * size(a["grad_video_ptr"]) + size(a["video_rows_ptr"]),
    "_splice_boundary_bwd_kernel": _boundary_sums,
    "_adamw_step_kernel": _in_place("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"),
    "_adamw8bit_step_kernel": _in_place("param_ptr", "state1_ptr", "state2_ptr", "absmax1_ptr", "absmax2_ptr"),
}


def once(arguments):
    """Bytes of every tensor among them once; where one stands for several arguments, or for none, it is one."""
    found = {}
    for tensor in arguments.values():
        if isinstance(tensor, torch.Tensor):
            place = tensor.untyped_storage()._cdata, tensor.storage_offset()
            found[place] = max(found.get(place, 0), size(tensor))
    return sum(found.values())


def name_of(kernel):
    return kernel.fn.__name__


def launch_bytes(kernel, arguments, options):
    """Bytes that a launch moves."""
    given = dict(zip(inspect.signature(kernel.fn).parameters, arguments)) | options
    return KERNELS.get(name_of(kernel), once)(given)


_MAKE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach", "_to_copy_view")
_FILL = ("zero", "zeros", "new_zeros", "zeros_like", "full", "new_full", "full_like", "fill", "ones", "ones_like")
_GATHER = ("index_select", "index", "embedding", "gather")
_SCATTER = ("index_copy", "index_add", "index_put", "scatter")


class Traffic(TorchDispatchMode):
    """Counts what is called while it is entered, `calls` by kind; meta tensors stand for a GPU's."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
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
        return Call(kind, name, sum(map(size, _distinct([*inputs, *outputs]))), flops)
    written = sum(map(size, outputs))
    if base in _FILL:
        return Call(MOVED, name, written)
    if base in _GATHER:
        return Call(MOVED, name, 2 * written)
    if base in _SCATTER:
        return Call(MOVED, name, 2 * size(inputs[-1]))
    if not function._schema.is_mutable and all(_shares(x, inputs) for x in outputs):
        return None  # a view
    if base == "copy":
        inputs = inputs[1:]
    return Call(MOVED, name, written + sum(map(size, _distinct(inputs))))


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
_LIBRARY.define("counted_attention(Tensor q, Tensor k, Tensor v, int pairs) -> Tensor")
_LIBRARY.define("counted_attention_backward(Tensor q, Tensor k, Tensor v, int pairs) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("counted_attention", lambda q, k, v, pairs: q.new_empty(q.shape), "Meta")
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


class _Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_NHd, k_MKd, v_MKd, pairs):
        ctx.pairs = pairs
        ctx.save_for_backward(q_NHd, k_MKd, v_MKd)
        return torch.ops.fastvid_counted.counted_attention(q_NHd, k_MKd, v_MKd, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        return *torch.ops.fastvid_counted.counted_attention_backward(*ctx.saved_tensors, ctx.pairs), None


def _attend(q_NHd, k_MKd, v_MKd, layout):
    pairs = sum(q * k - q * (q - 1) // 2 for q, k in zip(*layout.lengths))
    return _Counted.apply(q_NHd, k_MKd, v_MKd, pairs)


flash = Attention("flash", _attend)
