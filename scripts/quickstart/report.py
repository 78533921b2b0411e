"""Print the table of ``OUT/results.jsonl`` and judge it; the exit code is 1 if a figure falls short.

    python report.py OUT
"""

import argparse
import json
import sys
from pathlib import Path

LEAST_RIGHT, MOST_TURNED = 0.90, 0.10


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    results = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]

    print("held-out clips, exact match          which colour is first?        which colour is left?")
    print("                                    as is   time reversed        as is   mirrored")
    short = []
    for result in results:
        first, left = result["first"], result["left"]
        judged = result["name"].startswith("after")
        print(f"{result['name']:<34}  {first['right']:5.0%}   {first['turned']:13.0%}        "
              f"{left['right']:5.0%}   {left['turned']:8.0%}")
        if judged and (min(first["right"], left["right"]) < LEAST_RIGHT
                       or max(first["turned"], left["turned"]) > MOST_TURNED):
            short.append(result["name"])
    print(f"asked for, after each stage         ≥ {LEAST_RIGHT:.0%}           ≤ {MOST_TURNED:.0%}        "
          f"≥ {LEAST_RIGHT:.0%}      ≤ {MOST_TURNED:.0%}      (naming either colour: 50%)")
    for stage in ("stage1", "stage2"):
        print(f"loss curve of {stage}: {out / stage / 'loss_curve.png'}")
    if short:
        print(f"short of what is asked for: {', '.join(short)}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
