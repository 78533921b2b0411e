"""Calls of the kernels at the shapes of production, for compiling without a GPU.

`PRODUCTION[name]` is a function that returns {description: call without arguments} for ``fastvid_kernels/<name>.py``.
It runs in a process in which each launch of a kernel is only compiled, so tensors are `torch.empty` on the CPU: memory
that nobody touches costs nothing. The kernels of `WIDE` must load 16 bytes (or more) at a time, those of `WIDE_STORES`
store them, in every call whose description does not begin with "odd".
"""

from typing import Any

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

    return {
        "336 px, 8 videos, bf16": lambda: call(8, 576, torch.bfloat16),
        "336 px, 1 video, fp16": lambda: call(1, 576, torch.float16),
        "224 px, 8 videos, fp16, backward": lambda: call(8, 256, torch.float16, backward=True),
        # Triton makes arguments that are 1 constants.
        "odd: one frame of one patch, fp32, backward": lambda: call(1, 1, torch.float32, T=1, backward=True),
    }


PRODUCTION["spatio_temporal_pool"] = spatio_temporal_pool
WIDE |= {"_spatio_temporal_pool_fwd_kernel", "_spatio_temporal_pool_finish_kernel", "_spatio_temporal_pool_bwd_kernel"}
WIDE_STORES |= WIDE


def linear_cross_entropy_calls():
    """LLaMA-2's and LLaMA-3's vocabularies, with three video tokens."""
    from fastvid_kernels.linear_cross_entropy import linear_cross_entropy

    def call(vocabulary, rows=4, channels=16):
        h = torch.empty(rows, channels, dtype=torch.bfloat16, requires_grad=True)
        targets = torch.zeros(rows, dtype=torch.int64)
        return lambda: linear_cross_entropy(
            h, torch.empty(vocabulary, channels, dtype=torch.bfloat16), targets, impl="triton"
        )

    return {f"V={vocabulary} bf16": call(vocabulary) for vocabulary in (32003, 128259)}


WIDE.add("_softmax_gradient_kernel")
WIDE_STORES.add("_softmax_gradient_kernel")
PRODUCTION["linear_cross_entropy"] = linear_cross_entropy_calls


def add_rms_norm():
    """Of a 7B and a 13B decoder, frozen and trained; and of a residual stream in fp32."""
    from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_fp8
    from fastvid_kernels.quantize_fp8 import BackInFp8

    def call(channels, residual=torch.bfloat16, *, trained=False, add=True, rows=8192, to_fp8=False, back=False):
        x = torch.empty(rows, channels, dtype=residual, requires_grad=True)
        branch = torch.empty(rows, channels, dtype=torch.bfloat16, requires_grad=True) if add else None
        weight = torch.empty(channels, dtype=torch.float32 if trained else torch.bfloat16, requires_grad=trained)
        if back:
            branch = BackInFp8.of(branch)
        if to_fp8:  # whose backward is the other's
            return add_rms_norm_fp8(x, branch, weight, 1e-5, torch.bfloat16, impl="triton")
        outputs = add_rms_norm(x, branch, weight, 1e-5, torch.bfloat16, impl="triton")
        torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])

    return {
        "D=4096 bf16, frozen": lambda: call(4096),
        "D=5120 bf16, frozen": lambda: call(5120),
        "D=4096 bf16, trained": lambda: call(4096, trained=True),
        "D=5120 bf16, trained": lambda: call(5120, trained=True),
        "D=4096 fp32 residual, frozen": lambda: call(4096, torch.float32),
        "D=4096 bf16, no branch, trained": lambda: call(4096, add=False, trained=True),
        "D=4096 bf16, frozen, to fp8": lambda: call(4096, to_fp8=True),
        "D=5120 bf16, frozen, to fp8": lambda: call(5120, to_fp8=True),
        "D=4096 bf16, frozen, back in fp8": lambda: call(4096, back=True),
        "D=5120 bf16, frozen, back in fp8": lambda: call(5120, back=True),
        "D=4096 fp32 residual, frozen, back in fp8": lambda: call(4096, torch.float32, back=True),
        "odd: D=999, 3 rows": lambda: call(999, rows=3, trained=True),
    }


PRODUCTION["add_rms_norm"] = add_rms_norm


