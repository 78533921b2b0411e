"""The training benchmark as a picture and as a table: python -m bench.ladder_plot FILE

FILE is what bench/train_step.py wrote. The picture goes to bench/plots/train_step.png, the table into
docs/performance.md, between its two `ladder` comments.
"""

import argparse
import json
from pathlib import Path

from matplotlib.figure import Figure

from bench.roofline import GRID, INK, OURS, QUIET
from bench.train_presets import ROWS

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- ladder: python -m bench.ladder_plot -->", "<!-- end of ladder -->"
COLOURS = {("bf16", True): OURS, ("fp32", True): "#9ec5fe", ("bf16", False): "#495057", ("fp32", False): "#ced4da"}
ROW, HEAD, FOOT, WIDTH = 0.62, 1.25, 0.85, 11.5  # inches
PANELS = (0.36, 0.36), (0.80, 0.17)  # left edge and width, of the figure


def draw(result):
    """A figure of what `bench.train_step.run` returns; rows that were only compared are left out.

    In brackets: times the row that `result["against"]` names, else the reference's, of those that train the same on the
    same samples.
    """
    rows = [row for row in result["rows"] if row["seconds"]]
    names, against = list(dict.fromkeys(row["row"] for row in rows)), result.get("against", "reference")
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    height = HEAD + FOOT + ROW * len(names)
    figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor="white")
    about = result["environment"]
    figure.text(
        0.02,
        1 - 0.35 / height,
        "A training step, one idea after the other",
        fontsize=16,
        fontweight="bold",
        color=INK,
        va="center",
    )
    figure.text(
        0.02,
        1 - 0.68 / height,
        f"{result['preset']}; {about['device']}; torch {about['versions']['torch']}, "
        f"transformers {about['versions']['transformers']}; commit {about['commit']}, {about['date']}",
        fontsize=9.5,
        color=QUIET,
        va="center",
    )
    box = FOOT / height, ROW * len(names) / height
    speed, memory = (figure.add_axes((left, box[0], width, box[1])) for left, width in PANELS)
    _bars(speed, rows, names, dtypes, "samples_per_second", 1, "samples per second", 1.25, against)
    _bars(memory, rows, names, dtypes, "peak_bytes", 2**30, "peak memory, GiB", 1.75, against)
    speed.set_yticks(range(len(names)), [_wrapped(_title(rows, name)) for name in names], fontsize=9.5, color=INK)
    memory.set_yticks([])
    _legend(
        figure, dtypes, 0.3 / height, "the reference's" if against == "reference" else "the fastest transformers row's"
    )
    return figure


def _title(rows, name):
    return next(row["title"] for row in rows if row["row"] == name)


def _wrapped(title, width=48):
    lines = [""]
    for word in title.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] += f" {word}" if lines[-1] else word
    return "\n".join(lines)


def _bars(axis, rows, names, dtypes, key, unit, label, room, against):
    thick = 0.8 / len(dtypes)
    base = {row["dtype"]: row[key] for row in rows if row["row"] == against}
    for row in rows:
        here = [other["dtype"] for other in rows if other["row"] == row["row"]]
        at = names.index(row["row"]) + thick * (here.index(row["dtype"]) + 0.5 - len(here) / 2)
        value = row[key] / unit
        about = ROWS[row["row"]]
        axis.barh(at, value, thick * 0.9, color=COLOURS[row["dtype"], about.kind == "fastvid"])
        text = f" {value:.3g}"
        if row["dtype"] in base and row["row"] != against and not (about.full or about.budget):
            text += f"  ({row[key] / base[row['dtype']]:.2g}×)"
        axis.text(value, at, text, fontsize=8.5, color=INK, va="center")
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlim(0, room * max(row[key] for row in rows) / unit)
    axis.set_xlabel(label, fontsize=10, color=INK)
    axis.xaxis.grid(True, color=GRID)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _legend(figure, dtypes, height, best):
    """Squares in the bars' colours below the panels; in brackets behind a value: times what `best` names."""
    at = 0.02
    for dtype in dtypes:
        for ours, name in ((False, "transformers"), (True, "fastvid")):
            figure.text(at, height, "■", fontsize=11, color=COLOURS[dtype, ours], va="center")
            figure.text(at + 0.015, height, f"{name}, {dtype}", fontsize=9.5, color=INK, va="center")
            at += 0.14
    figure.text(at, height, f"(×: times {best})", fontsize=9.5, color=QUIET, va="center")


def markdown(result):
    """The table of the rows that were timed: samples per second and memory, times the reference's in brackets."""
    rows = {(row["dtype"], row["row"]): row for row in result["rows"] if row["seconds"]}
    dtypes = list(dict.fromkeys(dtype for dtype, _ in rows))
    lines = [
        "| | " + " | ".join(f"{dtype}: samples/s | GFLOP/s | of matmul | memory" for dtype in dtypes) + " |",
        "|---|" + "---:|" * (4 * len(dtypes)),
    ]
    for name in dict.fromkeys(name for _, name in rows):
        cells = [_title(result["rows"], name)]
        for dtype in dtypes:
            cells += _cells(rows.get((dtype, name)), rows.get((dtype, "reference")))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(row, reference):
    if row is None:
        return [""] * 4
    speed, memory = f"{row['samples_per_second']:.3g}", f"{row['peak_bytes'] / 2**30:.2f} GiB"
    if reference and row is not reference:
        speed += f" ({row['samples_per_second'] / reference['samples_per_second']:.1f}×)"
        memory += f" ({row['peak_bytes'] / reference['peak_bytes']:.2f}×)"
    return [speed, f"{row['flops_per_second'] / 1e9:,.0f}", f"{100 * row['matmul_share']:.0f} %", memory]


def block(result):
    """What docs/performance.md says of a result: the picture, where it was measured, the table."""
    about = result["environment"]
    return (
        f"![samples per second and memory of each row](../bench/plots/train_step.png)\n\n{about['device']}; torch "
        f"{about['versions']['torch']}, transformers {about['versions']['transformers']}; commit "
        f"{about['commit']}, "
        f"{about['date']}.\n\n{markdown(result)}"
    )


def into_readme(text, table, begin=BEGIN, end=END):
    """A page's text with `table` between its two comments."""
    before, _, rest = text.partition(f"{begin}\n")
    _, found, behind = rest.partition(f"{end}\n")
    assert found, f"the page needs the lines {begin} and {end}"
    return f"{before}{begin}\n{table}\n{end}\n{behind}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("json", type=Path, help="file that bench/train_step.py wrote")
    parser.add_argument("--png", type=Path, default=ROOT / "bench" / "plots" / "train_step.png")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "docs" / "performance.md", help="the page that gets the table"
    )
    arguments = parser.parse_args(argv)
    result = json.loads(arguments.json.read_text())
    draw(result).savefig(arguments.png)
    arguments.readme.write_text(into_readme(arguments.readme.read_text(), block(result)))


if __name__ == "__main__":
    main()
