"""A training step against transformers', one idea after the other:
python bench/train_step.py --preset cpu-110m --json F

Writes a model of random weights and the samples of one optimizer step into a temporary folder, starts a process for
every row of the preset, compares losses and gradient norms, and then has the processes step in turn, round after round.
Prints the ladder and writes {"environment", "preset", "rows", "ratios", …} as JSON. What the rows are: bench/README.md.
It times CPUs; a GPU, which would have to hold all rows at once, is timed by scripts/gpu_check.sh --stages train.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench.harness import environment  # noqa: E402  found by the line above
from bench.train_presets import BASELINES, LORA_BASELINES, PRESETS, ROWS  # noqa: E402

# Largest relative difference of the loss and of the gradient norm from those of the row that one must equal, at the
# starting weights. The reference keeps the residual stream in fp32 under autocast, the others round it to bf16.
TOLERANCE = {"bf16": (1e-3, 2e-2), "fp32": (1e-5, 1e-4)}


class RowFailed(RuntimeError):
    """A row's process ended; the message has what it wrote last."""


class RowProcess:
    """A row in a process of its own (`bench.train_rows`)."""

    def __init__(self, name, dtype, preset, folder):
        self.name = name
        self.log = open(folder / f"{dtype}_{name}.log", "w+")
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "bench.train_rows",
                name,
                "--folder",
                folder,
                "--dtype",
                dtype,
                "--micro_batch",
                str(preset.micro_batch),
            ],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        )
        self.heard()

    def ask(self, command):
        """The answer to a command of `bench.train_rows`, as a dict."""
        print(command, file=self.process.stdin, flush=True)
        return self.heard()

    def heard(self):
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            self.log.seek(0)
            raise RowFailed(f"row {self.name} ended with exit code {code}:\n{self.log.read()[-3000:]}")
        return json.loads(line)

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()
        self.log.close()


def measure(names, dtype, preset, folder, *, say=print):
    """The rows `names` of one dtype: those of the most rounds first, then the others, as all would not fit the memory.

    Returns:
        (list of dicts, matrix product's FLOP per second)

    Raises:
        RowFailed: a row's process ended early.
    """
    often = [name for name in names if ROWS[name].rounds is None]
    rows, rates = {}, []
    for group in filter(None, (often, [name for name in names if name not in often])):
        found = _measure_together(["matmul", *group], dtype, preset, folder, say)
        rates += found.pop("matmul")["rates"]
        rows |= found
    rate = max(rates, default=math.nan)
    return [_figures(name, dtype, rows[name], rate) for name in names], rate


def _measure_together(names, dtype, preset, folder, say):
    """{name: answers of the row's process}; the processes live side by side and step in turn."""
    processes, rows = {}, {}
    try:
        for name in names:
            begin = time.perf_counter()
            processes[name] = RowProcess(name, dtype, preset, folder)
            rows[name] = processes[name].ask("first") | {"seconds": [], "cpu_seconds": [], "rates": []}
            say(f"{dtype} {name}: first step after {time.perf_counter() - begin:.0f} s")
            if not _rounds(name, preset, dtype):
                rows[name] |= _end(processes.pop(name))
        for number in range(preset.rounds[dtype]):
            for name, process in processes.items():
                if number < _rounds(name, preset, dtype):
                    found = process.ask("step")
                    for key, value in found.items():
                        if key in ("seconds", "cpu_seconds", "rate"):
                            rows[name]["rates" if key == "rate" else key].append(value)
                    say(f"{dtype} {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
        while processes:
            name, process = processes.popitem()
            rows[name] |= _end(process)
        return rows
    finally:
        for process in processes.values():
            process.stop()


def _end(process):
    found = process.ask("end")
    process.stop()
    return found


def _rounds(name, preset, dtype):
    rounds = None if name == "matmul" else ROWS[name].rounds
    return preset.rounds[dtype] if rounds is None else min(rounds, preset.rounds[dtype])


def _figures(name, dtype, row, rate):
    """A row with its rates; those of a row that was only compared are None."""
    row = {"row": name, "title": ROWS[name].title, "dtype": dtype, **row}
    del row["rates"]
    seconds = statistics.median(row["seconds"]) if row["seconds"] else None
    share = seconds and row["flops"] / seconds / rate
    return row | {
        "samples_per_second": seconds and row["samples"] / seconds,
        "tokens_per_second": seconds and row["rows"] / seconds,
        "spread": seconds and (max(row["seconds"]) - min(row["seconds"])) / seconds,
        "flops_per_second": seconds and row["flops"] / seconds,
        "matmul_share": share,
    }


def compare(rows):
    """What is wrong with the losses and gradient norms of one dtype's rows, a line each."""
    found = {row["row"]: row for row in rows}
    for row in rows:
        ours = ROWS[row["row"]]
        if ours.like is None:
            continue
        # Where that row was not run, the first of those that must equal it stands for it.
        like = found.get(ours.like) or next(other for other in rows if ROWS[other["row"]].like == ours.like)
        for key, limit in zip(("loss", "norm"), ours.tolerance or TOLERANCE[row["dtype"]]):
            error = abs(row[key] - like[key]) / abs(like[key])
            if not error <= limit:
                yield (
                    f"{row['dtype']} {row['row']}: {key} {row[key]:.6g}, {like['row']} has {like[key]:.6g}: "
                    f"{error:.2g} apart, at most {limit:g} is allowed"
                )


def ratios(rows, dtype):
    """Samples per second of the exact, the shared and the LoRA rows over their baselines'."""
    speed = {row["row"]: row["samples_per_second"] for row in rows if row["dtype"] == dtype}
    pairs = [*itertools.product(("exact", "shared"), BASELINES), *itertools.product(("lora",), LORA_BASELINES)]
    return {
        f"{ours}_vs_{theirs}": speed[ours] / speed[theirs]
        for ours, theirs in pairs
        if speed.get(ours) and speed.get(theirs)
    }


def summary(rows, rates):
    """What a reader of the JSON file looks for first."""
    found = {(row["dtype"], row["row"]): row for row in rows}
    memory = found.get(("bf16", "reference"), {}).get("peak_bytes")

    def of_reference(name):
        row = found.get(("bf16", name))
        return row["peak_bytes"] / memory if row and memory else None

    def share(dtype):
        return found.get((dtype, "exact"), {}).get("matmul_share")

    return {
        "ratios": ratios(rows, "bf16"),
        "ratios_fp32": ratios(rows, "fp32"),
        "matmul_share": share("bf16"),
        "matmul_share_fp32": share("fp32"),
        "memory_vs_reference": of_reference("exact"),
        "memory_vs_reference_recomputed": of_reference("recomputed"),
        "matmul_flops_per_second": rates,
    }


def table(rows):
    """The ladder as text."""
    run = {row["row"] for row in rows if row["seconds"]}
    baselines = [name for name in (*BASELINES, *LORA_BASELINES) if name in run]
    cells = [("", "samples/s", "±", "tokens/s", "GFLOP/s", "matmul", "memory", *(f"× {name}" for name in baselines))]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        here = [row for row in rows if row["dtype"] == dtype and row["seconds"]]
        base = {row["row"]: row["samples_per_second"] for row in here}
        cells.append((dtype, *[""] * (len(cells[0]) - 1)))
        for row in here:
            speed = row["samples_per_second"]
            cells.append(
                (
                    "  " + row["title"],
                    f"{speed:.3g}",
                    f"{50 * row['spread']:.0f} %",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['flops_per_second'] / 1e9:,.0f}",
                    f"{100 * row['matmul_share']:.0f} %",
                    f"{row['peak_bytes'] / 2**20:,.0f} MiB",
                    *(f"{speed / base[name]:.2f}" if name in base else "" for name in baselines),
                )
            )
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    )