def swiglu():
    """Of a 7B and a 13B decoder."""
    from fastvid_kernels.swiglu import swiglu, swiglu_backward_fp8, swiglu_fp8

    def to_fp8(channels, dtype=torch.bfloat16, rows=8192):
        x = torch.empty(rows, 2 * channels, dtype=dtype)
        swiglu_fp8(x, impl="triton")
        swiglu_backward_fp8(x, torch.empty(rows, channels, dtype=dtype), impl="triton")

    def call(channels, dtype=torch.bfloat16, rows=8192):
        x = torch.empty(rows, 2 * channels, dtype=dtype, requires_grad=True)
        out = swiglu(x, impl="triton")
        out.backward(torch.empty_like(out))

    return {
        "F=11008 bf16": lambda: call(11008),
        "F=13824 bf16": lambda: call(13824),
        "F=11008 fp32": lambda: call(11008, torch.float32),
        "odd: F=33 fp16": lambda: call(33, torch.float16),
        "F=11008 bf16, to fp8": lambda: to_fp8(11008),
        "F=13824 bf16, to fp8": lambda: to_fp8(13824),
        "odd: F=33 fp16, to fp8": lambda: to_fp8(33, torch.float16),
    }


PRODUCTION["swiglu"] = swiglu


def rope_qk():
    """Of LLaMA 7B, 13B and 3-8B: heads, key/value heads."""
    from fastvid_kernels.rope_qk import rope_qk

    def call(heads, kv_heads, dtype=torch.bfloat16, channels=128, rows=8192):
        x = torch.empty(rows, (heads + 2 * kv_heads) * channels, dtype=dtype, requires_grad=True)
        positions, frequencies = torch.empty(rows, dtype=torch.int32), torch.empty(channels // 2)
        rope_qk(x.detach(), positions, frequencies, heads, kv_heads, inplace=True, impl="triton")
        out = rope_qk(x, positions, frequencies, heads, kv_heads, impl="triton")
        out.backward(torch.empty_like(out))

    return {
        "32 heads bf16": lambda: call(32, 32),
        "40 heads bf16": lambda: call(40, 40),
        "32 heads, 8 of keys bf16": lambda: call(32, 8),
        "32 heads fp32": lambda: call(32, 32, torch.float32),
        "odd: 3 heads of 10 channels fp16": lambda: call(3, 1, torch.float16, 10),
    }


PRODUCTION["rope_qk"] = rope_qk


def merge_parts_calls():
    """Of LLaMA 7B, 13B and 3-8B's heads: 30 questions' rows behind their videos, log-sum-exps as libraries lay them."""
    from fastvid_kernels.merge_parts import merge_parts

    def call(heads, dtype=torch.bfloat16, channels=128, rows=5400):
        parts = [torch.empty(rows, heads, channels, dtype=dtype) for _ in range(2)]
        lse, other_lse = torch.empty(heads, rows), torch.empty(heads, rows)
        return lambda: merge_parts(parts[0], lse, parts[1], other_lse, inplace=True, impl="triton")

    return {
        "32 heads bf16": call(32),
        "40 heads bf16": call(40),
        "32 heads fp16": call(32, torch.float16),
        "odd: 3 heads of 10 channels fp16": call(3, torch.float16, 10),
    }


PRODUCTION["merge_parts"] = merge_parts_calls
WIDE.add("_merge_parts_kernel")
WIDE_STORES.add("_merge_parts_kernel")


def splice_video():
    """Eight videos of 676 rows among 8192, boundary rows trained in fp32 beside frozen tables."""
    from fastvid_kernels.splice_video import splice_video

    def call(channels, dtype=torch.bfloat16, boundary=True, videos=8, rows=8192):
        video = torch.empty(videos * 676, channels, dtype=torch.bfloat16, requires_grad=True)
        boundary_rows = torch.empty(2 * videos if boundary else 0, dtype=torch.int64)
        out = splice_video(
            torch.empty(rows, dtype=torch.int64),
            torch.empty(32003, channels, dtype=torch.bfloat16),
            video,
            torch.empty(videos * 676, dtype=torch.int64),
            torch.empty(2, channels, requires_grad=True) if boundary else None,
            boundary_rows,
            dtype,
            impl="triton",
        )
        out.backward(torch.empty_like(out))

    return {
        "D=4096 bf16": lambda: call(4096),
        "D=5120 bf16": lambda: call(5120),
        "D=4096 fp32 residual": lambda: call(4096, torch.float32),
        "D=4096 bf16, no boundary": lambda: call(4096, boundary=False),
        "odd: D=33, 1 video": lambda: call(33, videos=1, rows=700),
    }


PRODUCTION["splice_video"] = splice_video
WIDE |= {
    "_add_rms_norm_fwd_kernel",
    "_add_rms_norm_bwd_kernel",
    "_swiglu_fwd_kernel",
    "_swiglu_bwd_kernel",
    "_rope_qk_kernel",
    "_splice_fwd_kernel",
    "_splice_video_bwd_kernel",
}
WIDE.add("_add_rms_norm_finish_kernel")
WIDE_STORES |= {
    "_add_rms_norm_fwd_kernel",
    "_add_rms_norm_bwd_kernel",
    "_swiglu_fwd_kernel",
    "_swiglu_bwd_kernel",
    "_rope_qk_kernel",
    "_splice_fwd_kernel",
    "_splice_video_bwd_kernel",
}


STEP = {"lr": 2e-5, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 7, "seed": 42}


def adamw8bit_step_calls():
    """A LLaMA layer's fused gate and up projections; the adapter's fp32 masters."""
    from fastvid_kernels.adamw8bit_step import adamw8bit_step

    def call(elements, dtype):
        param, grad = (torch.empty(elements, dtype=dtype) for _ in range(2))
        codes = [torch.empty(elements, dtype=torch.uint8) for _ in range(2)]
        scales = [torch.empty(elements // 256) for _ in range(2)]
        return lambda: adamw8bit_step(
            param,
            grad,
            *codes,
            *scales,
            **STEP,
            clip=torch.empty(()),
            skip=torch.empty(()),
            impl="triton",
        )

    return {"22016×4096 bf16": call(22016 * 4096, torch.bfloat16), "1024×4096 fp32": call(1024 * 4096, torch.float32)}


WIDE.add("_adamw8bit_step_kernel")
WIDE_STORES.add("_adamw8bit_step_kernel")
PRODUCTION["adamw8bit_step"] = adamw8bit_step_calls


def adamw_step_calls():
    """A LLaMA layer's fused gate and up projections, of one backward and of several; a shard that begins anywhere."""
    from fastvid_kernels.adamw_step import adamw_step

    def call(elements, grad_dtype, first=0):
        param, grad = torch.empty(elements, dtype=torch.bfloat16), torch.empty(elements, dtype=grad_dtype)
        moments = [torch.empty(elements) for _ in range(2)]
        return lambda: adamw_step(
            param,
            grad,
            *moments,
            **STEP,
            first=first,
            clip=torch.empty(()),
            skip=torch.empty(()),
            impl="triton",
        )

    return {
        "22016×4096, bf16 gradient": call(22016 * 4096, torch.bfloat16),
        "22016×4096, fp32 gradient": call(22016 * 4096, torch.float32),
        "odd: 41×101, from the third element": call(41 * 101, torch.bfloat16, 2),
    }


WIDE.add("_adamw_step_kernel")
WIDE_STORES.add("_adamw_step_kernel")
PRODUCTION["adamw_step"] = adamw_step_calls


def frame_patchify():
    from fastvid_kernels import frame_patchify

    def call(size, dtype, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711)):
        frames = torch.empty(100, 720, 1280, 3, dtype=torch.uint8)
        return lambda: frame_patchify(frames, size=size, patch=14, mean=mean, std=std, dtype=dtype, impl="triton")

    return {
        "336 px, bf16": call(336, torch.bfloat16),
        "224 px, fp16": call(224, torch.float16),
        "336 px, fp32, by table": call(336, torch.float32),
    }


PRODUCTION["frame_patchify"] = frame_patchify


def yuv_patchify_calls():
    """A hundred surfaces of 720p, as NVDEC has them."""
    from fastvid_kernels import yuv_patchify

    def call(
        size, dtype, mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), step=1280
    ):
        y = torch.empty(720 * step, dtype=torch.uint8).as_strided((720, 1280), (step, 1))
        uv = torch.empty(360, 640, 2, dtype=torch.uint8)
        frames = [(y, uv[..., 0], uv[..., 1])] * 100
        return lambda: yuv_patchify(
            frames,
            [(9539, 128, 14686, 17305, -1747, -4366)] * 100,
            size=size,
            patch=14,
            mean=mean,
            std=std,
            dtype=dtype,
            impl="triton",
        )

    return {
        "336 px, bf16": call(336, torch.bfloat16),
        "224 px, fp16": call(224, torch.float16),
        "336 px, fp32, by table": call(336, torch.float32),
        "336 px, bf16, rows 4 MiB apart": call(336, torch.bfloat16, step=2**22),
    }


PRODUCTION["yuv_patchify"] = yuv_patchify_calls


def add_layer_norm_calls():
    """Of CLIP ViT-L/14 and of SigLIP so400m, a pass of 25 images."""
    from fastvid_kernels.add_layer_norm import add_layer_norm

    def call(channels, dtype=torch.float16, rows=25 * 577, add=True):
        x, branch = (torch.empty(rows, channels, dtype=dtype) for _ in range(2))
        weight = torch.empty(channels, dtype=dtype)
        return lambda: add_layer_norm(x, branch if add else None, weight, weight, 1e-5, impl="triton")

    return {
        "D=1024 fp16": call(1024),
        "D=1024 bf16": call(1024, torch.bfloat16),
        "D=1152 fp16": call(1152),
        "D=1024 fp16, no branch": call(1024, add=False),
        "odd: D=33 fp32": call(33, torch.float32, 3),
    }


PRODUCTION["add_layer_norm"] = add_layer_norm_calls
WIDE.add("_add_layer_norm_kernel")
WIDE_STORES.add("_add_layer_norm_kernel")


def quick_gelu_calls():
    """Of CLIP ViT-L/14, a pass of 25 images."""
    from fastvid_kernels.quick_gelu import quick_gelu

    def call(dtype, *shape):
        return lambda: quick_gelu(torch.empty(shape, dtype=dtype), impl="triton")

    return {
        "25 images of 577 rows, F=4096, fp16": call(torch.float16, 25 * 577, 4096),
        "25 images of 577 rows, F=4096, bf16": call(torch.bfloat16, 25 * 577, 4096),
        "odd: 33 elements fp32": call(torch.float32, 33),
    }


PRODUCTION["quick_gelu"] = quick_gelu_calls
WIDE.add("_quick_gelu_kernel")
WIDE_STORES.add("_quick_gelu_kernel")
WIDE_STORES.add("_frame_patchify_fwd_kernel")


def quantize_fp8_calls():
    """Rows of a LLaMA layer: the residual stream, the feed-forward block's product, the gradient of gate and up."""
    from fastvid_kernels.quantize_fp8 import quantize_fp8

    def call(channels, scale=None):
        x = torch.empty(64, channels, dtype=torch.bfloat16)
        return lambda: quantize_fp8(x, scale, impl="triton")

    return {
        "D=4096 bf16": call(4096),
        "D=11008 bf16": call(11008),
        "D=22016 bf16": call(22016),
        "D=4096 bf16, given scale": call(4096, torch.empty(1)),
    }


WIDE.add("_quantize_fp8_kernel")
WIDE_STORES.add("_quantize_fp8_kernel")
PRODUCTION["quantize_fp8"] = quantize_fp8_calls


def rope_keys_calls():
    """Of LLaMA 7B, 13B and 3-8B: behind constant rows, with some keys shared."""
    from fastvid_kernels.rope_keys import place_keys

    def call(heads, kv_heads, dtype=torch.bfloat16, channels=128, rows=8192, queries=True):
        x = torch.empty(rows, (heads + 2 * kv_heads) * channels, dtype=dtype)
        positions, frequencies = torch.empty(rows, dtype=torch.int32), torch.empty(channels // 2)
        each = torch.empty(34, kv_heads, channels, dtype=dtype)
        rows_M = torch.empty(rows + 8, dtype=torch.int64)
        settings = positions, frequencies, heads, kv_heads, 1.0
        place_keys(x, *settings, rows_M, (each, each), queries_NX=x if queries else None)

    return {
        "32 heads bf16": lambda: call(32, 32),
        "32 heads bf16, keys alone": lambda: call(32, 32, queries=False),
        "40 heads bf16": lambda: call(40, 40),
        "32 heads, 8 of keys bf16": lambda: call(32, 8),
        "no queries bf16": lambda: call(0, 32),
        "odd: 3 heads of 10 channels fp16": lambda: call(3, 1, torch.float16, 10),
    }


PRODUCTION["rope_keys"] = rope_keys_calls
WIDE.add("_place_keys_kernel")
WIDE_STORES.add("_place_keys_kernel")


def _backward_of_keys(backward):
    """Of LLaMA 7B, 13B and 3-8B: keys in order, with some shared, and of attention in two parts."""
    from fastvid_kernels.way_back import Twice

    def call(heads, kv_heads, dtype=torch.bfloat16, channels=128, rows=8192, gathered=True, twice=None):
        way_back = (
            (torch.empty(rows + 1, dtype=torch.int32), torch.empty(rows + 8, dtype=torch.int32)) if gathered else None
        )
        grads = [torch.empty(rows, n, channels, dtype=dtype) for n in (heads, kv_heads, kv_heads)]
        backward(
            *grads,
            torch.empty(rows, dtype=torch.int32),
            torch.empty(channels // 2),
            way_back=way_back,
            more=twice and (grads, twice),
            impl="triton",
        )

    parts: dict[str, Any] = {"twice": Twice(4096, 8192, 34, 2704)}
    return {
        "32 heads bf16": lambda: call(32, 32),
        "32 heads bf16, in order": lambda: call(32, 32, gathered=False),
        "40 heads bf16": lambda: call(40, 40),
        "32 heads, 8 of keys bf16": lambda: call(32, 8),
        "no queries bf16": lambda: call(0, 32),
        "32 heads bf16, in two parts": lambda: call(32, 32, **parts),
        "40 heads bf16, in two parts": lambda: call(40, 40, **parts),
        "32 heads, 8 of keys bf16, in two parts": lambda: call(32, 8, **parts),
        "no queries bf16, in two parts": lambda: call(0, 32, **parts),
        "odd: 3 heads of 10 channels fp16": lambda: call(3, 1, torch.float16, 10),
    }


def rope_keys_backward_calls():
    from fastvid_kernels.rope_keys_backward import rope_keys_backward

    return _backward_of_keys(rope_keys_backward)


PRODUCTION["rope_keys_backward"] = rope_keys_backward_calls
WIDE.add("_collect_kernel")
WIDE_STORES.add("_collect_kernel")
WIDE |= {"_swiglu_fp8_fwd_kernel", "_swiglu_fp8_bwd_kernel"}
WIDE_STORES |= {"_swiglu_fp8_fwd_kernel", "_swiglu_fp8_bwd_kernel"}


def rope_keys_fp8_calls():
    from fastvid_kernels.rope_keys_fp8 import rope_keys_backward_fp8

    return _backward_of_keys(rope_keys_backward_fp8)


PRODUCTION["rope_keys_fp8"] = rope_keys_fp8_calls
WIDE.add("_collect_fp8_kernel")
WIDE_STORES.add("_collect_fp8_kernel")


def grid_pool_calls():
    """PLLaVA's grid, whole frames, and both groups of SlowFast-LLaVA; of CLIP's 576 patches and SigLIP's 729."""
    from fastvid_kernels import grid_pool

    def call(frames, patches, channels, *grid, dtype=torch.float16, over_time=True):
        states = torch.empty(frames, patches, channels, dtype=dtype)
        return lambda: grid_pool(states, grid, over_time=over_time, impl="triton")

    return {
        "16 × 12 × 12 of 16 frames, fp16": call(16, 576, 1024, 16, 12, 12),
        "16 × 12 × 12 of 100 frames, bf16": call(100, 576, 1024, 16, 12, 12, dtype=torch.bfloat16),
        "32 × 14 × 14 of 32 frames, SigLIP, fp16": call(32, 729, 1152, 32, 14, 14),
        "16 × 1 × 1 of 100 frames, fp16": call(100, 576, 1024, 16, 1, 1),
        "10 of 50 frames at 24 × 12, fp16": call(50, 576, 1024, 10, 24, 12, over_time=False),
        "50 of 50 frames at 4 × 4, fp16": call(50, 576, 1024, 50, 4, 4, over_time=False),
        "odd: one patch of 33 channels, fp32": call(1, 1, 33, 1, 1, 1, dtype=torch.float32),
    }


PRODUCTION["grid_pool"] = grid_pool_calls
WIDE.add("_grid_pool_kernel")
