"""Whether what runs on this device computes what it must, at production shapes.

Dimensions: N rows, M key rows, H query heads, K key/value heads, d channels per head.
"""

import json
import os
import tempfile
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import kernel_rows
from bench.measure import assert_agree, worst_error

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
    "shared video": [(676, [(0, 34), (34, 676)]), (150, [(0, 710), (710, 150)]), (90, [(0, 710), (860, 90)]),
                     (33, [(0, 710), (950, 33)])],
}


def attention(small, implementation, grouped=False):
    """`attend` on segments of unequal lengths, gathered and shared keys, against fp64; errors beside eager's in bf16."""
    from fastvid.model.attention import attend, choose_implementation

    heads, kv_heads, width = (4, 2 if grouped else 4, 16) if small else (32, 8 if grouped else 32, 128)
    try:
        choose_implementation(implementation, torch.device(DEVICE), torch.bfloat16, width)
    except ValueError as error:
        yield {"row": implementation, "status": "ok", "absent": str(error)}
        return
    for name, segments in LAYOUTS.items():
        layout, rows, constant = _layout(segments, small)
        generator = torch.Generator(DEVICE).manual_seed(0)
        q, k, v, grad = (torch.randn(n, h, width, generator=generator, device=DEVICE).bfloat16() for n, h in (
            (rows, heads), (rows, kv_heads), (rows, kv_heads), (rows, heads)))
        kept = tuple(torch.randn(constant, kv_heads, width, generator=generator, device=DEVICE).bfloat16() for _ in range(2))

        def run(function, dtype):
            leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
            out = function(*leaves, tuple(x.to(dtype) for x in kept))
            return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]

        moved = layout.map(lambda tensor: tensor.to(DEVICE))
        options = {"constant": None} if not constant else {}
        ours = run(lambda q, k, v, c: attend(q, k, v, moved, implementation, **({"constant": c} | options)), torch.bfloat16)
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
    from dataclasses import replace

    from fastvid.batch import AttentionLayout

    def size(n):
        return max(1, n // 10) if small else n

    queries = AttentionLayout.of_lengths([size(n) for n, _ in segments])
    rows = sum(size(n) for n, _ in segments)
    if all(runs is None for _, runs in segments):
        return queries, rows, 0
    constant = size(34)
    keys = []
    for _, runs in segments:
        found = torch.cat([torch.arange(size(length)) + size(start) * (start > 0) for start, length in runs])
        keys.append(found.clamp(max=rows + constant - 1))
    lengths = AttentionLayout.of_lengths([len(found) for found in keys])
    return replace(queries, cu_seqlens_k=lengths.cu_seqlens_q, max_seqlen_k=lengths.max_seqlen_q,
                   kv_rows=torch.cat(keys)), rows, constant


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
    from fastvid_kernels.adamw8bit_step import adamw8bit_step, adamw8bit_step_reference

    count = 2**12 if small else 2**22
    for dtype in (torch.float32, torch.bfloat16):
        generator = torch.Generator().manual_seed(0)
        tensors = [(0.02 * torch.randn(count, generator=generator)).to(dtype),
                   (1e-3 * torch.randn(count, generator=generator)).to(dtype),
                   *(torch.randint(256, (count,), generator=generator, dtype=torch.uint8) for _ in range(2)),
                   *(scale * (0.5 + 0.5 * torch.rand(count // 256, generator=generator)) for scale in (1e-3, 1e-6))]
        options = dict(lr=1e-4, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.01, step=10, seed=3, first=2**33)
        there = [x.to(DEVICE, copy=True) for x in tensors]
        adamw8bit_step(*there, **options)
        adamw8bit_step_reference(*tensors, **options)
        found = [x.cpu() for x in there]
        row = {"row": f"{dtype}".removeprefix("torch.")}
        for place, name in ((0, "parameters"), (2, "first moments"), (3, "second moments"), (4, "first scales"), (5, "second scales")):
            row[f"{name} that differ"] = (found[place] != tensors[place]).float().mean().item()
        steps = max((found[place].int() - tensors[place].int()).abs().max().item() for place in (2, 3))
        error = ((found[0].double() - tensors[0].double()).abs() / tensors[0].double().abs().clamp(min=1e-6)).max().item()
        row |= {"codes apart": steps, "relative error": error}
        limit = 2**-7 if dtype == torch.bfloat16 else 1e-5
        yield row | {"status": "ok" if steps <= 1 and error <= limit else "failed"}


def fp8_product(small):
    """A frozen matrix in FP8: products and row gradients on the device's FP8 units, against the CPU's emulation."""
    from fastvid.model.quantize import Fp8Linear

    rows, inputs, outputs = (16, 32, 48) if small else (512, 4096, 11008)
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(outputs, inputs, generator=generator)
    x, g = torch.randn(rows, inputs, generator=generator).bfloat16(), torch.randn(rows, outputs, generator=generator).bfloat16()
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
        yield {"row": name, "against the emulation": error, "status": "ok" if error <= 4e-3 else "failed",
               "against bf16": ((ours.float() - true).norm() / true.norm()).item()}


def reference_steps(small):
    """The five steps that were recorded of the reference: losses, gradient norms, parameters."""
    folder = Path(os.environ.get("FASTVID_REFERENCE_DATA") or Path(__file__).resolve().parents[3] / "shared")
    if not (folder / "golden").is_dir():
        yield {"row": "recordings", "status": "ok", "absent": f"no recordings at {folder} (FASTVID_REFERENCE_DATA)"}
        return
    import importlib.util

    from safetensors.torch import load_file

    from fastvid import checkpoint, train
    from fastvid.metrics import read_metrics

    with tempfile.TemporaryDirectory() as made:
        spec = importlib.util.spec_from_file_location("tiny", folder / "golden" / "tiny.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(made)
        recorded = json.loads((folder / "golden" / "model.json").read_text())["train"]["runs"]["336_main_r0"]
        argv, output = [word.replace("WORK", made) for word in recorded["argv"]], Path(made) / "out"
        argv[argv.index("--output_dir") + 1] = str(output)
        argv[argv.index("--save_strategy") + 1] = "steps"
        code = train.main([*argv, "--parity", "reference", "--save_steps", "1"])
        lines = read_metrics(output / "metrics.jsonl")
        tensors, worst = load_file(folder / "golden" / "model.safetensors"), 0.0
        for step in range(1, 6):
            trained, prefix = checkpoint.read_full(output / f"checkpoint-{step}", "model"), f"336/train_main/after_step{step}/"
            for name in (name for name in tensors if name.startswith(prefix)):
                short = name.removeprefix(prefix).removeprefix("model.mm_projector.")
                ours = "boundary.weight" if "embed" in short else f"projector.{short}"
                worst = max(worst, (trained[ours] - tensors[name]).abs().max().item())
        loss = max(abs(line["loss"] - true) for line, true in zip(lines, recorded["losses"], strict=True))
        norm = max(abs(line["grad_norm"] / true - 1) for line, true in zip(lines, recorded["total_norm"], strict=True))
        right = code == 0 and loss <= 1e-5 and norm <= 1e-5 and worst <= 1e-7
        yield {"row": "five steps", "loss error": loss, "norm error": norm, "parameter error": worst,
               "status": "ok" if right else "failed"}


def one_rank_sharded(small):
    """Full and adapter training under FSDP2 with a process group of one rank, beside the same without one."""
    from bench import train_data
    from bench.train_presets import PRESETS
    from fastvid import parallel, train
    from fastvid.config import TrainConfig, parse

    with tempfile.TemporaryDirectory() as made:
        train_data.write(made, PRESETS["tiny"].shape, 2)
        losses = {}
        for distributed in (False, True):
            if distributed:
                os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
                               "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
            world = parallel.start()
            for name, flags in (("adapter", ("--tune_mm_mlp_adapter", "True")), ("full", ())):
                state = train.build(parse(TrainConfig, [
                    "--model_name_or_path", f"{made}/model", "--data_path", f"{made}/train.json", "--video_folder",
                    f"{made}/feats", "--output_dir", f"{made}/out", "--mm_use_vid_start_end", "--bf16", "True", *flags,
                    "--max_steps", "3", "--learning_rate", "1e-3", "--per_device_train_batch_size", "4",
                    "--dataloader_num_workers", "0", "--shard", "full" if distributed else "none"]), world)
                found = [train.train_step(state, batches).loss.item() for _, batches in state.loader.iterate()]
                losses[name, distributed] = found
        for name in ("adapter", "full"):
            error = max(abs(a / b - 1) for a, b in zip(losses[name, True], losses[name, False], strict=True))
            yield {"row": f"{name}, three steps", "losses": losses[name, True], "relative error": error,
                   "status": "ok" if error <= 2e-3 else "failed"}
        parallel.finish(world)


def _free_port():
    import socket

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def extraction(small):
    """Features of random frames on the device, in fp16 and bf16, against the CPU's in fp32."""
    from bench.gpu.extract import write_tower
    from fastvid.video.encoder import FeatureEncoder

    shape = SimpleNamespace(size=28, patch=14, hidden=32, layers=3, heads=4) if small else SimpleNamespace(
        size=336, patch=14, hidden=1024, layers=4, heads=16)
    frames = torch.randint(256, (7, 45, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as made:
        write_tower(made, shape)
        true = FeatureEncoder(made, device="cpu", num_temporal=8).encode(frames).double()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = FeatureEncoder(made, device=DEVICE, dtype=dtype, num_temporal=8).encode(frames).double()
            there = true.norm(dim=1) > 0
            cosine = torch.nn.functional.cosine_similarity(found[there], true[there]).min().item()
            empty = bool((found[~there] == 0).all())
            limit = {torch.float32: 1 - 1e-6, torch.float16: 0.9999, torch.bfloat16: 0.999}[dtype]
            yield {"row": f"{dtype}".removeprefix("torch."), "least cosine": cosine, "empty rows are zero": empty,
                   "status": "ok" if cosine >= limit and empty else "failed"}


def loss_curve(small):
    """Fifty steps of a small model in bf16 on the device beside fp32 on the CPU."""
    from bench import train_data
    from bench.train_presets import PRESETS
    from fastvid import parallel, train
    from fastvid.config import TrainConfig, parse

    steps = 3 if small else 50
    with tempfile.TemporaryDirectory() as made:
        train_data.write(made, PRESETS["tiny"].shape, 2)
        curves = {}
        for device, bf16 in (("cpu", "False"), (DEVICE, "True")):
            world = parallel.World(0, 1, 0, torch.device(device), False)
            state = train.build(parse(TrainConfig, [
                "--model_name_or_path", f"{made}/model", "--data_path", f"{made}/train.json", "--video_folder", f"{made}/feats",
                "--output_dir", f"{made}/out", "--mm_use_vid_start_end", "--bf16", bf16, "--max_steps", str(steps),
                "--learning_rate", "1e-3", "--per_device_train_batch_size", "8", "--dataloader_num_workers", "0"]), world)
            curves[bf16] = [train.train_step(state, batches).loss.item() for _, batches in state.loader.iterate()]
        means = {key: sum(values) / len(values) for key, values in curves.items()}
        error = abs(means["True"] / means["False"] - 1)
        yield {"row": f"full fine-tune, {steps} steps", "bf16": means["True"], "fp32 on the CPU": means["False"],
               "relative error of the mean": error, "last bf16": curves["True"][-1], "last fp32": curves["False"][-1],
               "status": "ok" if error <= 5e-3 else "failed"}
