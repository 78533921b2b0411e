"""Rotary embedding that puts keys and values where attention reads them: behind the rows that segments share.

Dimensions: N packed rows, M key rows, C constant rows, E = (H + 2K)·d columns of a row, H query heads, K key/value
heads, A heads of a row, d channels per head, h = d / 2.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .dispatch import launch, use_triton
from .plain import last_rows
from .rope_keys_backward import _tiles, made_for, rope_keys_backward, second_part
from .rope_qk import cos_sin_of, rope_qk_reference, rotate_heads
from .way_back import Twice, WayBack


def rope_keys_reference(
    qkv_NE: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    scale: float = 1.0,
    rows_M: Tensor | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
    twice: Twice | None = None,
) -> tuple[Tensor, ...]:
    """`rope_keys` in plain differentiable torch."""
    rows_NAd = rope_qk_reference(qkv_NE, positions_N, inv_freq_h, num_heads, num_kv_heads, scale).unflatten(
        1, (num_heads + 2 * num_kv_heads, -1)
    )
    q_NHd, k_NKd, v_NKd = rows_NAd.split([num_heads, num_kv_heads, num_kv_heads], 1)
    found = q_NHd, k_NKd, v_NKd
    if rows_M is not None:
        k_CKd, v_CKd = constant or (k_NKd[:0], v_NKd[:0])
        found = q_NHd, torch.cat([k_CKd, k_NKd])[rows_M], torch.cat([v_CKd, v_NKd])[rows_M]
    return found if twice is None else twice.split(*found)


@triton.jit(do_not_specialize=["C", "query_programs"], do_not_specialize_on_alignment=["positions_ptr", "rows_ptr"])
def _place_keys_kernel(
    qkv_ptr,
    q_ptr,
    constant_k_ptr,
    constant_v_ptr,
    k_ptr,
    v_ptr,
    rows_ptr,
    positions_ptr,
    inv_freq_ptr,
    scale,
    C,
    query_programs,
    num_heads,
    kv_heads,
    q_heads,
    half,
    Q_BLOCKS: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_h: tl.constexpr,
):
    """First queries of the packed rows, rotated, in place or not. Then keys, and values, of a key row: copied if it is
    constant, else from its packed row, keys rotated."""
    program = tl.program_id(0)
    row_heads = num_heads + 2 * kv_heads
    if program < query_programs:
        row = (program // Q_BLOCKS).to(tl.int64)
        head = program % Q_BLOCKS * BLOCK_A
        last = num_heads
        source_ptr = qkv_ptr + row * row_heads * 2 * half
        out_ptr = q_ptr + row * q_heads * 2 * half
        turns = row >= 0
    else:
        place = ((program - query_programs) // (2 * BLOCKS)).to(tl.int64)
        block = (program - query_programs) % (2 * BLOCKS)
        head = block % BLOCKS * BLOCK_A
        last = kv_heads
        if block >= BLOCKS:
            constant_ptr = constant_v_ptr
            out_ptr = v_ptr
            first_head = num_heads + kv_heads
        else:
            constant_ptr = constant_k_ptr
            out_ptr = k_ptr
            first_head = num_heads
        row = tl.load(rows_ptr + place) - C
        if row < 0:
            source_ptr = constant_ptr + (row + C) * kv_heads * 2 * half
        else:
            source_ptr = qkv_ptr + (row * row_heads + first_head) * 2 * half
        out_ptr += place * kv_heads * 2 * half
        turns = (row >= 0) & (block < BLOCKS)
    heads = head + tl.arange(0, BLOCK_A)
    channels = tl.arange(0, BLOCK_h)
    inside = (heads < last)[:, None] & (channels < half)[None, :]
    offsets = heads[:, None] * 2 * half + channels[None, :]
    first = tl.load(source_ptr + offsets, mask=inside).to(tl.float32)
    second = tl.load(source_ptr + offsets + half, mask=inside).to(tl.float32)
    if turns:
        cos, sin = cos_sin_of(positions_ptr + row, inv_freq_ptr, channels, half, scale)
        turned = first * cos - second * sin
        second = second * cos + first * sin
        first = turned
    tl.store(out_ptr + offsets, first.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + offsets + half, second.to(out_ptr.dtype.element_ty), mask=inside)


def place_keys(
    qkv_NE: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    rows_M: Tensor,
    constant: tuple[Tensor, Tensor] | None,
    *,
    queries_NX: Tensor | None = None,
) -> Tensor:
    """Keys and values [2, M, K, d] of `rope_keys`, by the kernel; keys in `qkv_NE` are not rotated yet. All
    contiguous.

    Args:
        queries_NX: receives the rotated queries in the same launch: `qkv_NE` itself, or rows of H heads or more.
    """
    half = inv_freq_h.shape[0]
    assert all(x.is_contiguous() for x in (qkv_NE, positions_N, inv_freq_h, rows_M, *(constant or ())))
    out_2MKd = qkv_NE.new_empty(2, rows_M.shape[0], num_kv_heads, 2 * half)
    k_CKd, v_CKd = constant or (out_2MKd[0, :0], out_2MKd[1, :0])
    heads = 0 if queries_NX is None else num_heads
    block, warps = _tiles(max(heads, num_kv_heads), half)
    q_blocks, blocks = triton.cdiv(heads, block), triton.cdiv(num_kv_heads, block)
    queries = qkv_NE.shape[0] * q_blocks
    programs = queries + rows_M.shape[0] * 2 * blocks
    queries_NX = qkv_NE if queries_NX is None else queries_NX
    assert queries_NX.is_contiguous()
    if programs:
        launch(
            _place_keys_kernel,
            (programs,),
            qkv_NE,
            queries_NX,
            k_CKd,
            v_CKd,
            *out_2MKd,
            rows_M,
            positions_N,
            inv_freq_h,
            scale,
            k_CKd.shape[0],
            queries,
            num_heads,
            num_kv_heads,
            queries_NX.shape[1] // (2 * half),
            half,
            max(q_blocks, 1),
            blocks,
            block,
            triton.next_power_of_2(half),
            num_warps=warps,
        )
    return out_2MKd


class _RopeKeys(torch.autograd.Function):
    """Saves positions, frequencies and the way back to packed rows."""

    @staticmethod
    def forward(
        ctx,
        qkv_NE,
        positions_N,
        inv_freq_h,
        num_heads,
        num_kv_heads,
        scale,
        rows_M,
        way_back,
        constant,
        inplace,
        every,
        twice,
    ):
        heads, d = num_heads + 2 * num_kv_heads, 2 * inv_freq_h.shape[0]
        ctx.scale, live = scale, len(qkv_NE)
        ctx.save_for_backward(
            positions_N[len(positions_N) - live :],
            inv_freq_h,
            *((way_back.starts_N1, way_back.places) if way_back else ()),
        )
        qkv_NE, live_keys = every or (qkv_NE, None)
        if rows_M is not None:  # keys stay as they are, and go to their places from there
            rotated = written = num_heads
        else:
            rotated, written = num_heads + num_kv_heads, heads
        if inplace:
            torch.autograd.graph.increment_version(qkv_NE)  # so that autograd sees that it is overwritten
            out_NX, written = qkv_NE, rotated
        else:
            out_NX = qkv_NE.new_empty(qkv_NE.shape[0], written * d)
        # Not as views that autograd follows: their gradients come back to this function.
        rows_NAd = out_NX.detach().view(len(out_NX), out_NX.shape[1] // d, d)
        if rows_M is None:
            rotate_heads(qkv_NE, out_NX, positions_N, inv_freq_h, scale, rotated, written)
            found = rows_NAd.split([num_heads, num_kv_heads, num_kv_heads], 1)
        else:
            settings = positions_N, inv_freq_h, num_heads, num_kv_heads, scale
            k_MKd, v_MKd = place_keys(qkv_NE, *settings, rows_M, constant, queries_NX=out_NX)
            found = rows_NAd[:, :num_heads], k_MKd, v_MKd
        ctx.twice, outs = twice, found
        if live_keys is not None:
            outs = [last_rows(x, count) for x, count in zip(found, (live, live_keys, live_keys))]
            ctx.mark_non_differentiable(*found)
        if twice is not None:
            outs = [x.data for x in twice.split(*outs)]
        if live_keys is None and twice is None:
            return tuple(outs)
        ctx.set_materialize_grads(False)
        ctx.shapes = [x.shape for x in outs]
        return *outs, *(() if live_keys is None else found)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        positions_N, inv_freq_h, *way_back = ctx.saved_tensors
        grads = grads[: 3 if ctx.twice is None else 6]  # no zeros were made of those of all rows
        if any(x is None for x in grads):
            some = next((x for x in grads if x is not None), None)
            if some is None:
                return (None,) * 12
            grads = made_for(ctx.shapes, grads, some)
        more = second_part(grads, ctx.twice)
        options = {"scale": ctx.scale, "way_back": tuple(way_back) or None, "more": more, "impl": "triton"}
        grad_NE = rope_keys_backward(*grads[:3], positions_N, inv_freq_h, **options)
        return grad_NE, *[None] * 11


def rope_keys(
    qkv_NE: Tensor,
    positions_N: Tensor,
    inv_freq_h: Tensor,
    num_heads: int,
    num_kv_heads: int,
    *,
    scale: float = 1.0,
    rows_M: Tensor | None = None,
    way_back: WayBack | None = None,
    constant: tuple[Tensor, Tensor] | None = None,
    inplace: bool = False,
    every: tuple[Tensor, int] | None = None,
    twice: Twice | None = None,
    impl: str = "auto",
) -> tuple[Tensor, ...]:
    """Queries rotated where they lie; keys rotated and values copied to where segments read them (arXiv:2104.09864).

    One pass each way: forward reads the product of the QKV projection and writes what attention reads; backward reads
    attention's gradients and writes that product's, in which a row's keys sum over their places.

    Args:
        qkv_NE: [N, (H+2K)·d] contiguous queries, keys, values of each row; fp32, bf16 or fp16.
        positions_N: [N] int32 or int64.
        inv_freq_h: [d/2] fp32, radians per position. Angles, their product rounded to fp32, are at most 200,000.
        num_heads, num_kv_heads: H (which may be 0), K.
        scale: factor on cosine and sine (YaRN's attention factor).
        rows_M: [M] int64, the row that each key is: constant rows first, then the packed ones. Not checked, since the
            host would have to wait for the GPU. None: the packed rows in order.
        way_back: of `rows_M`.
        constant: keys, rotated, and values [C, K, d] that `rows_M` counts before the packed rows; they get no gradient.
        inplace: write into `qkv_NE`, which must be nobody's saved tensor. With `rows_M` its keys stay as they were, so
            that `place_keys` can make the same rows of keys again.
        every: (`qkv_NE` with rows before it, which get no gradient; how many keys get one, the last of M). One pass
            takes all. `positions_N` and `rows_M` are of all rows; `way_back` is of the last rows and the last keys
            alone, and counts from the first of these.
        twice: attention reads these rows in two parts: they are returned for each of them, and the gradients of both
            are added in fp32, in the same pass. Counts rows and keys that get gradients.
        impl: "auto", "reference" (plain torch) or "triton".

    Returns:
        (q [N, H, d], k and v [M, K, d]; [N, K, d] without `rows_M`), computed in fp32 and rounded once. With `every`,
        those that get gradients, then all three of all rows without gradient. With `twice`, instead of those that get
        gradients, those of the first part, then those of the second, in the same memory. Saved for
        backward: positions, frequencies and `way_back`. Repeatable: places are summed in ascending order, in fp32.

    Raises:
        ValueError: shapes or dtypes do not fit, `inplace` on rows that are not contiguous, `impl` is unknown or cannot
            run here.
    """
    _check(qkv_NE, positions_N, 2 * inv_freq_h.shape[0], num_heads, num_kv_heads, rows_M, way_back, constant, every)
    if inplace and not qkv_NE.is_contiguous():
        raise ValueError(f"rope_keys: in place needs contiguous rows, found strides {qkv_NE.stride()}")
    indices = () if rows_M is None or way_back is None else (rows_M, way_back.starts_N1, way_back.places)
    if not use_triton(impl, qkv_NE, positions_N, inv_freq_h, *indices, *(constant or ()), name="rope_keys"):
        settings = positions_N, inv_freq_h, num_heads, num_kv_heads
        options = {"scale": scale, "rows_M": rows_M, "constant": constant}
        if every is None:
            return rope_keys_reference(qkv_NE, *settings, **options, twice=twice)
        before = len(every[0]) - len(qkv_NE)
        found = rope_keys_reference(torch.cat([every[0][:before].detach(), qkv_NE]), *settings, **options)
        last = [x[len(x) - count :] for x, count in zip(found, (len(qkv_NE), every[1], every[1]))]
        last = last if twice is None else twice.split(*last)
        return *last, *(x.detach() for x in found)
    if constant is not None:
        k_CKd, v_CKd = constant
        constant = k_CKd.detach().contiguous(), v_CKd.detach().contiguous()
    if every is not None:
        assert every[0].is_contiguous(), "its last rows would be copied"
    return _RopeKeys.apply(
        qkv_NE.contiguous(),
        positions_N.contiguous(),
        inv_freq_h.contiguous(),
        num_heads,
        num_kv_heads,
        scale,
        rows_M,
        way_back,
        constant,
        inplace,
        every,
        twice,
    )


def _check(qkv_NE, positions_N, d, num_heads, num_kv_heads, rows_M, way_back, constant, every):
    """Raise ValueError unless everything fits."""
    live = qkv_NE.shape[0]
    if every is not None:
        qkv_NE = every[0]
    N = qkv_NE.shape[0]
    if qkv_NE.shape != (N, (num_heads + 2 * num_kv_heads) * d) or positions_N.shape != (N,):
        raise ValueError(
            f"rope_keys: rows {list(qkv_NE.shape)} and positions {list(positions_N.shape)} do not fit "
            f"{num_heads} + 2·{num_kv_heads} heads of {d} channels"
        )
    if (rows_M is None) != (way_back is None):
        raise ValueError("rope_keys: rows_M and way_back go together")
    if way_back is not None and way_back.starts_N1.shape != (live + 1,):
        raise ValueError(f"rope_keys: the way back is for {way_back.starts_N1.shape[0] - 1} packed rows, found {live}")
    expected = 0 if way_back is None else way_back.constant_rows - (N - live)
    for x in constant or (qkv_NE.new_empty(0, num_kv_heads, d),):
        if x.shape != (expected, num_kv_heads, d) or x.dtype != qkv_NE.dtype:
            raise ValueError(
                f"rope_keys: constant keys and values must be [{expected}, {num_kv_heads}, {d}] in "
                f"{qkv_NE.dtype}, found {list(x.shape)} in {x.dtype}"
            )


__all__ = ["place_keys", "rope_keys", "rope_keys_reference"]
