"""Rows of the kernels that lie between the decoder's matrix products.

Dimensions: N packed rows, D channels, F feed-forward channels, H heads of d channels. Shapes are LLaMA 7B's and 13B's.
"""

import torch
from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from fastvid_kernels.merge_parts import merge_parts, merge_parts_reference
from fastvid_kernels.quantize_fp8 import quantize_fp8, quantize_fp8_reference
from fastvid_kernels.rope_qk import rope_qk, rope_qk_reference
from fastvid_kernels.swiglu import swiglu, swiglu_reference

from bench.cases import Case, Gradients, forward, in_fp32, library, normal, ways_of, with_compiled

EPS, DTYPE = 1e-5, torch.bfloat16
TYPICAL = 6640  # rows of eight samples
BYTES = DTYPE.itemsize


def _norm_cases(N, D):
    shapes = {"N": N, "D": D, "dtype": "bfloat16"}
    functions = (
        with_compiled(
            {
                "ours": lambda residual, branch, weight: add_rms_norm(residual, branch, weight, EPS, DTYPE),
                "eager": lambda residual, branch, weight: add_rms_norm_reference(residual, branch, weight, EPS, DTYPE),
            }
        )
        | library("liger_kernel", "Liger", _liger_norm, triton=True)
        | library("quack", "quack", _quack_norm)
    )

    def reference(residual, branch, weight):
        return add_rms_norm_reference(residual, branch, weight, EPS, torch.float32)

    def of_rounded_sum(residual, branch, weight):
        """Liger rounds twice behind the sum; the sum's rounding, which all share, must not count as well."""
        return add_rms_norm_reference(residual + branch, None, weight, EPS, torch.float32)

    def inputs(generator, device):
        return (
            normal(generator, device, N, D),
            normal(generator, device, N, D),
            1 + normal(generator, device, D, scale=0.1),
        )

    def inputs_and_gradients(generator, device):
        incoming = normal(generator, device, N, D), normal(generator, device, N, D)
        return *inputs(generator, device), incoming

    # The weight is frozen: forward reads two tensors and writes two, backward reads three and writes one.
    yield Case(
        "add_rms_norm",
        "forward",
        shapes,
        inputs,
        ways_of(forward, functions),
        forward(of_rounded_sum),
        4 * N * D * BYTES,
    )
    yield Case(
        "add_rms_norm",
        "backward",
        shapes,
        inputs_and_gradients,
        ways_of(lambda function: Gradients(function, (0, 1)), functions),
        in_fp32(Gradients(reference, (0, 1))),
        4 * N * D * BYTES,
        looser={"Liger": 2**-6},
    )  # which also rounds the product of gradient and weight
    trained = {name: function for name, function in functions.items() if name in ("ours", "eager", "torch.compile")}
    yield Case(
        "add_rms_norm",
        "backward, trained",
        shapes,
        inputs_and_gradients,
        ways_of(lambda function: Gradients(function, (0, 1, 2)), trained),
        in_fp32(Gradients(reference, (0, 1, 2))),
        4 * N * D * BYTES,
    )


def _liger_norm():
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    def norm(residual, branch, weight):
        y, total = LigerFusedAddRMSNormFunction.apply(branch, residual, weight, EPS, 0.0, "llama", False)
        return total, y

    return norm


def _quack_norm():
    from quack import rmsnorm

    def norm(residual, branch, weight):
        y, total = rmsnorm(branch, weight, residual=residual, eps=EPS, prenorm=True)
        return total, y

    return norm


def _swiglu_cases(N, F):
    shapes = {"N": N, "F": F, "dtype": "bfloat16"}
    functions = with_compiled({"ours": swiglu, "eager": swiglu_reference})
    functions |= library("liger_kernel", "Liger", _liger_swiglu, triton=True)

    def inputs(generator, device):
        return (normal(generator, device, N, 2 * F),)

    yield Case(
        "swiglu",
        "forward",
        shapes,
        inputs,
        ways_of(forward, functions),
        in_fp32(forward(swiglu_reference)),
        3 * N * F * BYTES,
    )
    yield Case(
        "swiglu",
        "backward",
        shapes,
        lambda generator, device: (*inputs(generator, device), (normal(generator, device, N, F),)),
        ways_of(Gradients, functions),
        in_fp32(Gradients(swiglu_reference)),
        5 * N * F * BYTES,
    )


def _liger_swiglu():
    from liger_kernel.ops.swiglu import LigerFusedGateUpSiLUMulFunction

    return LigerFusedGateUpSiLUMulFunction.apply


