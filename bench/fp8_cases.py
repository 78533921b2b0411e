"""Rows of the kernels that write e4m3 rows themselves, for the FP8 product behind them.

Beside each: eager torch, and our two kernels one after the other, of which the second quantises ("apart").

Dimensions: N packed rows, D channels, F feed-forward channels, H heads of d channels. Shapes are LLaMA 7B's and 13B's.
"""

import torch
from fastvid_kernels.add_rms_norm import (
    add_rms_norm,
    add_rms_norm_fp8,
    add_rms_norm_fp8_reference,
    add_rms_norm_reference,
)
from fastvid_kernels.quantize_fp8 import BackInFp8, quantize_fp8, quantize_fp8_reference
from fastvid_kernels.rope_keys import rope_keys
from fastvid_kernels.rope_keys_fp8 import rope_keys_backward_fp8, rope_keys_backward_fp8_reference
from fastvid_kernels.swiglu import (
    swiglu,
    swiglu_backward_fp8,
    swiglu_backward_fp8_reference,
    swiglu_fp8,
    swiglu_fp8_reference,
)

from bench.cases import Case, forward, normal

EPS, DTYPE = 1e-5, torch.bfloat16
TYPICAL = 6640  # rows of eight samples
JOB = " to e4m3"
# What is quantised was rounded to bf16: where that falls to the other side, e4m3's neighbour is as good.
STEP = 2**-3


def _case(kernel, job, shapes, inputs, ways, reference, size):
    """`reference` is eager torch, on the same rounded inputs as all ways."""
    functions = {name: forward(way) if callable(way) else way[0] for name, way in ways.items()}
    eager = functions["eager"] = forward(reference)
    return Case(kernel, job, shapes | {"dtype": "bfloat16"}, inputs, functions, eager, size, tolerance=STEP)


def _gradients(make):
    """Way of timing a backward alone. `make`: inputs → (outputs, leaves, gradients, what is done with the result)."""

    def prepare(*inputs):
        outputs, leaves, incoming, finish = make(*inputs)

        def call():
            return finish(*torch.autograd.grad(outputs, leaves, incoming))

        return call

    return (prepare,)


def _norm_cases(N, D):
    def inputs(generator, device):
        rows = [normal(generator, device, N, D) for _ in range(2)]
        return *rows, 1 + normal(generator, device, D, scale=0.1)

    def with_gradients(generator, device):
        return *inputs(generator, device), *(normal(generator, device, N, D) for _ in range(2))

    def ours(residual, branch, weight):
        total, rows = add_rms_norm_fp8(residual, branch, weight, EPS, DTYPE)
        return total, rows.bits_ND, rows.scale_N

    def apart(residual, branch, weight):
        total, y = add_rms_norm(residual, branch, weight, EPS, DTYPE)
        return total, *quantize_fp8(y)

    def reference(residual, branch, weight):
        total, rows = add_rms_norm_fp8_reference(residual, branch, weight, EPS, DTYPE)
        return total, rows.bits_ND, rows.scale_N

    def back(residual, branch, weight, *incoming):
        stand_ins = [x.detach().requires_grad_() for x in BackInFp8.of(branch)[1:]]
        leaf = residual.detach().requires_grad_()
        outputs = add_rms_norm(leaf, BackInFp8(branch, *stand_ins), weight, EPS, DTYPE)
        return outputs, (leaf, *stand_ins), incoming, lambda *grads: grads

    def back_apart(residual, branch, weight, *incoming):
        leaves = residual.detach().requires_grad_(), branch.detach().requires_grad_()
        outputs = add_rms_norm(*leaves, weight, EPS, DTYPE)
        return outputs, leaves, incoming, lambda grad, grad_branch: (grad, *quantize_fp8(grad_branch))

    def back_reference(residual, branch, weight, *incoming):
        with torch.enable_grad():
            leaves = residual.detach().requires_grad_(), branch.detach().requires_grad_()
            outputs = add_rms_norm_reference(*leaves, weight, EPS, DTYPE)
            grad, grad_branch = torch.autograd.grad(outputs, leaves, incoming)
        return grad, *quantize_fp8_reference(grad_branch)

    shapes = {"N": N, "D": D}
    yield _case(
        "add_rms_norm", "forward" + JOB, shapes, inputs, {"ours": ours, "apart": apart}, reference, N * (7 * D + 4)
    )
    yield _case(
        "add_rms_norm",
        "backward" + JOB,
        shapes,
        with_gradients,
        {"ours": _gradients(back), "apart": _gradients(back_apart)},
        back_reference,
        N * (9 * D + 4),
    )


def _swiglu_cases(N, F):
    def inputs(generator, device):
        return (normal(generator, device, N, 2 * F),)

    def with_gradient(generator, device):
        return *inputs(generator, device), normal(generator, device, N, F)

    def back_apart(gate_up, incoming):
        leaf = gate_up.detach().requires_grad_()
        return swiglu(leaf), (leaf,), (incoming,), quantize_fp8

    shapes = {"N": N, "F": F}
    forwards = {"ours": swiglu_fp8, "apart": lambda gate_up: quantize_fp8(swiglu(gate_up))}
    yield _case("swiglu", "forward" + JOB, shapes, inputs, forwards, swiglu_fp8_reference, N * (5 * F + 4))
    yield _case(
        "swiglu",
        "backward" + JOB,
        shapes,
        with_gradient,
        {"ours": swiglu_backward_fp8, "apart": _gradients(back_apart)},
        swiglu_backward_fp8_reference,
        N * (8 * F + 4),
    )


def _keys_case(N, H, d):
    def inputs(generator, device):
        inv_freq = 10000.0 ** (-torch.arange(0, d, 2, device=device, dtype=torch.float32) / d)
        positions = torch.randint(2048, (N,), generator=generator, dtype=torch.int32, device=device)
        return *(normal(generator, device, N, H, d) for _ in range(3)), positions, inv_freq

    def apart(*inputs):
        *incoming, positions, inv_freq = inputs
        leaf = incoming[0].new_zeros(N, 3 * H * d, requires_grad=True)
        return rope_keys(leaf, positions, inv_freq, H, H), (leaf,), tuple(incoming), quantize_fp8

    ways = {"ours": rope_keys_backward_fp8, "apart": _gradients(apart)}
    size = N * (9 * H * d + 4)
    return _case(
        "rope_keys", "backward" + JOB, {"N": N, "H": H, "d": d}, inputs, ways, rope_keys_backward_fp8_reference, size
    )


def cases(small):
    if small:
        yield from _norm_cases(7, 40)
        yield from _swiglu_cases(5, 24)
        yield _keys_case(6, 2, 8)
        return
    for channels in (4096, 5120):
        yield from _norm_cases(TYPICAL, channels)
    for channels in (11008, 13824):
        yield from _swiglu_cases(TYPICAL, channels)
    for heads in (32, 40):
        yield _keys_case(TYPICAL, heads, 128)
