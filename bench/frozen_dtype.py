"""Loss curves of adapter training over a decoder in few bits, against bf16: python -m bench.frozen_dtype QUICKSTART

Stage 2 of the quickstart (another tower's features, the projector alone) from the folder that `scripts/quickstart.sh`
left, once for each way of storing the decoder: same samples, same order, same command but for a flag. A small model's
loss hangs on every rounding, so curves are compared over several seeds; fp32 against bf16 says how far two runs differ
that nobody would tell apart.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from bench.harness import ROOT, write_results

BASELINE = "bf16"
WAYS = {
    "fp32": ["--bf16", "False"],
    BASELINE: [],
    "fp8": ["--frozen_dtype", "fp8"],
    "int8": ["--frozen_dtype", "int8"],
    "nf4": ["--frozen_dtype", "nf4"],
}
WINDOW = 20  # steps of a running mean


def losses(way, folder, model, steps, batch, seed):
    """The loss of every step of a run."""
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            "-m",
            "fastvid.train",
            "--model_name_or_path",
            model,
            "--data_path",
            folder / "train.json",
            "--video_folder",
            folder / "features_b",
            "--tune_mm_mlp_adapter",
            "True",
            "--mm_use_vid_start_end",
            "--output_dir",
            output,
            "--max_steps",
            steps,
            "--per_device_train_batch_size",
            batch,
            "--learning_rate",
            "2e-3",
            "--warmup_ratio",
            "0.03",
            "--logging_steps",
            "1",
            "--save_strategy",
            "no",
            "--report_to",
            "none",
            "--disable_tqdm",
            "True",
            "--bf16",
            "True",
            "--seed",
            seed,
            *WAYS[way],
        ]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        subprocess.run(list(map(str, command)), check=True, env={**os.environ, "PYTHONPATH": paths})
        lines = map(json.loads, (Path(output) / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if "loss" in line]


def compared(found, baseline):
    """How a curve differs from the baseline's.

    Returns:
        dict: mean loss of all steps and of the last WINDOW; how much larger the mean is than the baseline's, and the
        loss of the first step, when the two models differ in rounding alone, as parts of the baseline's; and the
        largest difference of two running means over WINDOW steps, as a part of the baseline's mean.
    """

    def running(values):
        return [statistics.fmean(values[i : i + WINDOW]) for i in range(len(values) - WINDOW + 1)]

    gap = max(abs(a - b) for a, b in zip(running(found), running(baseline), strict=True))
    mean, usual = statistics.fmean(found), statistics.fmean(baseline)
    return {
        "mean": mean,
        "mean_last": statistics.fmean(found[-WINDOW:]),
        "difference": mean / usual - 1,
        "first_difference": found[0] / baseline[0] - 1,
        "largest_gap": gap / usual,
    }


def table(rows):
    """One line for each way: means over seeds, and the standard error of the difference."""
    line = "{:<6}{:>7}{:>12}{:>14}{:>14}{:>14}{:>12}{:>14}".format
    lines = [
        line("", "seeds", "mean loss", f"over {BASELINE}", "± std. error", "at step 1", f"last {WINDOW}", "largest gap")
    ]
    for way in dict.fromkeys(row["way"] for row in rows):
        mine = [row for row in rows if row["way"] == way]
        mean = {
            key: statistics.fmean(row[key] for row in mine)
            for key in ("mean", "difference", "first_difference", "mean_last", "largest_gap")
        }
        differences = [row["difference"] for row in mine]
        error = statistics.stdev(differences) / len(mine) ** 0.5 if len(mine) > 1 else float("nan")
        lines.append(
            line(
                way,
                len(mine),
                f"{mean['mean']:.4f}",
                f"{mean['difference']:+.2%}",
                f"{error:.2%}",
                f"{mean['first_difference']:+.2%}",
                f"{mean['mean_last']:.4f}",
                f"{mean['largest_gap']:.2%}",
            )
        )
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("quickstart", type=Path, help="folder that the quickstart filled")
    parser.add_argument("--model", type=Path, help="folder of another starting model; default: the quickstart's")
    parser.add_argument("--name", default="quickstart", help="of the model, in the results")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.quickstart.resolve()
    model = arguments.model or folder / "llava"
    rows = []
    for seed in arguments.seeds:
        curves = {
            way: losses(way, folder, model, arguments.steps, arguments.batch, seed)
            for way in dict.fromkeys([BASELINE, *arguments.ways])
        }
        rows += [
            {
                "model": arguments.name,
                "way": way,
                "seed": seed,
                "steps": arguments.steps,
                "batch": arguments.batch,
                **compared(curve, curves[BASELINE]),
                "losses": [round(loss, 5) for loss in curve],
            }
            for way, curve in curves.items()
        ]
        print(table(rows), flush=True)
        if arguments.json:
            write_results(arguments.json, rows)


if __name__ == "__main__":
    main()
