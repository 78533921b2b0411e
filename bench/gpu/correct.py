"""Whether kernels, attention, products and the optimizer compute what they must on this device, at production shapes.

Dimensions: N rows, M key rows, H query heads, K key/value heads, d channels per head.
"""

from dataclasses import replace
from itertools import pairwise

import torch
from fastvid_kernels.adamw8bit_step import adamw8bit_step, adamw8bit_step_reference

from bench import kernel_rows
from bench.measure import assert_agree, worst_error
from fastvid.batch import AttentionLayout, Branches
from fastvid.model.attention import choose_attention
from fastvid.model.quantize import Fp8Linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def kernel(small, name):
    """Every case of a kernel, forward and backward, against plain torch in fp32."""
    for case in kernel_rows.all_cases(small):
        if case.kernel != name:
            continue
        inputs = case.make(torch.Generator(DEVICE).manual_seed(0), DEVICE)
        expected = case.expected(*kernel_rows.clone(inputs))()
        found = case.ways["ours"](*inputs)()
        row = {"row": case.name, "error": worst_error(found, expected), "status": "ok"}
        try:
            assert_agree(found, expected, case.tolerance)
        except AssertionError as error:
            row |= {"status": "failed", "error": str(error)}
        yield row
        del inputs, expected, found
        if DEVICE == "cuda":
            torch.cuda.empty_cache()


LAYOUTS = {  # {name: [(queries, keys of the segment: None for its own rows, else a list of runs)]}
    "whole samples": [(830, None), (676, None), (1200, None), (64, None)],
    "longer keys": [(150, [(0, 60), (60, 900)]), (7, [(0, 60), (60, 90)]), (1, [(0, 33)]), (129, [(500, 130)])],
    "shared video": [
        (680, [(0, 30), (30, 680)]),
        (150, [(0, 710), (710, 150)]),
        (90, [(0, 710), (860, 90)]),
        (30, [(0, 710), (950, 30)]),
    ],
}
LAYOUTS["shared video, in parts"] = LAYOUTS["shared video"]


def attention(small, implementation, grouped=False):
    """Attention on segments of unequal lengths, gathered and shared keys, against fp64; errors beside eager's in
    bf16."""
    heads, kv_heads, width = (4, 2 if grouped else 4, 16) if small else (32, 8 if grouped else 32, 128)
    try:
        chosen = choose_attention(implementation, torch.device(DEVICE), torch.bfloat16, width)
    except ValueError as error:
        yield {"row": implementation, "status": "ok", "absent": str(error)}
        return
    for name, segments in LAYOUTS.items():
        layout, rows, constant = _layout(segments, small)
        generator = torch.Generator(DEVICE).manual_seed(0)
        q, k, v, grad = (
            torch.randn(n, h, width, generator=generator, device=DEVICE).bfloat16()
            for n, h in ((rows, heads), (rows, kv_heads), (rows, kv_heads), (rows, heads))
        )
        kept = tuple(
            torch.randn(constant, kv_heads, width, generator=generator, device=DEVICE).bfloat16() for _ in range(2)
        )

        def run(function, dtype):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
            out = function(*leaves, tuple(x.to(dtype) for x in kept))
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

        in_parts = name == "shared video, in parts"
        layout = layout.replaced(branches=_branches(layout, constant)) if in_parts else layout
        moved = layout.map(lambda tensor: tensor.to(DEVICE))
        options = {"constant": None} if not constant else {}
        ours = run(lambda q, k, v, c: chosen(q, k, v, moved, **({"constant": c} | options)), torch.bfloat16)
        exact = run(lambda q, k, v, c: plain_attention(q, k, v, layout, c), torch.float64)
        eager = run(lambda q, k, v, c: plain_attention(q, k, v, layout, c), torch.bfloat16)
        row = {"row": f"{implementation}, {name}{', grouped heads' if grouped else ''}", "status": "ok"}
        for part, a, b, true in zip(("out", "dq", "dk", "dv"), ours, eager, exact):
            error, allowed = (a.double() - true).abs().max().item(), (b.double() - true).abs().max().item()
            row |= {f"{part} error": error, f"{part} eager's": allowed}
            if not error <= 2 * allowed + 2**-8 * true.abs().max().item():
                row["status"] = "failed"
        yield row


