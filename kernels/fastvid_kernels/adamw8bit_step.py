"""One step of AdamW with 8-bit moments, in one pass over a shard.

Dimensions: E elements of a shard, B = ceil(E / 256) blocks of moments that share a scale.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .adamw_step import random_bits, random_tile
from .dispatch import launch, use_triton

BLOCK_SIZE = 256
# Smallest scale that is divided by: the smallest normal fp32.
TINY = tl.constexpr(2.0**-126)


@functools.cache
def dynamic_map(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The 256 values of the dynamic 8-bit type, ascending, fp32 (arXiv:1511.04561, arXiv:2110.02861).

    Seven decades; the one that ends at 10^(i-6) is divided into 2^i bins per sign, or 2^(i+1) if unsigned, each
    represented by its middle; and 0 and 1. The same bits as bitsandbytes' `create_dynamic_map`.
    """
    values = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (i if signed else i + 1) + 1)
        middles = 10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values.to(device)


def _factors(lr, beta1, beta2, eps, weight_decay, step):
    """(decay of m, its unit, decay of v, its unit, factor of the weights, slope and offset of √v).

    Moments are computed in units of 1 - β, so that a gradient counts once. The weights then change by m times the
    square of 1/√(√v · slope + offset), which is cheaper than a division.
    """
    rest1, rest2 = 1 - beta1, 1 - beta2
    size = max(lr / (1 - beta1**step) * rest1, 1e-36)  # what m is multiplied by; never 0, by which to divide
    return (
        beta1 / rest1,
        rest1,
        beta2 / rest2,
        rest2,
        1 - lr * weight_decay,
        (rest2 / (1 - beta2**step)) ** 0.5 / size,
        eps / size,
    )


