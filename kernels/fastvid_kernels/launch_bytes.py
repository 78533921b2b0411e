"""Bytes that a launch of a kernel moves, by its arguments: the fewest that its job can take.

Each input and output once, but of a gather the chosen rows. What the caches answer, such as a second reading of a row,
does not count.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that reading or writing all of a tensor moves; of an expanded one those that exist."""
    return min(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())


def _rotated(a):
    d = 2 * a["half"]
    rows = a["x_ptr"].shape[0]
    return rows * a["written_heads"] * d * (a["x_ptr"].element_size() + a["out_ptr"].element_size()) + tensor_bytes(
        a["positions_ptr"]
    )


def _placed(a):
    """Of the packed rows keys and values once, however many segments share them; constant rows too. And queries, with
    the positions, where the launch rotates them."""
    head, packed = 2 * a["half"] * a["k_ptr"].element_size(), a["qkv_ptr"].shape[0]
    keys, sources = a["rows_ptr"].shape[0], packed + a["C"]
    queries = 2 * packed * a["num_heads"] * head + tensor_bytes(a["positions_ptr"]) if a["query_programs"] else 0
    return queries + 2 * a["kv_heads"] * head * (keys + min(keys, sources)) + tensor_bytes(a["rows_ptr"])


def _collected(a):
    """Of the keys' gradients those that packed rows are, without those of constant rows, which come first."""
    if not a["GATHERED"]:
        return once(a)
    keys = max(a["grad_k_ptr"].shape[0], a["last_key"] if a["TWICE"] else 0)
    row = 2 * 2 * a["kv_heads"] * a["half"] * a["grad_k_ptr"].element_size()
    return once(a) - row * (keys - a["places_ptr"].shape[0])


def _softmax(a):
    """Whole padded rows of logits, read, and written where their gradient is due."""
    logits = a["logits_ptr"]
    row = a["row_stride"] * logits.element_size()
    others = {name: x for name, x in a.items() if name != "logits_ptr"}
    return once(others) + logits.shape[0] * row * (2 if a["GRADIENT"] else 1)


def _in_place(*names):
    return lambda a: once(a) + sum(tensor_bytes(a[name]) for name in names)


def _merged(a):
    """Both parts are read, and what is written may be the first one, and the second one's log-sum-exp."""
    both = tensor_bytes(a["other_lse_ptr"]) if a["BOTH"] else 0
    return both + sum(tensor_bytes(x) for x in a.values() if isinstance(x, torch.Tensor))


def _spliced(a):
    """Of the table the chosen rows."""
    return 2 * tensor_bytes(a["out_ptr"]) + tensor_bytes(a["sources_ptr"]) + tensor_bytes(a["token_ids_ptr"])


def _boundary_sums(a):
    rows = a["boundary_rows_ptr"]
    return (
        rows.shape[0] * a["D"] * a["grad_ptr"].element_size()
        + tensor_bytes(rows)
        + tensor_bytes(a["grad_boundary_ptr"])
    )


def _grid_pooled(a):
    """Of a grid that takes some frames those frames alone, each once however many steps it stands for."""
    if a["OVER_TIME"]:
        return once(a)
    x, T, frames = a["x_ptr"], a["T"], a["frames"]
    taken = len({step * T // frames for step in range(frames)})
    return taken * x[0].numel() * x.element_size() + tensor_bytes(a["out_RC_ptr"])


# Bytes of a launch by the kernel's arguments, where it is not `once`.
KERNELS: dict[str, Callable[[dict[str, Any]], int]] = {
    "_rope_qk_kernel": _rotated,
    "_place_keys_kernel": _placed,
    "_collect_kernel": _collected,
    "_collect_fp8_kernel": _collected,
    "_softmax_gradient_kernel": _softmax,
    "_grid_pool_kernel": _grid_pooled,
    "_merge_parts_kernel": _merged,
    "_splice_map_kernel": lambda a: 12 * (a["P"] + a["boundaries"]),
    "_splice_fwd_kernel": _spliced,
    "_splice_video_bwd_kernel": lambda a: 2 * tensor_bytes(a["grad_video_ptr"]) + tensor_bytes(a["video_rows_ptr"]),
    "_splice_boundary_bwd_kernel": _boundary_sums,
    "_adamw_step_kernel": _in_place("param_ptr", "exp_avg_ptr", "exp_avg_sq_ptr"),
    "_adamw8bit_step_kernel": _in_place("param_ptr", "state1_ptr", "state2_ptr", "absmax1_ptr", "absmax2_ptr"),
}


def once(arguments: Mapping[str, Any]) -> int:
    """Bytes of every tensor among them once; where one stands for several arguments, or for none, it is one."""
    found = {}
    for tensor in arguments.values():
        if isinstance(tensor, torch.Tensor):
            place = tensor.untyped_storage()._cdata, tensor.storage_offset()
            found[place] = max(found.get(place, 0), tensor_bytes(tensor))
    return sum(found.values())


def name_of(kernel: Any) -> str:
    """Of its function, as profilers show it."""
    return kernel.fn.__name__


@functools.cache
def _parameters(function):
    return tuple(inspect.signature(function).parameters)


def launch_bytes(kernel: Any, arguments: tuple, options: Mapping[str, Any]) -> int:
    """Bytes that a launch moves, of what `dispatch.watch_launches` tells about it."""
    given = dict(zip(_parameters(kernel.fn), arguments)) | dict(options)
    return KERNELS.get(name_of(kernel), once)(given)


__all__ = ["launch_bytes", "name_of", "tensor_bytes"]
