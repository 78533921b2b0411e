"""One step of AdamW with fp32 moments over bf16 weights, in one pass over a shard.

Dimensions: E elements of a shard.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw8bit_step import _random_tile, random_bits
from .dispatch import launch, use_triton


def round_to_bf16(values_E: Tensor, *, seed: int, step: int, first: int = 0) -> Tensor:
    """fp32 values, each one of its two neighbours in bf16: up with the probability of the part cut off.

    The random bits are those of `adamw8bit_step` for the elements first … first + E - 1.
    """
    begin = first // 8 * 8  # random bits come in groups of eight elements
    before, count = first - begin, len(values_E)
    bits_E = random_bits(begin, -(-(before + count) // 8) * 8, seed, step, values_E.device)[before : before + count]
    return ((values_E.view(torch.int32) + bits_E) & -0x10000).view(torch.float32)


def _factors(lr, beta1, beta2, weight_decay, step):
    """(rest of m, decay of v, rest of v, factor of the weights, size of a step, factor of √v)."""
    return (1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, lr / (1 - beta1**step), (1 - beta2**step) ** -0.5)


def adamw_step_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
) -> None:
    """`adamw_step` in plain torch."""
    rest1, decay2, rest2, keep, size, scale = _factors(lr, beta1, beta2, weight_decay, step)
    g = grad.float() if clip is None else grad.float() * clip
    m = exp_avg + (g - exp_avg) * rest1
    v = exp_avg_sq * decay2 + g * g * rest2
    p = param.float() * keep - m / (v.sqrt() * scale + eps) * size
    p = round_to_bf16(p.flatten(), seed=seed, step=step, first=first).view_as(p)
    for old, new in zip((param, exp_avg, exp_avg_sq), (p.bfloat16(), m, v)):
        old.copy_(new if skip is None else torch.where(skip != 0, old, new))


def _tiles():
    """(times 256 elements that a program updates, warps): 8 elements per thread, a load of 16 bytes in bf16."""
    return 4, 4


@triton.jit(do_not_specialize=["step", "seed", "first_group"])
def _adamw_step_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    clip_ptr,
    skip_ptr,
    count,
    seed,
    step,
    first_group,
    rest1,
    decay2,
    rest2,
    keep,
    size,
    scale,
    eps,
    BEFORE: tl.constexpr,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BEFORE: elements of the first group of eight, which random bits are for, that lie before the shard."""
    if SKIP:
        if tl.load(skip_ptr) != 0:
            return
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * 256)
    local = tl.arange(0, BLOCKS * 256) - BEFORE
    inside = local < count - start
    if BEFORE:
        inside &= local >= -start
    g = tl.load(grad_ptr + start + local, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + start + local, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(exp_avg_ptr + start + local, mask=inside, other=0.0)
    v = tl.load(exp_avg_sq_ptr + start + local, mask=inside, other=0.0)
    if CLIP:
        g *= tl.load(clip_ptr)
    m = m + (g - m) * rest1
    v = v * decay2 + g * g * rest2
    p = p * keep - m / (tl.sqrt(v) * scale + eps) * size
    bits = p.to(tl.uint32, bitcast=True) + _random_tile(first_group + start // 8, seed, step, BLOCKS)
    tl.store(param_ptr + start + local, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    tl.store(exp_avg_ptr + start + local, m, mask=inside)
    tl.store(exp_avg_sq_ptr + start + local, v, mask=inside)


@torch.no_grad()
def adamw_step(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    clip: Tensor | None = None,
    skip: Tensor | None = None,
    seed: int = 0,
    first: int = 0,
    impl: str = "auto",
) -> None:
    """AdamW (arXiv:1711.05101) of bf16 weights that are rounded stochastically, in place and in one pass.

    All is computed in fp32. All tensors are contiguous and of one shape, on one device.

    Args:
        param: E elements, bf16, updated.
        grad: E elements, bf16, fp16 or fp32.
        exp_avg, exp_avg_sq: E elements, fp32, updated: the moments, as torch.optim.AdamW's of these names.
        lr, beta1, beta2, eps, weight_decay: as torch.optim.AdamW's.
        step: number of this update, from 1.
        clip: fp32 scalar on the device that gradients are multiplied by.
        skip: scalar on the device; where it is not 0 nothing is changed.
        seed: of the random bits (`round_to_bf16`), 0 ≤ seed < 2^63.
        first: index of this shard's first element in the whole tensor. Nothing depends on sharding.
        impl: "auto", "triton" or "reference"; see `dispatch.use_triton`.

    Raises:
        ValueError: `impl` is not available here.

    Repeatable: the same bits on every run. Nothing is saved; nothing waits for the device.
    """
    tensors = [x for x in (param, grad, exp_avg, exp_avg_sq, clip, skip) if x is not None]
    assert all(x.is_contiguous() for x in tensors) and param.dtype == torch.bfloat16
    assert exp_avg.dtype == exp_avg_sq.dtype == torch.float32
    assert param.numel() == grad.numel() == exp_avg.numel() == exp_avg_sq.numel()
    if not use_triton(impl, *tensors, name="adamw_step"):
        adamw_step_reference(
            param,
            grad,
            exp_avg,
            exp_avg_sq,
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            weight_decay=weight_decay,
            step=step,
            clip=clip,
            skip=skip,
            seed=seed,
            first=first,
        )
        return
    if param.numel() == 0:
        return
    blocks, warps = _tiles()
    launch(
        _adamw_step_kernel,
        (triton.cdiv(first % 8 + param.numel(), blocks * 256),),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        clip,
        skip,
        param.numel(),
        seed,
        step,
        first // 8,
        *_factors(lr, beta1, beta2, weight_decay, step),
        eps,
        BEFORE=first % 8,
        CLIP=clip is not None,
        SKIP=skip is not None,
        BLOCKS=blocks,
        num_warps=warps,
    )


__all__ = ["adamw_step", "adamw_step_reference", "round_to_bf16"]
