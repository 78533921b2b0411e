"""One step of AdamW with 8-bit moments, in one pass over a shard.

Dimensions: E elements of a shard, B = ceil(E / 256) blocks of moments that share a scale.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, use_triton

BLOCK_SIZE = 256
# Smallest scale that is divided by: the smallest normal fp32.
TINY = tl.constexpr(2.0**-126)
# Philox-4x32 (Salmon et al., SC 2011): the fewest rounds that pass every test there, multipliers, key increments.
ROUNDS = tl.constexpr(7)
MULTIPLIERS, INCREMENTS = (0xD2511F53, 0xCD9E8D57), (0x9E3779B9, 0xBB67AE85)


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


def random_bits(first, count, seed, step, device):
    """The bits that `adamw8bit_step` rounds with: 16 for each of the elements first … first + count - 1, [count] int32.

    Args:
        first, count: multiples of 8.
        seed, step: as for `adamw8bit_step`.
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


def _factors(lr, beta1, beta2, eps, weight_decay, step):
    """(decay of m, its unit, decay of v, its unit, factor of the weights, slope and offset of √v).

    Moments are computed in units of 1 - β, so that a gradient counts once. The weights then change by m times the
    square of 1/√(√v · slope + offset), which is cheaper than a division.
    """
    rest1, rest2 = 1 - beta1, 1 - beta2
    size = max(lr / (1 - beta1**step) * rest1, 1e-36)  # what m is multiplied by; never 0, by which to divide
    return (beta1 / rest1, rest1, beta2 / rest2, rest2, 1 - lr * weight_decay,
            (rest2 / (1 - beta2**step)) ** 0.5 / size, eps / size)


def adamw8bit_step_reference(param, grad, state1, state2, absmax1, absmax2, *, lr, beta1, beta2, eps, weight_decay,
                             step, clip=None, skip=None, seed=0, first=0):
    """`adamw8bit_step` in plain torch, whole tensors at a time."""
    count, blocks = param.numel(), absmax1.numel()

    def padded(x):
        """[B, 256] with zeros at the end."""
        return torch.nn.functional.pad(x.flatten(), (0, blocks * BLOCK_SIZE - count)).view(blocks, BLOCK_SIZE)

    decay1, unit1, decay2, unit2, keep, slope, offset = _factors(lr, beta1, beta2, eps, weight_decay, step)
    maps = [dynamic_map(signed, param.device) for signed in (True, False)]
    m, v = (padded(table[codes.long()]) * (absmax * decay)[:, None]
            for table, codes, absmax, decay in zip(maps, (state1, state2), (absmax1, absmax2), (decay1, decay2)))
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


def _tiles():
    """(blocks of moments a program updates, warps): 16 elements per thread, as many codes as one load brings."""
    return 8, 4


@functools.cache
def _codebook(device):
    """What the kernel looks up, [1536] fp32: the values of the signed and of the unsigned type, beginning with code
    128, since codes are read as signed bytes; their thresholds, that below a code in its place; and for either type the
    slopes and the offsets of `_code`'s lines.
    """
    maps = [dynamic_map(signed) for signed in (True, False)]
    bounds = [torch.cat([torch.tensor([-torch.inf]), (values[1:] + values[:-1]) / 2]) for values in maps]
    decade = (torch.arange(128, dtype=torch.float64) - 31).clamp(0, 6)
    lines = [line.float() for bins in (1, 2)
             for line in (bins * 1e6 / 0.9 * 5**-decade, bins * 8 / 9 * 2**decade - 0.475)]
    return torch.cat([*(values.roll(128) for values in maps), *bounds, *lines]).to(device)


@triton.jit
def _code(x, book_ptr, SIGNED: tl.constexpr):
    """Code of the dynamic type's value nearest to x in [-1, 1] or [0, 1]: as many thresholds lie below x.

    As a function of |x|, a code's distance from zero's is linear in each decade. The decade is guessed from the bits of
    |x|, nearly its logarithm; near a decade's end its neighbour's line serves too. The line, minus the middle of what
    it may err (-0.25 to 1.2), leaves two codes, which one threshold tells apart. NaN becomes some code.
    """
    TYPE: tl.constexpr = 0 if SIGNED else 1
    lines_ptr = book_ptr + (1024 + TYPE * 256) + tl.arange(0, 128)
    # Of all factors and multipliers, these guess the decades' ends best; 1e-7 is where the first begins.
    bits = (tl.abs(x) * 1.1466817 + 1.1466817e-7).to(tl.uint32, bitcast=True)
    decade = tl.umulhi(bits, 153).to(tl.int32)
    slope, offset = tl.gather(tl.load(lines_ptr), decade, 0), tl.gather(tl.load(lines_ptr + 128), decade, 0)
    if SIGNED:
        sign = x.to(tl.uint32, bitcast=True) & 0x80000000
        offset = (offset.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        upper = (x * slope + offset + 128.0).to(tl.int32)
    else:
        upper = (x * slope + offset).to(tl.int32)
    threshold = tl.gather(tl.load(book_ptr + (512 + TYPE * 256) + tl.arange(0, 256)), upper, 0)
    return tl.where(x <= threshold, upper - 1, upper)


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


@triton.jit
def _random_tile(first_group, seed, step, BLOCKS: tl.constexpr):
    """16 random bits for each element of a line of blocks: a Philox block serves eight elements."""
    group = first_group + tl.arange(0, BLOCKS * 32)
    zero = group.to(tl.uint32) * 0
    r0, r1, r2, r3 = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), zero + step.to(tl.uint32), zero,
                               n_rounds=ROUNDS)
    words = tl.reshape(tl.join(tl.join(r0, r2), tl.join(r1, r3)), (BLOCKS * 128,))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), (BLOCKS * 256,))


