"""Results of several GPU checks as one list of rows a card, each of which says where it was measured.

A later row replaces an earlier one of the same stage, task and name on the same card. What failed is kept apart until a
later run measures it. What `lines` writes can be read again, together with later checks.
"""

import re
import statistics
from dataclasses import dataclass, field

from bench.gpu import results

ABOUT = ("card", "driver", "python", "versions", "commit", "date")


@dataclass
class Card:
    """What was measured on a card.

    Attributes:
        name: as CUDA gives it.
        rows: measured ones, in the order in which they first came.
        failed: of rows and of tasks that no later run measured.
        left_out: ends of tasks that nothing was measured of.
    """

    name: str
    rows: list = field(default_factory=list)
    failed: list = field(default_factory=list)
    left_out: list = field(default_factory=list)

    @property
    def slug(self):
        """The name as part of a file's."""
        words = re.findall(r"[a-z0-9]+", self.name.lower())
        return "-".join(word for word in words if word != "nvidia")

    def of(self, stage):
        """Its rows of a stage."""
        return [row for row in self.rows if row["stage"] == stage]

    def why_missing(self, stage, task):
        """Why nothing was measured of a task, in brackets; "" where no run tried."""
        for row in (*self.failed, *self.left_out):
            if (row["stage"], row["task"]) == (stage, task):
                return f" ({row['error']})" if row.get("error") else ""
        return ""

    def roof(self, name, row):
        """(FLOP/s that the probe measured, the row that says so), of the run of `row` before another; (None, None).

        Args:
            name: "burst" or "sustained": a large bf16 product; "fp8": the fastest products of a layer in FP8. Where a
                run has no probe, the bf16 product that its kernels were compared with is its burst.
        """
        end = "fp8" if name == "fp8" else f"product, {name}"
        found = [other for other in self.of("probe") if other["row"].endswith(end)]
        here = [other for other in found if run_of(other) == run_of(row)]
        compared = [other for other in self.rows if "matmul_flops_per_second" in other and run_of(other) == run_of(row)]
        if name == "burst" and compared and not here:
            return statistics.median(other["matmul_flops_per_second"] for other in compared), compared[0]
        best = max(here or found, key=lambda other: other["flops_per_second"], default=None)
        return (best["flops_per_second"], best) if best else (None, None)


def run_of(row):
    """What rows of one run share."""
    return row["commit"], row["date"], row["driver"]


def read(paths):
    """[Card] of results files, or of folders with one, in the order of their runs. Runs at tiny sizes are passed over.

    Raises:
        ValueError: no file holds a run on a GPU, or rows of one do not say what they were measured on.
    """
    cards = {}
    for path in paths:
        for row in described(results.read(path), path):
            _add(cards.setdefault(row["card"], _Merging()), row)
    if not cards:
        raise ValueError(f"{', '.join(map(str, paths))}: no rows of a GPU; bash scripts/gpu_check.sh writes them there")
    return [merging.card(name) for name, merging in cards.items()]


def described(rows, path):
    """Rows of a file, each with ABOUT: from the environment row before it, and the card's row of the same run."""
    runs = []
    for row in rows:
        if row["stage"] == "run":
            runs.append((row, []))
        elif "card" in row:  # as `lines` wrote it
            yield row
        elif not runs:
            raise ValueError(f"{path}: rows without an environment row before them; give the whole file")
        else:
            runs[-1][1].append(row)
    for environment, measured in runs:
        if environment["small"]:
            continue
        driver = next((row["driver_version"] for row in measured if "driver_version" in row), None)
        about = {"card": environment["device"], "driver": driver, **{key: environment[key] for key in ABOUT[2:]}}
        for row in measured:
            yield {key: value for key, value in row.items() if key != "at"} | about


class _Merging:
    """A card's rows by stage, task and name, as they come."""

    def __init__(self):
        self.rows, self.failed, self.left_out = {}, {}, {}

    def card(self, name):
        measured = {key[:2] for key in (*self.rows, *self.failed)}
        return Card(
            name,
            list(self.rows.values()),
            list(self.failed.values()),
            [row for key, row in self.left_out.items() if key[:2] not in measured],
        )


def _add(merging, row):
    key = row["stage"], row["task"], f"best: {row['case']}" if row.get("best") else row["row"]
    if row["status"] in ("left_out", "absent") or "absent" in row:
        merging.left_out[key] = row
    elif row["status"] == "failed":
        merging.failed[key] = row
    else:
        merging.failed.pop(key, None)
        if row["row"] != "end":
            merging.rows[key] = row


def lines(card):
    """What the rows of a card are stored as: one dict each, failed ones and those left out last."""
    return [*card.rows, *card.failed, *card.left_out]