def run(preset_name, *, names=None, dtypes=None, rounds=None, folder=None, say=print):
    """Everything that the JSON file holds; "faults" lists rows whose loss or gradient norm is not what it must be.

    Args:
        names, dtypes: what to run of the preset's; None: all.
        rounds: timed steps of each row, instead of the preset's.
        folder: where the temporary folder goes.
    """
    preset, begin = PRESETS[preset_name], time.perf_counter()
    if rounds:
        preset = dataclasses.replace(preset, rounds=dict.fromkeys(preset.rounds, rounds))
    rows, rates, faults = [], {}, []
    with tempfile.TemporaryDirectory(dir=folder) as made:
        made = Path(made)
        from bench.train_data import write

        write(made, preset.shape, preset.videos)
        for dtype in dtypes or preset.rows:
            chosen = [name for name in preset.rows[dtype] if names is None or name in names]
            found, rates[dtype] = measure(chosen, dtype, preset, made, say=say)
            rows += found
            faults += compare(found)
    return {
        "environment": environment(),
        "preset": preset_name,
        "seconds": time.perf_counter() - begin,
        "rows": rows,
        **summary(rows, rates),
        "faults": faults,
    }


def has_gpu():
    """Whether torch would compute on a GPU."""
    import torch

    return torch.cuda.is_available()


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--preset", choices=PRESETS, default="cpu-110m")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--png", type=Path, help="picture to draw")
    parser.add_argument("--out", type=Path, help="folder for train-PRESET.json and .png, where those two name none")
    parser.add_argument("--rows", help="those to run, by name, with commas (default: the preset's)")
    parser.add_argument("--dtypes", help="bf16, fp32 or both with a comma (default: the preset's)")
    parser.add_argument("--rounds", type=int, help="timed steps of each row (default: the preset's)")
    parser.add_argument("--folder", help="where the temporary folder goes: the model's bf16 weights must fit")
    arguments = parser.parse_args(argv)
    if has_gpu():
        parser.error(
            "this times CPUs; for this machine's GPU: bash scripts/gpu_check.sh --stages train "
            "(CUDA_VISIBLE_DEVICES= hides it)"
        )
    result = run(
        arguments.preset,
        names=arguments.rows and arguments.rows.split(","),
        folder=arguments.folder,
        rounds=arguments.rounds,
        dtypes=arguments.dtypes and arguments.dtypes.split(","),
    )
    print(f"\n{json.dumps(result['environment'])}")
    if arguments.preset.startswith("tiny"):
        print("sizes of tiny show that the rows work; their figures mean nothing")
    print(f"{table(result['rows'])}\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("environment", "rows")}, indent=1))
    target = arguments.out and arguments.out / f"train-{arguments.preset}"
    if path := arguments.json or (target and target.with_suffix(".json")):
        path.write_text(json.dumps(result, indent=1) + "\n")
    if path := arguments.png or (target and target.with_suffix(".png")):
        from bench.ladder_plot import draw

        draw(result).savefig(path)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