@triton.jit(do_not_specialize=["step", "seed", "first"])
def _adamw8bit_step_kernel(param_ptr, grad_ptr, state1_ptr, state2_ptr, absmax1_ptr, absmax2_ptr, book_ptr, clip_ptr,
                           skip_ptr, count, seed, step, first, decay1, unit1, decay2, unit2, keep, slope, offset,
                           CLIP: tl.constexpr, SKIP: tl.constexpr, BLOCKS: tl.constexpr):
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
    m = _times(tl.gather(tl.load(book_ptr + all_256), code1, 0), absmax1) + g
    v = _times(tl.gather(tl.load(book_ptr + 256 + all_256), code2, 0), absmax2) + g * g
    root = tl.rsqrt(tl.sqrt(v) * slope + offset)
    p = p * keep - m * root * root
    if param_ptr.dtype.element_ty == tl.bfloat16:
        bits = p.to(tl.uint32, bitcast=True) + _random_tile((first + start) // 8, seed, step, BLOCKS)
        tl.store(param_ptr + start + local, (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True), mask=inside)
    else:
        tl.store(param_ptr + start + local, p, mask=inside)

    absmax, inverse = _absmax(m, BLOCKS)
    tl.store(absmax1_ptr, absmax * unit1, mask=inside_block)
    tl.store(state1_ptr + start + local, _code(_times(m, inverse), book_ptr, SIGNED=True).to(tl.uint8), mask=inside)
    absmax, inverse = _absmax(v, BLOCKS)
    tl.store(absmax2_ptr, absmax * unit2, mask=inside_block)
    tl.store(state2_ptr + start + local, _code(_times(v, inverse), book_ptr, SIGNED=False).to(tl.uint8), mask=inside)


def _check(param, grad, state1, state2, absmax1, absmax2, first):
    """Raises ValueError for what the kernel would read or write past, or take for something else."""
    blocks, floats = triton.cdiv(param.numel(), BLOCK_SIZE), (torch.float32, torch.bfloat16, torch.float16)
    for name, x, count, dtypes in (
            ("param", param, param.numel(), floats[:2]), ("grad", grad, param.numel(), floats),
            ("state1", state1, param.numel(), (torch.uint8,)), ("state2", state2, param.numel(), (torch.uint8,)),
            ("absmax1", absmax1, blocks, floats[:1]), ("absmax2", absmax2, blocks, floats[:1])):
        if x.dtype not in dtypes:
            raise ValueError(f"adamw8bit_step: {name} must be {' or '.join(map(str, dtypes))}, found {x.dtype}")
        if x.numel() != count:
            raise ValueError(f"adamw8bit_step: {name} must have {count} elements for a param of {param.numel()}, "
                             f"found {x.numel()}")
        if not x.is_contiguous():
            raise ValueError(f"adamw8bit_step: {name} must be contiguous, found strides {x.stride()} of "
                             f"{list(x.shape)}")
    if first % 8:
        raise ValueError(f"adamw8bit_step: first must be a multiple of 8, found {first}")


@torch.no_grad()
def adamw8bit_step(param: Tensor, grad: Tensor, state1: Tensor, state2: Tensor, absmax1: Tensor, absmax2: Tensor, *,
                   lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
                   clip: Tensor | None = None, skip: Tensor | None = None, seed: int = 0, first: int = 0,
                   impl: str = "auto") -> None:
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
        adamw8bit_step_reference(param, grad, state1, state2, absmax1, absmax2, lr=lr, beta1=beta1, beta2=beta2,
                                 eps=eps, weight_decay=weight_decay, step=step, clip=clip, skip=skip, seed=seed,
                                 first=first)
        return
    if param.numel() == 0:
        return
    blocks, warps = _tiles()
    launch(
        _adamw8bit_step_kernel, (triton.cdiv(absmax1.numel(), blocks),),
        param, grad, state1, state2, absmax1, absmax2, _codebook(param.device), clip, skip, param.numel(), seed, step,
        first, *_factors(lr, beta1, beta2, eps, weight_decay, step), CLIP=clip is not None, SKIP=skip is not None,
        BLOCKS=blocks, num_warps=warps)


__all__ = ["BLOCK_SIZE", "adamw8bit_step", "adamw8bit_step_reference", "dynamic_map", "random_bits"]
