"""Floating-point operations that a step really executes in matrix products, counted as it runs.

What is counted: mm, addmm, bmm, baddbmm and their in-place and out forms, inside autograd Functions too, and torch's
attention kernels, of whose score matrix a causal one computes the part up to the diagonal. A backward computes the
scores again, and that counts: the machine does it. Element-wise work counts as nothing.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_ATTENTION = {  # kernel: (index of the first of q, k, v; of is_causal; matrix products)
    "_scaled_dot_product_flash_attention_for_cpu": (0, 4, 2),
    "_scaled_dot_product_flash_attention_for_cpu_backward": (1, 7, 5),
}


class ExecutedFlops(TorchDispatchMode):
    """Adds up into `total` while it is entered."""

    total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = function(*args, **kwargs)
        packet = function._overloadpacket
        if packet.__name__ in _ATTENTION:
            self.total += attention_flops(args, *_ATTENTION[packet.__name__])
        elif packet in flop_registry:
            flops = flop_registry[packet](*args, **kwargs, out_val=out)
            name = packet.__name__
            # torch counts the whole square. Its CUDA kernels are only called causally here.
            self.total += flops // 2 if "attention" in name else flops
        return out


def attention_flops(args, first, causal_at, products):
    """Of a dense attention kernel on [B, H, T, d]; causal means aligned at the first row."""
    q, k, v = args[first:first + 3]
    batch, heads, queries, width = q.shape
    keys = k.shape[-2]
    pairs = queries * keys
    if len(args) > causal_at and args[causal_at]:
        pairs = sum(min(row + 1, keys) for row in range(queries))
    # Of the products two in five have v's width; here it is q's.
    assert v.shape[-1] == width
    return 2 * batch * heads * pairs * width * products


def executed_flops(call):
    """(what `call()` returns, operations that it executed)."""
    with ExecutedFlops() as counter:
        value = call()
    return value, counter.total


def matmul_rate(dtype, device, seconds=0.5):
    """FLOP per second of a large square matrix product on random data: the fastest of the calls within `seconds`."""
    import time

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
