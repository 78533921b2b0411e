"""One step of AdamW with fp32 moments over bf16 weights, in one pass over a shard.

Dimensions: E elements of a shard.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, use_triton

# Philox-4x32 (Salmon et al., SC 2011): the fewest rounds that pass every test there, multipliers, key increments.
ROUNDS = tl.constexpr(7)
MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


def random_bits(first: int, count: int, seed: int, step: int, device: torch.device | str) -> Tensor:
    """The bits that weights are rounded with: 16 for each of the elements first … first + count - 1, [count] int32.

    Args:
        first, count: multiples of 8.
        seed, step: as for `adamw_step`.
        device: of the result.
    """
    group = torch.arange(first // 8, (first + count) // 8, device=device)
    c0, c1, c2, c3 = group & 0xFFFFFFFF, group >> 32, torch.full_like(group, step), torch.zeros_like(group)
    keys = [seed & 0xFFFFFFFF, seed >> 32]

    def product(x, factor):
        """(high, low) 32 bits."""
        low = (x & 0xFFFF) * factor
        high = (x >> 16) * factor + (low >> 16)
        return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF

    for _ in range(ROUNDS.value):
        (high0, low0), (high2, low2) = product(c0, MULTIPLIERS[0]), product(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high2 ^ c1 ^ keys[0], low2, high0 ^ c3 ^ keys[1], low0
        keys = [(key + increment) & 0xFFFFFFFF for key, increment in zip(keys, INCREMENTS)]
    words = torch.stack([c0, c1, c2, c3], 1).flatten()
    return torch.stack([words & 0xFFFF, words >> 16], 1).flatten().int()


def round_to_bf16(values_E: Tensor, *, seed: int, step: int, first: int = 0) -> Tensor:
    """fp32 values, each one of its two neighbours in bf16: up with the probability of the part cut off.

    The random bits are `random_bits` of the elements first … first + E - 1.
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


@triton.jit
def random_tile(first_group, seed, step, BLOCKS: tl.constexpr):
    """16 random bits for each element of a line of blocks: a Philox block serves eight elements."""
    group = first_group + tl.arange(0, BLOCKS * 32)
    zero = group.to(tl.uint32) * 0
    r0, r1, r2, r3 = tl.philox(
        seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero, n_rounds=ROUNDS
    )
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCKS * 128,))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCKS * 256,))


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
    bits = p.to(tl.uint32, bitcast=True) + random_tile(first_group + start // 8, seed, step, BLOCKS)
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


__all__ = ["adamw_step", "adamw_step_reference", "random_bits", "random_tile", "round_to_bf16"]
