"""Whether training steps and extraction compute on this device what they must."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers.models.clip.modeling_clip
import transformers.models.llama.modeling_llama  # noqa: F401
from safetensors.torch import load_file

from bench import train_data
from bench.gpu.tower import CLIP_L, TINY, write_tower
from bench.harness import ROOT
from bench.train_presets import PRESETS
from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.config import TrainConfig
from fastvid.dist import parallel
from fastvid.flags import parse
from fastvid.training.metrics import read_metrics
from fastvid.video.encoder import FeatureEncoder

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def reference_steps(small):
    """The five steps that were recorded of the reference: losses, gradient norms, parameters."""
    folder = Path(os.environ.get("FASTVID_REFERENCE_DATA") or ROOT / "tests" / "golden")
    if not (folder / "tiny.py").is_file():
        yield {"row": "recordings", "status": "ok", "absent": f"no recordings at {folder} (FASTVID_REFERENCE_DATA)"}
        return
    with tempfile.TemporaryDirectory() as made:
        spec = importlib.util.spec_from_file_location("tiny", folder / "tiny.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.main(made)
        recorded = json.loads((folder / "model.json").read_text())["train"]["runs"]["336_main_r0"]
        argv, output = [word.replace("WORK", made) for word in recorded["argv"]], Path(made) / "out"
        argv[argv.index("--output_dir") + 1] = str(output)
        argv[argv.index("--save_strategy") + 1] = "steps"
        code = train.main([*argv, "--parity", "reference", "--save_steps", "1"])
        lines = read_metrics(output / "metrics.jsonl")
        tensors, worst = load_file(folder / "model.safetensors"), 0.0
        for step in range(1, 6):
            trained, prefix = (
                checkpoint.read_full(output / f"checkpoint-{step}", "model"),
                f"336/train_main/after_step{step}/",
            )
            for name in (name for name in tensors if name.startswith(prefix)):
                short = name.removeprefix(prefix).removeprefix("model.mm_projector.")
                ours = "boundary.weight" if "embed" in short else f"projector.{short}"
                worst = max(worst, (trained[ours] - tensors[name]).abs().max().item())
        loss = max(abs(line["loss"] - true) for line, true in zip(lines, recorded["losses"], strict=True))
        norm = max(abs(line["grad_norm"] / true - 1) for line, true in zip(lines, recorded["total_norm"], strict=True))
        right = code == 0 and loss <= 1e-5 and norm <= 1e-5 and worst <= 1e-7
        yield {
            "row": "five steps",
            "loss error": loss,
            "norm error": norm,
            "parameter error": worst,
            "status": "ok" if right else "failed",
        }


def _losses(made, world, **settings):
    """The loss of each step of a run on what `train_data.write` wrote."""
    config = TrainConfig(
        f"{made}/model",
        [f"{made}/train.json"],
        video_folder=f"{made}/feats",
        output_dir=f"{made}/out",
        mm_use_vid_start_end=True,
        learning_rate=1e-3,
        dataloader_num_workers=0,
        **settings,
    )
    state = train.build(config, world)
    return [train.train_step(state, batches).loss.item() for batches, _ in state.loader.iterate()]


def one_rank_sharded(small):
    """Full and adapter training under FSDP2 with a process group of one rank, beside the same without one."""
    with tempfile.TemporaryDirectory() as made:
        train_data.write(made, PRESETS["tiny"].shape, 2)
        losses = {}
        for distributed in (False, True):
            if distributed:
                os.environ |= {
                    "RANK": "0",
                    "WORLD_SIZE": "1",
                    "LOCAL_RANK": "0",
                    "LOCAL_WORLD_SIZE": "1",
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(_free_port()),
                }
            world = parallel.start()
            for name, adapter in (("adapter", True), ("full", False)):
                shard = "full" if distributed else "none"
                settings = {"tune_mm_mlp_adapter": adapter, "shard": shard, "per_device_train_batch_size": 4}
                losses[name, distributed] = _losses(made, world, max_steps=3, bf16=True, **settings)
        for name in ("adapter", "full"):
            error = max(abs(a / b - 1) for a, b in zip(losses[name, True], losses[name, False], strict=True))
            yield {
                "row": f"{name}, three steps",
                "losses": losses[name, True],
                "relative error": error,
                "status": "ok" if error <= 2e-3 else "failed",
            }
        parallel.finish(world)


def two_sharded_ranks(small):
    """Three steps of a full fine-tune in bf16 weights by two ranks of torchrun, beside one process."""
    if torch.cuda.device_count() == 1:
        yield {"row": "two ranks", "absent": "one GPU"}
        return
    with tempfile.TemporaryDirectory() as made:
        train_data.write(made, PRESETS["tiny"].shape, 2)
        flags = [
            "--model_name_or_path",
            f"{made}/model",
            "--data_path",
            f"{made}/train.json",
            "--video_folder",
            f"{made}/feats",
            "--mm_use_vid_start_end",
            "--bf16",
            "True",
            "--master_dtype",
            "bfloat16",
            "--max_steps",
            "3",
            "--learning_rate",
            "1e-3",
            "--gradient_accumulation_steps",
            "2",
            "--dataloader_num_workers",
            "0",
            "--logging_steps",
            "1",
            "--report_to",
            "none",
            "--disable_tqdm",
            "--ddp_timeout",
            "40",
        ]
        state = train.build(
            parse(
                TrainConfig,
                [*flags, "--output_dir", f"{made}/one", "--shard", "none", "--per_device_train_batch_size", "4"],
            ),
            parallel.World(0, 1, 0, torch.device(DEVICE), False),
        )
        steps = [train.train_step(state, batches) for batches, _ in state.loader.iterate()]
        for layout, *size in (("full",), ("hybrid", "--shard_size", "2")):
            output = f"{made}/{layout}"
            said = _torchrun(
                2,
                [*flags, "--output_dir", output, "--shard", layout, *size, "--per_device_train_batch_size", "2"],
                seconds=60,
            )
            row = {"row": f"{layout}, two ranks"}
            if said:
                yield row | {"status": "failed", "error": said}
                continue
            lines = list(zip(read_metrics(Path(output) / "metrics.jsonl"), steps, strict=True))
            loss = max(abs(line["loss"] / step.loss.item() - 1) for line, step in lines)
            norm = max(abs(line["grad_norm"] / step.gradient_norm.item() - 1) for line, step in lines)
            yield row | {
                "losses": [line["loss"] for line, _ in lines],
                "relative error": loss,
                "norm error": norm,
                "status": "ok" if loss <= 2e-3 and norm <= 0.03 else "failed",
            }


def _torchrun(ranks, flags, seconds):
    """Run a training job; what it wrote last where it failed, or None."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={ranks}",
        "-m",
        "fastvid.train",
        *flags,
    ]
    with (
        tempfile.TemporaryFile("w+", errors="replace") as log,
        subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"},
        ) as launcher,
    ):
        try:
            code = launcher.wait(seconds)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # its ranks are in sessions of their own: it ends them
            code = launcher.wait()
        log.seek(0)
        text = log.read()
    said = text.rpartition("Traceback (most recent call last)")[0] or text  # the last one is the launcher's own
    return f"torchrun ended with code {code}: {said[-1200:]}" if code else None