def _rope_cases(N, H, d):
    shapes = {"N": N, "H": H, "d": d, "dtype": "bfloat16"}
    width = 3 * H * d

    def reference(qkv, positions, inv_freq):
        return rope_qk_reference(qkv, positions, inv_freq, H, H)

    functions = with_compiled(
        {"ours": lambda qkv, positions, inv_freq: rope_qk(qkv, positions, inv_freq, H, H), "eager": reference}
    )
    in_place = {
        **functions,
        "ours": lambda qkv, positions, inv_freq: rope_qk(qkv, positions, inv_freq, H, H, inplace=True),
    }

    def inputs(generator, device):
        return rope_inputs(generator, device, N, H, d)

    def inputs_and_gradient(generator, device):
        return *inputs(generator, device), (normal(generator, device, N, width),)

    def queries_and_keys(function):
        return lambda *inputs: function(*inputs)[:, : 2 * H * d].split(H * d, dim=1)

    ways = ways_of(forward, ways_of(queries_and_keys, in_place))
    ways |= library("liger_kernel", "Liger", lambda: _liger_rope(H, d), triton=True)
    ways |= library("quack", "quack", lambda: _quack_rope(H, d))
    # Forward in place: queries and keys only. Backward writes a gradient of its own, values' included.
    yield Case(
        "rope_qk",
        "forward",
        shapes,
        inputs,
        ways,
        in_fp32(forward(queries_and_keys(reference))),
        N * (2 * 2 * H * d * BYTES + 4),
    )
    yield Case(
        "rope_qk",
        "backward",
        shapes,
        inputs_and_gradient,
        ways_of(Gradients, functions),
        in_fp32(Gradients(reference)),
        N * (2 * width * BYTES + 4),
    )


def rope_inputs(generator, device, N, H, d):
    inv_freq = 10000.0 ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
    positions = torch.randint(2048, (N,), generator=generator, dtype=torch.int32, device=device)
    return normal(generator, device, N, 3 * H * d), positions, inv_freq


def _liger_rope(H, d):
    """With the cosines and sines of all rows at hand. It wants queries and keys apart: it copies them out of their
    rows."""
    from liger_kernel.ops.rope import LigerRopeFunction

    def prepare(qkv, positions, inv_freq):
        angles = (positions[:, None] * inv_freq).repeat(1, 2)[None]
        cos, sin = angles.cos(), angles.sin()
        q, k = (x.view(1, -1, H, d).transpose(1, 2) for x in qkv[:, : 2 * H * d].split(H * d, dim=1))

        def call():
            return tuple(x.transpose(1, 2).reshape(-1, H * d) for x in LigerRopeFunction.apply(q, k, cos, sin))

        return torch.no_grad()(call)

    return prepare


def _quack_rope(H, d):
    """In place, with the cosines and sines of all rows at hand."""
    from quack.rotary import apply_rotary_emb_qkv_

    def prepare(qkv, positions, inv_freq):
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()

        def call():
            apply_rotary_emb_qkv_(qkv[None], cos, sin, num_heads_q=H, headdim=d)
            return qkv[:, : 2 * H * d].split(H * d, dim=1)

        return torch.no_grad()(call)

    return prepare


def _merge_case(N, H, d):
    """Attention of branches to their own rows and to their beginning's; the first part is overwritten."""
    ours = {"ours": lambda *parts: merge_parts(*parts, inplace=True)}
    functions = ours | with_compiled({"eager": merge_parts_reference})

    def inputs(generator, device):
        outs = (normal(generator, device, N, H, d) for _ in range(2))
        sums = (normal(generator, device, H, N, dtype=torch.float32, scale=4.0) for _ in range(2))
        return tuple(x for part in zip(outs, sums) for x in part)

    return Case(
        "merge_parts",
        "forward",
        {"N": N, "H": H, "d": d, "dtype": "bfloat16"},
        inputs,
        ways_of(forward, functions),
        in_fp32(forward(merge_parts_reference)),
        3 * N * H * (d * BYTES + 4),
    )


def _fp8_case(N, D):
    functions = with_compiled({"ours": quantize_fp8, "eager": quantize_fp8_reference})
    return Case(
        "quantize_fp8",
        "by rows",
        {"N": N, "D": D, "dtype": "bfloat16"},
        lambda generator, device: (normal(generator, device, N, D),),
        ways_of(forward, functions),
        in_fp32(forward(quantize_fp8_reference)),
        N * D * (BYTES + 1) + 4 * N,
    )


def cases(small):
    if small:
        yield from _norm_cases(7, 40)
        yield from _swiglu_cases(5, 24)
        yield from _rope_cases(6, 2, 8)
        yield _merge_case(5, 2, 8)
        yield _fp8_case(7, 40)
        return
    for rows, width in ((16384, 4096), (16384, 5120), (TYPICAL, 4096)):
        yield from _norm_cases(rows, width)
    for rows, width in ((8192, 11008), (TYPICAL, 11008), (8192, 13824)):
        yield from _swiglu_cases(rows, width)
    for rows, heads in ((16384, 32), (TYPICAL, 32), (8192, 40)):
        yield from _rope_cases(rows, heads, 128)
    for rows, heads in ((16384, 32), (2700, 32)):  # the latter are questions of a micro-batch of shared videos
        yield _merge_case(rows, heads, 128)
    # residual stream, SwiGLU's output, its gradient
    for rows, width in ((65536, 4096), (16384, 11008), (TYPICAL, 22016)):
        yield _fp8_case(rows, width)
