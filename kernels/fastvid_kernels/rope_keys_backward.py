"""The gradient of `rope_keys`, in one pass: from where segments read keys and values back to the packed rows.

Dimensions: N packed rows, M key rows, E = (H + 2K)·d columns of a row, H query heads, K key/value heads, A heads of a
row, d channels per head, h = d / 2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import launch, use_triton
from .plain import wide
from .rope_qk import cos_sin_of, halves, rope_qk_reference, turned_back
from .way_back import Twice

# Gradients of the second part's queries, keys and values, and where they belong.
SecondPart = tuple[tuple[Tensor, ...], Twice]


def rope_keys_backward_reference(
    grad_q_NHd: Tensor,
    grad_k_MKd: Tensor,
    grad_v_MKd: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    *,
    scale: float = 1.0,
    way_back: tuple[Tensor, Tensor] | None = None,
    more: SecondPart | None = None,
) -> Tensor:
    """`rope_keys_backward` in plain torch."""
    dtype, (q_NHd, *pairs) = grad_k_MKd.dtype, map(wide, (grad_q_NHd, grad_k_MKd, grad_v_MKd))
    if more is not None:
        (more_q_BHd, *others), (first_query, _, first_key, _) = more
        q_NHd = _added(q_NHd, more_q_BHd, first_query)
        pairs = [_added(x, other, first_key) for x, other in zip(pairs, others)]
    if way_back is not None:
        starts_N1, places = way_back
        own = torch.repeat_interleave(starts_N1.diff())
        pairs = [x.new_zeros(len(positions_N), *x.shape[1:]).index_add_(0, own, x[places]) for x in pairs]
    grad_NE = torch.cat([q_NHd, *pairs], 1).flatten(1)
    heads, kv_heads = grad_q_NHd.shape[1], grad_k_MKd.shape[1]
    return rope_qk_reference(grad_NE, -positions_N, inv_freq_h, heads, kv_heads, scale).to(dtype)


def _added(grad_NAd, more_BAd, first):
    """The second, from row `first` on, added to the first, which may end before it."""
    total_NAd = grad_NAd.new_zeros(max(len(grad_NAd), first + len(more_BAd)), *grad_NAd.shape[1:])
    total_NAd[: len(grad_NAd)] = grad_NAd
    total_NAd[first : first + len(more_BAd)] += more_BAd
    return total_NAd


def _tiles(heads, half):
    """(heads of a program's tile, warps): 16 pairs of channels a thread."""
    block = min(triton.next_power_of_2(max(heads, 1)), max(1024 // triton.next_power_of_2(half), 1))
    return block, min(max(block * triton.next_power_of_2(half) // 512, 1), 8)


@triton.jit
def sum_of_parts(
    ptr, stride, more_ptr, more_stride, place, keys, first, last, offsets, inside, half, TWICE: tl.constexpr
):
    """Both halves of heads of a row: of the first part's gradient, if it is one of `keys`, and of the second's, whose
    rows are those from `first` to before `last`."""
    if TWICE:
        first1, first2 = halves(ptr + place * stride, offsets, inside & (place < keys), half)
        more_ptr += (place - first) * more_stride
        second1, second2 = halves(more_ptr, offsets, inside & (place >= first) & (place < last), half)
        return first1 + second1, first2 + second2
    return halves(ptr + place * stride, offsets, inside, half)


@triton.jit(
    do_not_specialize=["keys", "first_query", "first_key", "last_key"],
    do_not_specialize_on_alignment=["positions_ptr", "starts_ptr", "places_ptr"],
)
def _collect_kernel(
    grad_q_ptr,
    grad_k_ptr,
    grad_v_ptr,
    more_q_ptr,
    more_k_ptr,
    more_v_ptr,
    grad_ptr,
    starts_ptr,
    places_ptr,
    positions_ptr,
    inv_freq_ptr,
    scale,
    q_stride,
    k_stride,
    v_stride,
    more_q_stride,
    more_k_stride,
    more_v_stride,
    keys,
    first_query,
    first_key,
    last_key,
    num_heads,
    kv_heads,
    half,
    Q_BLOCKS: tl.constexpr,
    KV_BLOCKS: tl.constexpr,
    GATHERED: tl.constexpr,
    TWICE: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_h: tl.constexpr,
):
    """A packed row's gradient: of queries, of keys summed over their places, both rotated back, of values summed."""
    BLOCKS: tl.constexpr = Q_BLOCKS + 2 * KV_BLOCKS
    program = tl.program_id(0)
    row = (program // BLOCKS).to(tl.int64)
    block = program % BLOCKS
    begin = row
    end = row + 1
    if block < Q_BLOCKS:
        source_ptr = grad_q_ptr
        stride = q_stride
        more_ptr = more_q_ptr
        more_stride = more_q_stride
        in_first = end
        begin_second = first_query.to(tl.int64)
        end_second = end
        head = block * BLOCK_A
        last = num_heads
        first_head = head
    else:
        if GATHERED:
            begin = tl.load(starts_ptr + row).to(tl.int64)
            end = tl.load(starts_ptr + row + 1).to(tl.int64)
        last = kv_heads
        in_first = keys.to(tl.int64)
        begin_second = first_key.to(tl.int64)
        end_second = last_key.to(tl.int64)
        if block < Q_BLOCKS + KV_BLOCKS:
            source_ptr = grad_k_ptr
            stride = k_stride
            more_ptr = more_k_ptr
            more_stride = more_k_stride
            head = (block - Q_BLOCKS) * BLOCK_A
            first_head = num_heads + head
        else:
            source_ptr = grad_v_ptr
            stride = v_stride
            more_ptr = more_v_ptr
            more_stride = more_v_stride
            head = (block - Q_BLOCKS - KV_BLOCKS) * BLOCK_A
            first_head = num_heads + kv_heads + head
    heads = tl.arange(0, BLOCK_A)
    channels = tl.arange(0, BLOCK_h)
    inside = (head + heads < last)[:, None] & (channels < half)[None, :]
    offsets = heads[:, None] * 2 * half + channels[None, :]
    first = tl.zeros((BLOCK_A, BLOCK_h), tl.float32)
    second = tl.zeros((BLOCK_A, BLOCK_h), tl.float32)
    for i in range(begin, end):
        place = i
        if GATHERED:
            if block >= Q_BLOCKS:
                place = tl.load(places_ptr + i).to(tl.int64)
        of_place = sum_of_parts(
            source_ptr + head * 2 * half,
            stride,
            more_ptr + head * 2 * half,
            more_stride,
            place,
            in_first,
            begin_second,
            end_second,
            offsets,
            inside,
            half,
            TWICE,
        )
        first += of_place[0]
        second += of_place[1]
    if block < Q_BLOCKS + KV_BLOCKS:
        cos, sin = cos_sin_of(positions_ptr + row, inv_freq_ptr, channels, half, scale)
        first, second = turned_back(first, second, cos, sin)
    grad_ptr += (row * (num_heads + 2 * kv_heads) + first_head) * 2 * half
    tl.store(grad_ptr + offsets, first.to(grad_ptr.dtype.element_ty), mask=inside)
    tl.store(grad_ptr + offsets + half, second.to(grad_ptr.dtype.element_ty), mask=inside)


@torch.no_grad()
def rope_keys_backward(
    grad_q_NHd: Tensor,
    grad_k_MKd: Tensor,
    grad_v_MKd: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    *,
    scale: float = 1.0,
    way_back: tuple[Tensor, Tensor] | None = None,
    more: SecondPart | None = None,
    impl: str = "auto",
) -> Tensor:
    """The gradient of `rope_keys`: that of attention, of keys and values summed over their places, rotated back.

    Args:
        grad_q_NHd: gradient of the queries [N, H, d]; H may be 0. fp32, bf16 or fp16.
        grad_k_MKd, grad_v_MKd: of the keys and values [M, K, d], in the same dtype.
        positions_N, inv_freq_h, scale: as for `rope_keys`.
        way_back: `starts_N1` and `places` of its way back; None: the packed rows in order.
        more: the same three of a second part of attention, where `rope_keys` was given `twice`; that comes with them.
            The first three are of the first part then.
        impl: "auto", "triton" or "reference" (plain torch).

    Returns:
        [N, E] in the dtype of the others, summed in fp32 and rounded once. Repeatable: places are summed in ascending
        order.

    Raises:
        ValueError: `impl` is unknown or cannot run here.
    """
    grads = grad_q_NHd, grad_k_MKd, grad_v_MKd
    others, twice = more or (grads, Twice(0, 0, 0, 0))
    if not use_triton(impl, *grads, *others, positions_N, inv_freq_h, *(way_back or ()), name="rope_keys_backward"):
        options = {"scale": scale, "way_back": way_back, "more": more}
        return rope_keys_backward_reference(*grads, positions_N, inv_freq_h, **options)
    grads, others = ([rows_of_heads(x) for x in each] for each in (grads, others))
    N, half, (num_heads, num_kv_heads) = positions_N.shape[0], inv_freq_h.shape[0], (x.shape[1] for x in grads[:2])
    grad_NE = grads[1].new_empty(N, (num_heads + 2 * num_kv_heads) * 2 * half)
    block, warps = _tiles(max(num_heads, num_kv_heads), half)
    q_blocks, kv_blocks = triton.cdiv(num_heads, block), triton.cdiv(num_kv_heads, block)
    if grad_NE.numel():
        starts_N1, places = way_back or (positions_N, positions_N)
        launch(
            _collect_kernel,
            (N * (q_blocks + 2 * kv_blocks),),
            *grads,
            *others,
            grad_NE,
            starts_N1,
            places,
            positions_N,
            inv_freq_h,
            scale,
            *(x.stride(0) for x in (*grads, *others)),
            twice.keys,
            twice.first_query,
            twice.first_key,
            twice.first_key + twice.shared,
            num_heads,
            num_kv_heads,
            half,
            q_blocks,
            kv_blocks,
            bool(way_back),
            more is not None,
            block,
            triton.next_power_of_2(half),
            num_warps=warps,
        )
    return grad_NE


def made_for(shapes: Sequence[Sequence[int]], grads: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    """Gradients of these shapes: zeros where nobody asked for any."""
    return tuple(like.new_zeros(shape) if x is None else x for x, shape in zip(grads, shapes))


def second_part(grads: Sequence[Tensor], twice: Twice | None) -> SecondPart | None:
    """The last three of six gradients, with where they belong; nothing without a second part."""
    return None if twice is None else (tuple(grads[3:6]), twice)


def rows_of_heads(x: Tensor) -> Tensor:
    """The same numbers with the heads of a row side by side, as a slice of wider rows may have them."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()


__all__ = [
    "SecondPart",
    "made_for",
    "rope_keys_backward",
    "rope_keys_backward_reference",
    "rows_of_heads",
    "second_part",
    "sum_of_parts",
]