def _free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def extraction(small):
    """Features of random frames on the device, in fp16 and bf16, against the CPU's in fp32."""
    shape = TINY if small else replace(CLIP_L, layers=4)
    frames = torch.randint(256, (7, 45, 80, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as made:
        write_tower(made, shape)
        true = FeatureEncoder(made, device="cpu", dtype=torch.float32, num_temporal=8).encode(frames).double()
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            found = FeatureEncoder(made, device=DEVICE, dtype=dtype, num_temporal=8).encode(frames).double()
            there = true.norm(dim=1) > 0
            cosine = torch.nn.functional.cosine_similarity(found[there], true[there]).min().item()
            empty = bool((found[~there] == 0).all())
            limit = {torch.float32: 1 - 1e-6, torch.float16: 0.9999, torch.bfloat16: 0.999}[dtype]
            yield {
                "row": f"{dtype}".removeprefix("torch."),
                "least cosine": cosine,
                "empty rows are zero": empty,
                "status": "ok" if cosine >= limit and empty else "failed",
            }


def loss_curve(small):
    """Fifty steps of a small model in bf16 on the device beside fp32 on the CPU."""
    steps = 3 if small else 50
    with tempfile.TemporaryDirectory() as made:
        train_data.write(made, PRESETS["tiny"].shape, 2)
        curves = {}
        for device, bf16 in (("cpu", False), (DEVICE, True)):
            world = parallel.World(0, 1, 0, torch.device(device), False)
            curves[bf16] = _losses(made, world, max_steps=steps, bf16=bf16, per_device_train_batch_size=8)
        means = {key: sum(values) / len(values) for key, values in curves.items()}
        error = abs(means[True] / means[False] - 1)
        yield {
            "row": f"full fine-tune, {steps} steps",
            "bf16": means[True],
            "fp32 on the CPU": means[False],
            "relative error of the mean": error,
            "last bf16": curves[True][-1],
            "last fp32": curves[False][-1],
            "status": "ok" if error <= 5e-3 else "failed",
        }
