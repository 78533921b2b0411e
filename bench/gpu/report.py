"""What GPU checks measured, as files, pictures and READMEs' tables: python -m bench.gpu.report FILE …

Takes results.jsonl files in the order of their runs, or what it wrote itself (bench/results/gpu-CARD.jsonl) and newer
ones. Writes of each card the rows, the training ladder, the sweep's best and pictures, and into README.md and
bench/README.md between their `gpu` comments what was to be reached beside what was. The exit code is 1 where a training
row's loss or gradient norm is wrong.
"""

import argparse
import json
import os
from pathlib import Path

from bench import ladder_plot, model, roofline
from bench import report as kernels
from bench.gpu import goals, ladder, merge, profiles

ROOT = Path(__file__).resolve().parent.parent.parent
BEGIN, END = "<!-- gpu: python -m bench.gpu.report bench/results/gpu-*.jsonl -->", "<!-- end of gpu -->"


def sweep(card, rows):
    """The best candidate of each kernel and case beside today's tiles, as text; "" where nothing was swept."""
    cells = [("kernel and case", "best", "of a copy", "today", "of a copy", "×", "candidate", "commits")]
    for row in card.of("sweep"):
        if not row.get("best"):
            continue
        today = next(
            (
                other
                for other in rows
                if other["way"] == "ours" and (other["kernel"], other["case"]) == (row["kernel"], row["case"])
            ),
            None,
        )
        cells.append(
            (
                f"{row['kernel']} {row['case']}",
                kernels.duration(row["seconds"]),
                _percent(row.get("percent_of_copy")),
                kernels.duration(today["median"]) if today else "not measured",
                _percent(today.get("percent_of_copy")) if today else "",
                f"{today['median'] / row['seconds']:.2f}" if today else "",
                " ".join(f"{key}={value}" for key, value in row["candidate"].items()),
                ", ".join(dict.fromkeys([row["commit"], *([today["commit"]] if today else [])])),
            )
        )
    return "\n".join(kernels.aligned(cells)) + "\n" if len(cells) > 1 else ""


def _percent(value):
    return "" if value is None else f"{value:.0f} %"


def failures(card):
    """What failed or was left out, a line each; a task's end only where no row of it says why."""
    told = {(row["stage"], row["task"]) for row in card.failed if row["row"] != "end"}
    lines = []
    for row in card.failed:
        if row["row"] != "end" or (row["stage"], row["task"]) not in told:
            name = row["task"] if row["row"] == "end" else f"{row['task']}, {row['row']}"
            why = (row.get("error") or "not what it must be").removeprefix("failed: ").splitlines()[0][:200]
            lines.append(f"failed: {row['stage']} {name}: {why} (`{row['commit']}`)")
    for stage in dict.fromkeys(row["stage"] for row in card.left_out):
        names = ", ".join(dict.fromkeys(row["task"] for row in card.left_out if row["stage"] == stage))
        lines.append(f"not measured, for lack of time or of what it needs: {stage} {names}")
    return lines


def where(card, rows):
    """Card, driver, versions and dates of rows, for the line above a table."""
    last = rows[-1]
    drivers = sorted({row["driver"] for row in card.rows if row["driver"]})
    versions = ", ".join(f"{name} {last['versions'][name]}" for name in ("torch", "triton", "transformers"))
    driver = f"driver {' and '.join(drivers)}; " if drivers else ""
    return (
        f"{card.name}; {driver}{versions}; {' and '.join(sorted({row['date'] for row in rows}))}; commits in the table."
    )


class Report:
    """What is written about one card.

    Args:
        results, plots: folders of its files and pictures.
    """

    def __init__(self, card, results, plots):
        self.card, self.results, self.plots = card, Path(results), Path(plots)
        self.made, self.rows = ladder.result(card), kernels.of_checks([card])
        self.sweep = sweep(card, self.rows)

    def write(self):
        """Files and pictures of what was measured."""
        self._lines(f"gpu-{self.card.slug}.jsonl", merge.lines(self.card))
        if self.made:
            ladder.path(self.results, self.card, self.made).write_text(json.dumps(self.made, indent=1) + "\n")
            ladder_plot.draw(self.made).savefig(self.picture("train_step"))
        if self.rows:
            roofline.draw(self.rows).savefig(self.picture("kernels"))
        if figure := profiles.draw(self.card):
            figure.savefig(self.picture("step"))
        if self.sweep:
            (self.results / f"sweep-{self.card.slug}.txt").write_text(self.sweep)

    def _lines(self, name, rows):
        (self.results / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def picture(self, name):
        return self.plots / f"{name}-{self.card.slug}.png"

    def text(self):
        """For the terminal."""
        parts = [kernels.table(self.rows)] if self.rows else []
        parts += [ladder.table(self.made), model.beside(self.card, self.made["preset"])] if self.made else []
        parts += [self.sweep, *(f"fault: {fault}" for fault in self.faults()), *failures(self.card)]
        return "\n".join(filter(None, [f"{self.card.name}:", *parts]))

    def faults(self):
        return self.made["faults"] if self.made else []

    def short(self, readme):
        """README's part."""
        lines = goals.markdown(goals.short(self.card, self.made, self.rows))
        return f"{where(self.card, self.card.rows)}\n\n{lines}\n\n{self._shown(readme, 'train_step')}".rstrip()

    def long(self, readme):
        """bench/README's part."""
        card, made = self.card, self.made
        lines = [
            *goals.training_lines(card, made),
            *goals.memory_lines(card, made),
            *goals.quality_lines(card),
            *goals.extraction_lines(card),
            *goals.kernel_lines(card, self.rows),
        ]
        parts = [f"### {card.name}", where(card, card.rows), goals.markdown(lines)]
        if made:
            parts += [self._shown(readme, "train_step"), ladder.table(made)]
        parts += [self._shown(readme, "step"), self._shown(readme, "kernels")]
        notes = [f"wrong: {fault}" for fault in self.faults()] + failures(card)
        return "\n\n".join(filter(None, [*parts, "\n".join(f"- {note}" for note in notes)]))

    def _shown(self, readme, name):
        path = self.picture(name)
        titles = {
            "train_step": "samples per second and memory of each row",
            "step": "where a training step's time goes",
            "kernels": "kernels against a copy and a matrix product",
        }
        return f"![{titles[name]}]({os.path.relpath(path, Path(readme).parent)})" if path.exists() else ""


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="results.jsonl, the newest last")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="folder of rows and ladders")
    parser.add_argument("--plots", type=Path, default=ROOT / "bench" / "plots", help="folder of pictures")
    parser.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", help="bench/README.md beside it gets the long tables"
    )
    arguments = parser.parse_args(argv)
    try:
        cards = merge.read(arguments.files)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    readmes = (arguments.readme, Report.short), (arguments.readme.parent / "bench" / "README.md", Report.long)
    for readme, _ in readmes:
        if not readme.is_file() or BEGIN not in readme.read_text():
            parser.error(
                f"{readme} is no file with the line {BEGIN}; --readme names a copy of README.md beside which "
                "bench/README.md lies"
            )
    reports = [Report(card, arguments.out, arguments.plots) for card in cards]
    for folder in (arguments.out, arguments.plots):
        folder.mkdir(parents=True, exist_ok=True)
    for report in reports:
        report.write()
        print(report.text(), end="\n\n")
    for readme, part in readmes:
        text = "\n\n".join(part(report, readme) for report in reports)
        readme.write_text(ladder_plot.into_readme(readme.read_text(), text, BEGIN, END))
    return 1 if any(report.faults() for report in reports) else 0


if __name__ == "__main__":
    raise SystemExit(main())
