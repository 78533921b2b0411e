"""Loss curves of adapter training over a decoder in few bits, against bf16: python -m bench.frozen_dtype QUICKSTART

Stage 2 of the quickstart (another tower's features, the projector alone) from the folder that `scripts/quickstart.sh` left,
once for each way of storing the decoder: same samples, same order, same command but for a flag. fp32 is the yardstick of
how far bf16 itself is from what it rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import ROOT, write_results

BASELINE = "bf16"
WAYS = {"fp32": ["--bf16", "False"], BASELINE: [], **{name: ["--frozen_dtype", name] for name in ("fp8", "int8", "nf4")}}
WINDOW = 20  # steps of a running mean


def losses(way, folder, model, steps, batch):
    """The loss of every step of a run."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable, "-m", "fastvid.train", "--model_name_or_path", model, "--data_path", folder / "train.json",
            "--video_folder", folder / "features_b", "--tune_mm_mlp_adapter", "True", "--mm_use_vid_start_end",
            "--output_dir", output, "--max_steps", steps, "--per_device_train_batch_size", batch,
            "--learning_rate", "2e-3", "--warmup_ratio", "0.03", "--logging_steps", "1", "--save_strategy", "no",
            "--report_to", "none", "--disable_tqdm", "True", "--bf16", "True", *WAYS[way]]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "PYTHONPATH": paths})
        lines = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]


def compared(found, baseline):
    """How a curve differs from the baseline's.

    Returns:
        dict: `mean` loss of all steps and of the last WINDOW, their relative differences from the baseline's, and the
        largest difference of two running means over WINDOW steps, as a part of the baseline's mean loss.
    """
    def mean(values):
        return sum(values) / len(values)

    def running(values):
        return [mean(values[i:i + WINDOW]) for i in range(len(values) - WINDOW + 1)]

    gap = max(abs(a - b) for a, b in zip(running(found), running(baseline), strict=True))
    return {"mean": mean(found), "mean_last": mean(found[-WINDOW:]), "mean_difference": mean(found) / mean(baseline) - 1,
            "last_difference": mean(found[-WINDOW:]) / mean(baseline[-WINDOW:]) - 1,
            "largest_gap": gap / mean(baseline)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="folder that the quickstart filled")
    parser.add_argument("--model", type=Path, help="folder of another starting model; default: the quickstart's")
    parser.add_argument("--name", default="quickstart", help="of the model, in the results")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    curves = {way: losses(way, arguments.quickstart.resolve(), arguments.model or arguments.quickstart.resolve() / "llava",
                          arguments.steps, arguments.batch)
              for way in dict.fromkeys([BASELINE, *arguments.ways])}

    print(f"{'':<6}{'mean loss':>12}{'of ' + BASELINE:>12}{'last ' + str(WINDOW):>12}{'of ' + BASELINE:>12}{'largest gap':>14}")
    rows = []
    for way, curve in curves.items():
        figures = compared(curve, curves[BASELINE])
        rows.append({"model": arguments.name, "way": way, "steps": arguments.steps, "batch": arguments.batch, **figures,
                     "losses": [round(loss, 6) for loss in curve]})
        print(f"{way:<6}{figures['mean']:>12.5f}{figures['mean_difference']:>12.3%}{figures['mean_last']:>12.5f}"
              f"{figures['last_difference']:>12.3%}{figures['largest_gap']:>14.3%}")
    if arguments.json:
        write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
