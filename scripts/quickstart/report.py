"""Print the table of ``OUT/results.jsonl`` and judge it; the exit code is 1 if a figure falls short.

    python report.py OUT [--compare]

With --compare it prints ``OUT/compare.jsonl``, what shared videos and the video first cost, and judges nothing.
"""

import argparse
import json
import sys
from pathlib import Path

LEAST_RIGHT, MOST_TURNED = 0.90, 0.10


def compare(out):
    """Print how many answers each way of training gets right."""
    row = "{:<38}{:>14}{:>14}".format
    print(row("right answers of the same questions", "first?", "left?"))
    for line in (out / "compare.jsonl").read_text().splitlines():
        result = json.loads(line)
        print(
            row(
                result["name"],
                *(
                    "{:.0f} of {}".format(
                        result[family]["right"] * result[family]["questions"], result[family]["questions"]
                    )
                    for family in ("first", "left")
                ),
            )
        )
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    out = arguments.out
    if arguments.compare:
        return compare(out)
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]

    row = "{:<28}{:>12}{:>16}{:>12}{:>12}".format
    print(row("held-out clips,", "first?", "first?", "left?", "left?"))
    print(row("exact match", "as is", "time reversed", "as is", "mirrored"))
    short = []
    for result in results:
        first, left = result["first"], result["left"]
        figures = first["right"], first["turned"], left["right"], left["turned"]
        print(row(result["name"], *(f"{figure:.0%}" for figure in figures)))
        least_right, most_turned = min(figures[0::2]), max(figures[1::2])
        if result["name"].startswith("after") and (least_right < LEAST_RIGHT or most_turned > MOST_TURNED):
            short.append(result["name"])
    least, most = f"≥ {LEAST_RIGHT:.0%}", f"≤ {MOST_TURNED:.0%}"
    print(row("wanted after each stage", least, most, least, most))
    print(row("naming either colour", "50%", "50%", "50%", "50%"))
    for stage in ("stage1", "stage2"):
        print(f"loss curve of {stage}: {out / stage / 'loss_curve.png'}")
    if short:
        print(f"short of what is asked for: {', '.join(short)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
