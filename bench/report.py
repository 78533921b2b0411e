"""Print the kernels' benchmark rows as a table and draw them: python -m bench.report [FOLDER or FILE …]

Reads pytest-benchmark's files and those of GPU checks (.jsonl), by default all in bench/results; of rows measured twice
on a device the newest counts.
The picture goes to --png (bench/plots/kernels.png).
"""

import argparse
import json
from pathlib import Path

from bench.gpu import merge
from bench.roofline import draw

ROOT = Path(__file__).resolve().parent
KERNELS = (
    "spatio_temporal_pool",
    "grid_pool",
    "frame_patchify",
    "yuv_patchify",
    "add_layer_norm",
    "quick_gelu",
    "splice_video",
    "add_rms_norm",
    "rope_qk",
    "rope_keys",
    "merge_parts",
    "swiglu",
    "linear_cross_entropy",
    "adamw8bit_step",
    "adamw_step",
    "quantize_fp8",
)
UNMEASURED = "not yet measured"
COLUMNS = ("way", "median", "spread", "rate", "of the roof", "× baseline", "memory")


def read(paths):
    """Rows of pytest-benchmark files (other JSON in a folder is passed over) and of GPU checks, without tiny shapes.

    Returns:
        list of dicts: a row's extra_info with "median", "iqr" in seconds, "on_gpu".
    """
    files = [file for path in map(Path, paths) for file in (sorted(path.glob("*.json*")) if path.is_dir() else [path])]
    found = {}
    checks = [file for file in files if file.suffix == ".jsonl"]
    for row in of_checks(merge.read(checks)) if checks else ():
        found[row["device"], row["kernel"], row["case"], row["way"]] = row
    files = [file for file in files if file not in checks]
    for content in sorted((json.loads(file.read_text()) for file in files), key=lambda c: c.get("datetime", "")):
        for row in content.get("benchmarks", []):
            info = row["extra_info"]
            if "kernel" not in info or info["small"]:
                continue
            key = info["device"], info["kernel"], info["case"], info["way"]
            found[key] = info | {
                "median": row["stats"]["median"],
                "iqr": row["stats"]["iqr"],
                "on_gpu": "copy_bytes_per_second" in info,
            }
    return list(found.values())


def of_checks(cards):
    """What `read` returns, of `bench.gpu.merge.Card`s: kernels that were timed, ours first of every case."""
    found = []
    for card in cards:
        rows = [row for row in card.rows if "way" in row and "median" in row]
        baselines = {(row["kernel"], row["case"]): row["median"] for row in rows if row["way"] == row["baseline"]}
        order = list(dict.fromkeys((row["kernel"], row["case"]) for row in rows))
        for row in sorted(rows, key=lambda row: (order.index((row["kernel"], row["case"])), row["way"] != "ours")):
            slow = baselines.get((row["kernel"], row["case"]))
            found.append(row | {"on_gpu": True, "times_as_fast_as_baseline": slow and round(slow / row["median"], 3)})
    return found


def table(rows):
    """The rows as text: every device's, and a line for each kernel that no GPU has run."""
    lines = []
    for device in dict.fromkeys(row["device"] for row in rows):
        here = [row for row in rows if row["device"] == device]
        lines += [_heading(here[-1]), ""]
        for kernel, case in dict.fromkeys((row["kernel"], row["case"]) for row in here):
            lines.append(f"{kernel}: {case}")
            cells = [_cells(row) for row in here if (row["kernel"], row["case"]) == (kernel, case)]
            lines += aligned([COLUMNS, *cells])
            lines.append("")
    measured = {row["kernel"] for row in rows if row["on_gpu"]}
    lines += [f"{kernel} on a GPU: {UNMEASURED}" for kernel in KERNELS if kernel not in measured]
    return "\n".join(lines)


def _heading(row):
    versions = ", ".join(f"{name} {version}" for name, version in row["versions"].items() if version)
    heading = f"{row['device']}; commit {row['commit']}, {row['date']}; Python {row['python']}, {versions}"
    if row["on_gpu"]:
        heading += (
            f"\nroofs of the run: copy {row['copy_bytes_per_second'] / 1e9:,.0f} GB/s, "
            f"bf16 matrix product {row['matmul_flops_per_second'] / 1e12:,.0f} TFLOP/s"
        )
    return heading


def _cells(row):
    rate = f"{row['gb_per_s']:,g} GB/s" if "gb_per_s" in row else f"{row['tflop_per_s']:,g} TFLOP/s"
    roof = percent_of_roof(row)
    ratio, memory = row["times_as_fast_as_baseline"], row["peak_extra_mib"]
    return (
        row["way"],
        duration(row["median"]),
        f"± {50 * row['iqr'] / row['median']:.0f} %",
        rate,
        "" if roof is None else f"{roof:.0f} %",
        "" if ratio is None else f"{ratio:.2f}",
        "" if memory is None else f"{memory:,.0f} MiB",
    )


def percent_of_roof(row):
    """Of the copy bandwidth, or of the matrix product's rate, that were measured in the row's own run; else None."""
    if not row["on_gpu"]:
        return None
    if row["bytes"]:
        return 100 * row["bytes"] / row["median"] / row["copy_bytes_per_second"]
    return 100 * row["tflop_per_s"] * 1e12 / row["matmul_flops_per_second"]


def duration(seconds):
    """Three digits and a unit."""
    factor, unit = next((pair for pair in ((1, "s"), (1e3, "ms")) if seconds * pair[0] >= 1), (1e6, "µs"))
    value = seconds * factor
    return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"


def aligned(cells):
    """Tuples of cells as lines of text, the first column to the left."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    ]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("paths", nargs="*", default=[ROOT / "results"])
    parser.add_argument("--png", type=Path, default=ROOT / "plots" / "kernels.png")
    arguments = parser.parse_args(argv)
    rows = read(arguments.paths)
    print(table(rows))
    if rows:
        arguments.png.parent.mkdir(parents=True, exist_ok=True)
        draw(rows).savefig(arguments.png)


if __name__ == "__main__":
    main()