def _layout(segments, small):
    """(AttentionLayout, packed rows, constant rows). Runs count constant rows first; small: a tenth of every length."""

    def size(n):
        return max(1, n // 10) if small else n

    queries = AttentionLayout.of_lengths([size(n) for n, _ in segments])
    rows = sum(size(n) for n, _ in segments)
    if all(runs is None for _, runs in segments):
        return queries, rows, 0
    constant = size(30)
    keys = []
    for _, runs in segments:
        found = torch.cat([torch.arange(size(length)) + size(start) * (start > 0) for start, length in runs])
        keys.append(found.clamp(max=rows + constant - 1))
    lengths = AttentionLayout.of_lengths([len(found) for found in keys])
    return (
        replace(queries, cu_seqlens_k=lengths.cu_seqlens_q, max_seqlen_k=lengths.max_seqlen_q, kv_rows=torch.cat(keys)),
        rows,
        constant,
    )


def _branches(layout, constant):
    """The segments behind the first one go on from it."""
    queries, (beginning, *_) = layout.lengths
    rows = torch.arange(constant + sum(queries))
    return Branches(
        AttentionLayout.of_lengths(queries, [beginning, *queries[1:]], rows),
        AttentionLayout.of_lengths([sum(queries[1:])], [beginning]),
        queries[0],
        0,
    )


def plain_attention(q_NHd, k_NKd, v_NKd, layout, constant):
    """Segment by segment, with the whole matrix of scores, in the inputs' dtype."""
    if layout.kv_rows is not None:
        rows = layout.kv_rows.to(q_NHd.device)
        k_NKd, v_NKd = (torch.cat([kept, own])[rows] for kept, own in zip(constant, (k_NKd, v_NKd)))
    k_MHd, v_MHd = (x.repeat_interleave(q_NHd.shape[1] // x.shape[1], 1) for x in (k_NKd, v_NKd))
    outs = []
    for (q0, q1), (k0, k1) in zip(pairwise(layout.cu_seqlens_q.tolist()), pairwise(layout.cu_seqlens_k.tolist())):
        scores = torch.einsum("qhd,khd->hqk", q_NHd[q0:q1], k_MHd[k0:k1]) * q_NHd.shape[-1] ** -0.5
        seen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool, device=q_NHd.device).tril((k1 - k0) - (q1 - q0))
        outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v_MHd[k0:k1]))
    return torch.cat(outs)


def adamw_8bit(small):
    """A step of 8-bit AdamW on the device, beside the plain step on the CPU: how many bits differ."""
    count = 2**12 if small else 2**22
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        tensors = [
            (0.02 * torch.randn(count, generator=generator)).to(dtype),
            (1e-3 * torch.randn(count, generator=generator)).to(dtype),
            *(torch.randint(256, (count,), generator=generator, dtype=torch.uint8) for _ in range(2)),
            *(scale * (0.5 + 0.5 * torch.rand(count // 256, generator=generator)) for scale in (1e-3, 1e-6)),
        ]
        options = {
            "lr": 1e-4,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "weight_decay": 0.01,
            "step": 10,
            "seed": 3,
            "first": 2**33,
        }
        there, before = [x.to(DEVICE, copy=True) for x in tensors], tensors[0].double()
        adamw8bit_step(*there, **options)
        adamw8bit_step_reference(*tensors, **options)
        found = [x.cpu() for x in there]
        row = {"row": f"{dtype}".removeprefix("torch.")}
        for place, name in (
            (0, "parameters"),
            (2, "first moments"),
            (3, "second moments"),
            (4, "first scales"),
            (5, "second scales"),
        ):
            row[f"{name} that differ"] = (found[place] != tensors[place]).float().mean().item()
        steps = max((found[place].int() - tensors[place].int()).abs().max().item() for place in (2, 3))
        apart = (found[0].double() - tensors[0].double()).abs()
        # bf16: a sum next to where the random bits turn it up or down. fp32: of what rounding the sum and a few
        # operations of the change, or of one of the learning rate's size, may come to.
        true, change = tensors[0].double().abs(), (tensors[0].double() - before).abs()
        allowed = 2**-7 * true if dtype == torch.bfloat16 else 2**-22 * true + 1e-5 * (change + options["lr"])
        error = (apart / allowed).max().item()
        row |= {"codes apart": steps, "largest error of what is allowed": error}
        yield row | {"status": "ok" if steps <= 1 and error <= 1 else "failed"}


def fp8_product(small):
    """A frozen matrix in FP8: products and row gradients on the device's FP8 units, against the CPU's emulation."""
    rows, inputs, outputs = (16, 32, 48) if small else (512, 4096, 11008)
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(outputs, inputs, generator=generator)
    x, g = (
        torch.randn(rows, inputs, generator=generator).bfloat16(),
        torch.randn(rows, outputs, generator=generator).bfloat16(),
    )
    found = {}
    for device in ("cpu", DEVICE):
        layer = Fp8Linear(inputs, outputs)
        layer.quantize_(weight.bfloat16().to(device))
        leaf = x.to(device).requires_grad_()
        y = layer(leaf)
        found[device] = [y.detach().cpu(), *(t.cpu() for t in torch.autograd.grad(y, leaf, g.to(device)))]
    exact = [x.float() @ weight.bfloat16().float().T, g.float() @ weight.bfloat16().float()]
    for name, ours, emulated, true in zip(("product", "gradient"), found[DEVICE], found["cpu"], exact):
        error = ((ours.float() - emulated.float()).norm() / emulated.float().norm()).item()
        yield {
            "row": name,
            "against the emulation": error,
            "status": "ok" if error <= 4e-3 else "failed",
            "against bf16": ((ours.float() - true).norm() / true.norm()).item(),
        }