def adamw8bit_step_reference(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
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
    """`adamw8bit_step` in plain torch, whole tensors at a time."""
    count, blocks = param.numel(), absmax1.numel()

    def padded(x):
        """[B, 256] with zeros at the end."""
        return torch.nn.functional.pad(x.flatten(), (0, blocks * BLOCK_SIZE - count)).view(blocks, BLOCK_SIZE)

    decay1, unit1, decay2, unit2, keep, slope, offset = _factors(lr, beta1, beta2, eps, weight_decay, step)
    maps = [dynamic_map(signed, param.device) for signed in (True, False)]
    m, v = (
        padded(table[codes.long()]) * (absmax * decay)[:, None]
        for table, codes, absmax, decay in zip(maps, (state1, state2), (absmax1, absmax2), (decay1, decay2))
    )
    g, p = padded(grad).float(), padded(param).float()
    if clip is not None:
        g = g * clip
    m, v = m + g, v + g * g
    root = torch.rsqrt(v.sqrt() * slope + offset)
    p = p * keep - m * root * root
    if param.dtype == torch.bfloat16:
        bits = random_bits(first, p.numel(), seed, step, p.device).view_as(p)
        p = ((p.contiguous().view(torch.int32) + bits) & -0x10000).view(torch.float32)
    new = [p.flatten()[:count].view_as(param).to(param.dtype)]
    for x, table, codes, unit in zip((m, v), maps, (state1, state2), (unit1, unit2)):
        absmax = x.abs().amax(1)
        part = x * (1 / absmax.clamp(min=TINY.value))[:, None]
        nearest = torch.bucketize(part, (table[1:] + table[:-1]) / 2)
        new += [nearest.flatten()[:count].view_as(codes).to(torch.uint8), absmax * unit]
    for old, value in zip((param, state1, absmax1, state2, absmax2), new):
        old.copy_(value if skip is None else torch.where(skip != 0, old, value))


# `_code` sorts fractions into bins. A fraction's bits are nearly its logarithm. Multiplied by ROOT / 2^32 and read as a
# float they are nearly the fraction to the power of 0.31. That times SCALE is the bin. So codes of all decades lie
# about as dense, and no bin has two thresholds. Both factors were found by trying many.
ROOT = tl.constexpr(1332298855)
SCALE = tl.constexpr(1.4140625 * 2.0**74)
# What is smaller has zero's code; it serves in its place.
FLOOR = tl.constexpr(2.0**-23)


def _tiles():
    """(blocks of moments a program updates, warps): 8 elements a thread, which leaves room for many threads."""
    return 4, 4


def _bins(magnitudes, signed):
    """[n] bin of each of [n] fp32 numbers from FLOOR to 1, computed as by `_code`."""
    powers = ((magnitudes.view(torch.int32).long() * ROOT.value) >> 32).int().view(torch.float32)
    scale = SCALE.value / 2 if signed else SCALE.value
    return (powers.double() * scale * 2**22).round().int()


def _steps(signed):
    """[512] int32: for each bin what, added to a number's bits, leaves its code in the highest byte.

    The sum overflows into that byte where the number passes the bin's threshold. A bin without one has the last before
    it. Bins from 256 on are the positive numbers' of the signed type; below, mirrored, are the negative ones'. Their
    bits are inverted, so that they too rise with the numbers.
    """
    values = dynamic_map(signed)
    thresholds = (values[1:] + values[:-1]) / 2
    steps = torch.zeros(512, dtype=torch.int64)
    for negative in (True, False) if signed else (False,):
        # In the order of magnitudes; the code is that of the side that is farther from zero.
        ours = (thresholds[thresholds < 0].flip(0) if negative else thresholds[thresholds > 0]).abs()
        codes = torch.arange(len(ours) - 1, -1, -1) if negative else torch.arange(256 - len(ours), 256)
        bits = ours.view(torch.int32).long()
        bins = torch.arange(256 if signed else 512)
        last = (torch.searchsorted(_bins(ours, signed), bins, right=True) - 1).clamp(min=0)
        if negative:
            steps[256 - bins] = ((codes << 24) + 2**24 + bits)[last]
        else:
            steps[256 if signed else 0 :] = ((codes << 24) - bits - 1)[last]
    return torch.where(steps >= 2**31, steps - 2**32, steps).int()


@functools.cache
def _codebook(device):
    """What the kernel looks up, [1536] int32: the bits of the signed and of the unsigned type's values, beginning with
    code 128, since codes are read as signed bytes; and `_steps` of either.
    """
    values = [dynamic_map(signed).roll(128).view(torch.int32) for signed in (True, False)]
    return torch.cat([*values, _steps(True), _steps(False)]).to(device)


@triton.jit
def _code(x, book_ptr, SIGNED: tl.constexpr):
    """Code of the dynamic type's value nearest to x in [-1, 1] or [0, 1], in the highest byte of an integer.

    As many thresholds lie below x as the code says: compared with the one of x's bin. NaN becomes some code.
    """
    steps = tl.load(book_ptr + (512 if SIGNED else 1024) + tl.arange(0, 512))
    bits = tl.maximum(tl.abs(x), FLOOR).to(tl.int32, bitcast=True)
    power = tl.umulhi(bits.to(tl.uint32), ROOT)
    # Added to 2, the lowest bits of a float are a whole number.
    if SIGNED:
        sign = x.to(tl.int32, bitcast=True)
        power |= sign.to(tl.uint32, bitcast=True) & 0x80000000
        bin = power.to(tl.float32, bitcast=True) * (SCALE / 2) + (2 + 256 * 2.0**-22)
        bits ^= sign >> 31
    else:
        bin = power.to(tl.float32, bitcast=True) * SCALE + 2.0
    return bits + tl.gather(steps, bin.to(tl.int32, bitcast=True) - 0x40000000, 0)


@triton.jit
def _highest_byte(x):
    return (x.to(tl.uint32, bitcast=True) >> 24).to(tl.uint8)


@triton.jit
def _times(x, factors):
    """A line of blocks, each times its factor."""
    return tl.reshape(tl.reshape(x, (factors.shape[0], 256)) * factors[:, None], x.shape)


@triton.jit
def _absmax(x, BLOCKS: tl.constexpr):
    """Scale of each block of a line, and its reciprocal."""
    part = tl.max(tl.reshape(tl.abs(x), (BLOCKS, 32, 8)), 2)
    # Of the integers with the same bits: across a warp, that is one instruction.
    absmax = tl.max(part.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
    # Under a scale of NaN all fractions are NaN: numbers of any size would lie beyond the code book.
    return absmax, 1 / tl.maximum(absmax, TINY, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["step", "seed", "first"])
def _adamw8bit_step_kernel(
    param_ptr,
    grad_ptr,
    state1_ptr,
    state2_ptr,
    absmax1_ptr,
    absmax2_ptr,
    book_ptr,
    clip_ptr,
    skip_ptr,
    count,
    seed,
    step,
    first,
    decay1,
    unit1,
    decay2,
    unit2,
    keep,
    slope,
    offset,
    CLIP: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    if SKIP:
        if tl.load(skip_ptr) != 0:
            return
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * 256)
    block = tl.arange(0, BLOCKS)
    inside_block = block * 256 < count - start
    # Loads and stores are of lines, so that all take one layout; in between are blocks.
    local = tl.arange(0, BLOCKS * 256)
    inside = local < count - start
    all_256 = tl.arange(0, 256)
    g = tl.load(grad_ptr + start + local, mask=inside, other=0.0).to(tl.float32)
    p = tl.load(param_ptr + start + local, mask=inside, other=0.0).to(tl.float32)
    # Elements past the end are zeros, which count in no block's scale.
    code1 = tl.load(state1_ptr + start + local, mask=inside, other=127).to(tl.int8, bitcast=True).to(tl.int32) + 128
    code2 = tl.load(state2_ptr + start + local, mask=inside, other=0).to(tl.int8, bitcast=True).to(tl.int32) + 128
    absmax1_ptr += start // 256 + block
    absmax2_ptr += start // 256 + block
    absmax1 = tl.load(absmax1_ptr, mask=inside_block, other=0.0) * decay1
    absmax2 = tl.load(absmax2_ptr, mask=inside_block, other=0.0) * decay2
    if CLIP:
        g *= tl.load(clip_ptr)
    m = _times(tl.gather(tl.load(book_ptr + all_256).to(tl.float32, bitcast=True), code1, 0), absmax1) + g
    v = _times(tl.gather(tl.load(book_ptr + 256 + all_256).to(tl.float32, bitcast=True), code2, 0), absmax2) + g * g
    root = tl.rsqrt(tl.sqrt(v) * slope + offset)
    p = p * keep - m * root * root
    if param_ptr.dtype.element_ty == tl.bfloat16:
        bits = p.to(tl.uint32, bitcast=True) + random_tile((first + start) // 8, seed, step, BLOCKS)
        tl.store(param_ptr + start + local, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(param_ptr + start + local, p, mask=inside)

    absmax, inverse = _absmax(m, BLOCKS)
    tl.store(absmax1_ptr, absmax * unit1, mask=inside_block)
    tl.store(state1_ptr + start + local, _highest_byte(_code(_times(m, inverse), book_ptr, SIGNED=True)), mask=inside)
    absmax, inverse = _absmax(v, BLOCKS)
    tl.store(absmax2_ptr, absmax * unit2, mask=inside_block)
    tl.store(state2_ptr + start + local, _highest_byte(_code(_times(v, inverse), book_ptr, SIGNED=False)), mask=inside)


def _check(param, grad, state1, state2, absmax1, absmax2, first):
    """Raises ValueError for what the kernel would read or write past, or take for something else."""
    blocks, floats = triton.cdiv(param.numel(), BLOCK_SIZE), (torch.float32, torch.bfloat16, torch.float16)
    for name, x, count, dtypes in (
        ("param", param, param.numel(), floats[:2]),
        ("grad", grad, param.numel(), floats),
        ("state1", state1, param.numel(), (torch.uint8,)),
        ("state2", state2, param.numel(), (torch.uint8,)),
        ("absmax1", absmax1, blocks, floats[:1]),
        ("absmax2", absmax2, blocks, floats[:1]),
    ):
        if x.dtype not in dtypes:
            raise ValueError(f"adamw8bit_step: {name} must be {' or '.join(map(str, dtypes))}, found {x.dtype}")
        if x.numel() != count:
            raise ValueError(
                f"adamw8bit_step: {name} must have {count} elements for a param of {param.numel()}, found {x.numel()}"
            )
        if not x.is_contiguous():
            raise ValueError(
                f"adamw8bit_step: {name} must be contiguous, found strides {x.stride()} of {list(x.shape)}"
            )
    if first % 8:
        raise ValueError(f"adamw8bit_step: first must be a multiple of 8, found {first}")


@torch.no_grad()
def adamw8bit_step(
    param: Tensor,
    grad: Tensor,
    state1: Tensor,
    state2: Tensor,
    absmax1: Tensor,
    absmax2: Tensor,
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
    """AdamW (arXiv:1711.05101) with blockwise 8-bit moments (arXiv:2110.02861), in place and in one pass.

    Moments are read from their codes, updated in fp32, used, and written as the nearest codes under new scales. All
    tensors are contiguous and of one shape (but for the scales), on one device.

    Args:
        param: E elements, bf16 or fp32, updated. bf16 is rounded stochastically: up with the probability of the part
            cut off, by 16 bits of Philox-4x32-7 keyed by `seed`, with the element's global index and `step` as counter.
        grad: E elements, bf16, fp16 or fp32.
        state1, state2: codes of the first and second moment, uint8, updated: indices into `dynamic_map(True)` and
            `dynamic_map(False)`.
        absmax1, absmax2: [B] fp32, scale of each block of 256 elements, updated. All four as bitsandbytes' AdamW8bit
            keeps them under these names; zeros are the state before the first step.
        lr, beta1, beta2, eps, weight_decay: as torch.optim.AdamW's.
        step: number of this update, from 1.
        clip: fp32 scalar on the device that gradients are multiplied by.
        skip: scalar on the device; where it is not 0 nothing is changed: neither parameters, codes nor scales.
        seed: of the random bits, 0 ≤ seed < 2^63.
        first: index of this shard's first element in the whole tensor, a multiple of 8. Random bits do not depend on
            sharding; blocks of moments begin with the shard.
        impl: "auto", "triton" or "reference"; see `dispatch.use_triton`.

    Raises:
        ValueError: a dtype, size, stride or `first` that does not fit, or `impl` is not available here.

    Repeatable: the same bits on every run. Nothing is saved; nothing waits for the device.
    """
    tensors = [x for x in (param, grad, state1, state2, absmax1, absmax2, clip, skip) if x is not None]
    _check(param, grad, state1, state2, absmax1, absmax2, first)
    if not use_triton(impl, *tensors, name="adamw8bit_step"):
        adamw8bit_step_reference(
            param,
            grad,
            state1,
            state2,
            absmax1,
            absmax2,
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
        _adamw8bit_step_kernel,
        (triton.cdiv(absmax1.numel(), blocks),),
        param,
        grad,
        state1,
        state2,
        absmax1,
        absmax2,
        _codebook(param.device),
        clip,
        skip,
        param.numel(),
        seed,
        step,
        first,
        *_factors(lr, beta1, beta2, eps, weight_decay, step),
        CLIP=clip is not None,
        SKIP=skip is not None,
        BLOCKS=blocks,
        num_warps=warps,
    )


__all__ = ["BLOCK_SIZE", "adamw8bit_step", "adamw8bit_step_reference", "dynamic_map"]
