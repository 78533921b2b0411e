"""Calls of the kernels at the shapes of production, for compiling without a GPU.

`PRODUCTION[name]` is a function that returns {description: call without arguments} for ``fastvid_kernels/<name>.py``.
It runs in a process in which each launch of a kernel is only compiled, so tensors are `torch.empty` on the CPU: memory
that nobody touches costs nothing. The kernels of `WIDE` must load 16 bytes (or more) at a time, those of `WIDE_STORES`
store them, in every call whose description does not begin with "odd".
"""

import torch

WIDE = set()
WIDE_STORES = set()
PRODUCTION = {}


def spatio_temporal_pool():
    from fastvid_kernels import spatio_temporal_pool

    def call(B, P, dtype, T=100, backward=False):
        states = torch.empty(B, T, P + 1, 1024, dtype=dtype, requires_grad=backward)[:, :, 1:]
        out = spatio_temporal_pool(states, num_temporal=T, frame_counts=[T] * B, impl="triton")
        if backward:
            out.grad_fn.apply(torch.empty_like(out))

    return {"336 px, 8 videos, bf16": lambda: call(8, 576, torch.bfloat16),
            "336 px, 1 video, fp16": lambda: call(1, 576, torch.float16),
            "224 px, 8 videos, fp16, backward": lambda: call(8, 256, torch.float16, backward=True),
            # Triton makes arguments that are 1 constants.
            "odd: one frame of one patch, fp32, backward": lambda: call(1, 1, torch.float32, T=1, backward=True)}


PRODUCTION["spatio_temporal_pool"] = spatio_temporal_pool
WIDE |= {"_spatio_temporal_pool_fwd_kernel", "_spatio_temporal_pool_finish_kernel", "_spatio_temporal_pool_bwd_kernel"}
WIDE_STORES |= {"_spatio_temporal_pool_fwd_kernel", "_spatio_temporal_pool_bwd_kernel"}


def linear_cross_entropy_calls():
    """LLaMA-2's vocabulary with three video tokens, whose rows fit registers, and LLaMA-3's, whose do not."""
    from fastvid_kernels.linear_cross_entropy import linear_cross_entropy

    def call(vocabulary, rows=4, channels=16):
        h = torch.empty(rows, channels, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64)
        return lambda: linear_cross_entropy(h, torch.empty(vocabulary, channels, dtype=torch.bfloat16), targets, impl="triton")

    return {f"V={vocabulary} bf16": call(vocabulary) for vocabulary in (32003, 128259)}


WIDE.add("_softmax_gradient_kernel")
PRODUCTION["linear_cross_entropy"] = linear_cross_entropy_calls
