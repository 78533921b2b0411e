"""Floating-point operations that a step really executes in matrix products, counted as it runs.

What is counted: mm, addmm, bmm, baddbmm and their in-place, out and scaled forms, and oneDNN's linear layer, inside
autograd Functions too, and attention kernels, of whose score matrix a causal one computes the part up to the diagonal.
A backward computes the scores again, and that counts: the machine does it. Element-wise work counts as nothing.
"""

import time

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

FORWARD, BACKWARD = 2, 5  # matrix products of an attention kernel


class ExecutedFlops(TorchDispatchMode):
    """Adds up into `total` while it is entered."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        name = function._overloadpacket.__name__
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None)  # baddbmm_ is counted as baddbmm
        products = BACKWARD if "backward" in name or name.endswith("_bwd") else FORWARD
        if name == "_linear_pointwise":
            self.total += 2 * args[0].shape[-1] * out.numel()
        elif name.startswith("_scaled_dot_product_"):
            self.total += dense_flops(_named(function, args, kwargs), products)
        elif "attn" in name or "attention" in name:
            self.total += varlen_flops(_named(function, args, kwargs), products)
        elif packet in flop_registry:  # torch's formulas know of no dtype for the result
            args = [value for value in args if not isinstance(value, torch.dtype)]
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        return out


def dense_flops(arguments, products):
    """Of an attention kernel on [B, H, T, d], by its arguments' names; its causal mask is aligned at the first row."""
    batch, heads, queries, width = arguments["query"].shape
    keys = arguments["key"].shape[-2]
    pairs = queries * keys
    if arguments.get("is_causal"):
        pairs = sum(min(row + 1, keys) for row in range(queries))
    return 2 * batch * heads * pairs * width * products


def _named(function, args, kwargs):
    """A call's arguments by the names of the operation's schema."""
    return {argument.name: value for argument, value in zip(function._schema.arguments, args)} | kwargs


def varlen_flops(arguments, products):
    """Of an attention kernel on packed [N, H, d] rows, by its arguments' names; a causal mask is aligned at each
    segment's last row.

    Its cumulative lengths are the first two one-dimensional int32 tensors; a kernel that gets none counts as nothing.
    What does not say whether it is causal is.
    """
    tensors = [x for x in arguments.values() if isinstance(x, torch.Tensor)]
    bounds = [x for x in tensors if x.dtype == torch.int32 and x.dim() == 1][:2]
    if len(bounds) < 2 or tensors[0].dim() != 3:
        return 0
    q, k = (x.diff().long() for x in bounds)
    _, heads, width = tensors[0].shape
    pairs = q * k
    if next((arguments[name] for name in ("is_causal", "causal") if name in arguments), True):
        pairs = pairs - q * (q - 1) // 2
    return 2 * heads * width * products * int(pairs.sum())


def executed_flops(call):
    """(what `call()` returns, operations that it executed)."""
    with ExecutedFlops() as counter:
        value = call()
    return value, counter.total


def matmul_rate(dtype, device, seconds=0.5):
    """FLOP per second of a large square matrix product on random data: the fastest of the calls within `seconds`."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    times, begin = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        _synchronise(device)
        start = time.perf_counter()
        a @ b
        _synchronise(device)
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def _synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
