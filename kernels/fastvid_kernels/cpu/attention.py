"""Causal attention on CPUs with AVX512-BF16: `attention.cpp`, compiled when it is first needed.

Dimensions: N query rows, R rows that are keys and values, C constant rows before those, M keys of all segments,
S segments, H query heads, K key/value heads, d channels per head.
"""

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .build import load

SOURCE = Path(__file__).with_suffix(".cpp")
_POINTER = ctypes.c_void_p


class _Arguments(ctypes.Structure):
    """`struct Attention` of the source."""

    _fields_ = [
        *((name, _POINTER) for name in ("q", "k", "v", "constant_k", "constant_v")),
        *(
            (name, ctypes.c_int64)
            for name in ("q_stride", "k_stride", "v_stride", "constant_k_stride", "constant_v_stride", "constant_rows")
        ),
        *((name, _POINTER) for name in ("kv_rows", "q_bounds", "k_bounds")),
        *((name, ctypes.c_int64) for name in ("segments", "heads", "kv_heads", "d", "threads")),
    ]


def avx512_attention(
    q_NHd: Tensor,
    k_RKd: Tensor,
    v_RKd: Tensor,
    q_bounds: Tensor,
    k_bounds: Tensor,
    kv_rows: Tensor | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Scaled dot-product attention, causal and aligned at each segment's last row.

    Args:
        q_NHd, k_RKd, v_RKd: bf16 rows of all segments, any row stride; H a multiple of K, d of 16. Scale is d**-0.5.
        q_bounds, k_bounds: [S+1] int32, cumulative rows of the segments, from 0; no segment has more queries than keys.
        kv_rows: [M] int64, for each key of each segment the row that it is, of the constant rows and those of k; None:
            the rows of k in order.
        constant: keys and values [C, K, d] without gradient, which `kv_rows` counts before those of k.

    Returns:
        [N, H, d] bf16. Scores, softmax and all sums are fp32; probabilities are rounded to bf16 for their products.
        Saved for backward: the inputs. Repeatable, on any number of threads.

    Raises:
        RuntimeError: it cannot run here (`obstacle`).
        ValueError: shapes, dtypes, bounds or rows do not fit.
    """
    q_NHd, k_RKd, v_RKd, *dense = (_with_dense_heads(x) for x in (q_NHd, k_RKd, v_RKd, *(constant or ())))
    return _Attention.apply(q_NHd, k_RKd, v_RKd, q_bounds, k_bounds, kv_rows, *(dense or (None, None)))


def _with_dense_heads(x_RKd):
    dense = x_RKd.stride(2) == 1 and (x_RKd.shape[1] == 1 or x_RKd.stride(1) == x_RKd.shape[2])
    return x_RKd if dense else x_RKd.contiguous()


def obstacle() -> str | None:
    """Why this cannot run here, or None. Compiles at the first call."""
    found = _library()
    return found if isinstance(found, str) else None


@functools.cache
def _library():
    """The loaded library, or why there is none."""
    found = load(
        SOURCE,
        instead="attention in bf16 takes torch's SDPA instead of this CPU's AVX512-BF16, at a fraction of the rate",
    )
    return found if isinstance(found, str) else _declared(found)


def _declared(library):
    arguments = ctypes.POINTER(_Arguments)
    library.attention_forward.argtypes = [arguments, _POINTER]
    library.attention_backward.argtypes = [arguments, *[_POINTER] * 4]
    library.attention_forward.restype = library.attention_backward.restype = None
    return library


def _check(rows, q_bounds, k_bounds, kv_rows, constant_in_pairs):
    """Refuse what the library, which checks nothing, would read or write out of bounds."""
    (q_NHd, k_RKd, v_RKd, *constant), (_, heads, d) = rows, rows[0].shape
    if (
        d % 16
        or heads % k_RKd.shape[1]
        or not constant_in_pairs
        or k_RKd.shape != v_RKd.shape
        or any(x.shape[1:] != (k_RKd.shape[1], d) or len(x) != len(constant[0]) for x in constant)
        or k_RKd.shape[2] != d
    ):
        raise ValueError(f"avx512 attention: rows {[list(x.shape) for x in rows]} do not fit each other")
    if not all(x.dtype == torch.bfloat16 and x.device.type == "cpu" and _with_dense_heads(x) is x for x in rows):
        raise ValueError("avx512 attention: rows must be bf16 on the CPU, with dense heads")
    if (
        q_bounds.dtype != torch.int32
        or k_bounds.dtype != torch.int32
        or not all(x is None or x.is_contiguous() for x in (q_bounds, k_bounds, kv_rows))
    ):
        raise ValueError("avx512 attention: bounds must be int32, and dense as kv_rows")
    queries, keys = (bounds[1:] - bounds[:-1] for bounds in (q_bounds.numpy(), k_bounds.numpy()))
    total = len(k_RKd) if kv_rows is None else len(kv_rows)
    if (
        len(queries) != len(keys)
        or (queries < 0).any()
        or (queries > keys).any()
        or q_bounds[0]
        or k_bounds[0]
        or (q_bounds[-1] != len(q_NHd) or k_bounds[-1] != total)
    ):
        raise ValueError(
            f"avx512 attention: segments of {queries.tolist()} queries and {keys.tolist()} keys do not "
            f"fit {len(q_NHd)} and {total} rows, or have more queries than keys"
        )
    held = len(k_RKd) + (len(constant[0]) if constant else 0)
    if kv_rows is None:
        if constant:
            raise ValueError("avx512 attention: constant rows need kv_rows")
    elif kv_rows.dtype != torch.int64 or (total and not 0 <= kv_rows.numpy().min() <= kv_rows.numpy().max() < held):
        raise ValueError(f"avx512 attention: kv_rows must be int64 and within the {held} rows")


def _arguments(q_NHd, k_RKd, v_RKd, q_bounds, k_bounds, kv_rows, constant_k, constant_v):
    """The struct for these tensors, which must outlive it."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(f"avx512 attention is impossible: {library}")
    (_, heads, d), kv_heads = q_NHd.shape, k_RKd.shape[1]
    rows = [x for x in (q_NHd, k_RKd, v_RKd, constant_k, constant_v) if x is not None]
    _check(rows, q_bounds, k_bounds, kv_rows, len(rows) != 4)
    pointers = {
        name: None if x is None else x.data_ptr()
        for name, x in (
            ("q", q_NHd),
            ("k", k_RKd),
            ("v", v_RKd),
            ("constant_k", constant_k),
            ("constant_v", constant_v),
            ("kv_rows", kv_rows),
            ("q_bounds", q_bounds),
            ("k_bounds", k_bounds),
        )
    }
    strides = {
        f"{name}_stride": 0 if x is None else x.stride(0)
        for name, x in (
            ("q", q_NHd),
            ("k", k_RKd),
            ("v", v_RKd),
            ("constant_k", constant_k),
            ("constant_v", constant_v),
        )
    }
    return library, _Arguments(
        **pointers,
        **strides,
        constant_rows=0 if constant_k is None else len(constant_k),
        segments=len(q_bounds) - 1,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        threads=torch.get_num_threads(),
    )


def _forward(*tensors):
    library, arguments = _arguments(*tensors)
    out_NHd = torch.empty_like(tensors[0], memory_format=torch.contiguous_format)
    library.attention_forward(arguments, out_NHd.data_ptr())
    return out_NHd


def _backward(grad_NHd, *tensors):
    library, arguments = _arguments(*tensors)
    grad_NHd, k_RKd = grad_NHd.to(torch.bfloat16).contiguous(), tensors[1]
    assert grad_NHd.shape == tensors[0].shape
    grad_q_NHd = torch.empty_like(grad_NHd)
    grad_k_RKd, grad_v_RKd = (k_RKd.new_zeros(k_RKd.shape, dtype=torch.float32) for _ in range(2))
    library.attention_backward(arguments, *(x.data_ptr() for x in (grad_NHd, grad_q_NHd, grad_k_RKd, grad_v_RKd)))
    return grad_q_NHd, grad_k_RKd, grad_v_RKd


def _unwritten(q_NHd, *others):
    """Results of the forward pass for tensors without numbers."""
    return torch.empty_like(q_NHd, memory_format=torch.contiguous_format)


def _unwritten_gradients(grad_NHd, q_NHd, k_RKd, v_RKd, *others):
    return torch.empty_like(grad_NHd), *(k_RKd.new_empty(k_RKd.shape, dtype=torch.float32) for _ in range(2))


# Operations, by whose names selective recomputation keeps the result, and counters of operations know them.
_LIBRARY = torch.library.Library("fastvid_avx512", "DEF")
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_bounds, Tensor k_bounds, Tensor? kv_rows, Tensor? constant_k, "
    "Tensor? constant_v"
)
_LIBRARY.define(f"attention({_INPUTS}) -> Tensor")
_LIBRARY.define(f"attention_backward(Tensor grad, {_INPUTS}) -> (Tensor, Tensor, Tensor)")
_LIBRARY.impl("attention", _forward, "CPU")
_LIBRARY.impl("attention_backward", _backward, "CPU")
_LIBRARY.impl("attention", _unwritten, "Meta")
_LIBRARY.impl("attention_backward", _unwritten_gradients, "Meta")


class _Attention(torch.autograd.Function):
    """Saves its inputs and nothing else."""

    @staticmethod
    def forward(ctx, *tensors):
        ctx.save_for_backward(*tensors)
        return torch.ops.fastvid_avx512.attention(*tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_NHd):
        grad_q_NHd, *grads_RKd = torch.ops.fastvid_avx512.attention_backward(grad_NHd, *ctx.saved_tensors)
        return grad_q_NHd, *(x_RKd.to(grad_q_NHd.dtype) for x_RKd in grads_RKd), *[None] * 5


__all__ = ["avx512_attention", "obstacle"]
