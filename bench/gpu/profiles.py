"""Where a training step's time on the GPU goes, as a picture: the kernels of each profiled row, in groups."""

import re

from matplotlib.figure import Figure

from bench.roofline import GRID, INK, QUIET

# The first expression that a kernel's name holds names its group. Attention comes first: its templates name CUTLASS.
GROUPS = (
    ("attention", r"flash|fmha|attention", "#7048e8"),
    ("matrix products", r"nvjet|cutlass|gemm|gemv|splitk", "#1f6feb"),
    (
        "gathering keys",
        r"CatArray|gather|index|compute_grad_weight|sum_and_scatter|radix_?sort|place_keys|_collect_kernel",
        "#d9480f",
    ),
    ("norms", r"rms_norm", "#2f9e44"),
    ("SwiGLU", r"swiglu", "#66a80f"),
    ("rotary", r"rope", "#0b7285"),
    ("quantise", r"quantize", "#e8590c"),
    ("optimizer", r"adamw|multi_tensor_apply", "#c2255c"),
    ("copies", r"Memcpy|Memset|copy_kernel|Fill", "#868e96"),
)
REST = "the rest", "#ced4da"
ROW, CELLS, HEAD, FOOT, WIDTH, LEFT = 0.62, 0.24, 1.0, 0.85, 11.5, 2.3  # inches


def group_of(name):
    """The group of a kernel."""
    return next((group for group, holds, _ in GROUPS if re.search(holds, name, re.I)), REST[0])


def grouped(row):
    """{group: milliseconds} of a profile's row, in the table's order; what it does not name is the rest's."""
    spent = dict.fromkeys([*(group for group, *_ in GROUPS), REST[0]], 0.0)
    for name, milliseconds, _ in row["kernels"]:
        spent[group_of(name)] += milliseconds
    spent[REST[0]] += row["device_ms"] - sum(spent.values())
    return spent


def of(card):
    """A card's profiled rows."""
    return [row for row in card.of("train") if row["task"].endswith(" profile")]


def draw(card):
    """A figure of a card's profiles: a bar each, and a table of its groups. None without one."""
    rows = of(card)
    if not rows:
        return None
    steps = {row["row"]: row["seconds"] for row in card.of("train") if "loss" in row and "seconds" in row}
    spent = [grouped(row) for row in rows]
    shown = [(group, colour) for group, _, colour in GROUPS] + [REST]
    shown = [(group, colour) for group, colour in shown if any(groups[group] for groups in spent)]
    height = HEAD + ROW * len(rows) + FOOT + CELLS * (len(shown) + 3) + 0.3
    figure = Figure(figsize=(WIDTH, height), dpi=130, facecolor="white")
    figure.text(
        0.3 / WIDTH,
        1 - 0.35 / height,
        "Where a training step's time goes",
        fontsize=16,
        fontweight="bold",
        color=INK,
        va="center",
    )
    last = rows[-1]
    figure.text(
        0.3 / WIDTH,
        1 - 0.68 / height,
        f"kernels of one step; {card.name}; torch {last['versions']['torch']}; "
        f"commit {' and '.join(dict.fromkeys(row['commit'] for row in rows))}, {last['date']}",
        fontsize=9.5,
        color=QUIET,
        va="center",
    )
    axis = figure.add_axes(
        (LEFT / WIDTH, 1 - (HEAD + ROW * len(rows)) / height, 1 - (LEFT + 0.4) / WIDTH, ROW * len(rows) / height)
    )
    _bars(axis, rows, spent, shown)
    top = height - HEAD - ROW * len(rows) - FOOT
    _table(figure, rows, spent, shown, steps, top, height)
    return figure


def _bars(axis, rows, spent, shown):
    longest = max(row["device_ms"] for row in rows)
    for place, (row, groups) in enumerate(zip(rows, spent)):
        left = 0.0
        for group, colour in shown:
            axis.barh(place, groups[group], left=left, height=0.6, color=colour, edgecolor="white", linewidth=0.5)
            if groups[group] > 0.05 * longest:
                axis.text(
                    left + groups[group] / 2,
                    place,
                    f"{100 * groups[group] / row['device_ms']:.0f} %",
                    fontsize=8.5,
                    color="white" if group != REST[0] else INK,
                    ha="center",
                    va="center",
                )
            left += groups[group]
    axis.set_yticks(range(len(rows)), [row["row"] for row in rows], fontsize=10, color=INK)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1.02 * longest)
    axis.set_xlabel("milliseconds on the GPU", fontsize=9.5, color=INK)
    axis.xaxis.grid(True, color=GRID)
    axis.set_axisbelow(True)
    axis.tick_params(length=0, labelcolor=INK)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)


def _table(figure, rows, spent, shown, steps, top, height):
    """Milliseconds and percentages of each group, a column each row; below them the sums and the steps by the clock."""
    step = (WIDTH - LEFT - 0.4) / len(rows)
    columns = [LEFT + step * (place + 1) - 0.3 for place in range(len(rows))]
    lines = [
        (group, colour, [_cell(groups[group], row["device_ms"]) for row, groups in zip(rows, spent)])
        for group, colour in shown
    ]
    lines += [
        ("all kernels", None, [_cell(row["device_ms"], row["device_ms"], row["launches"]) for row in rows]),
        (
            "step by the clock",
            None,
            [f"{1e3 * steps[row['row']]:,.0f} ms" if row["row"] in steps else "" for row in rows],
        ),
    ]
    for x, row in zip(columns, rows):
        figure.text(
            x / WIDTH,
            (top + 0.05) / height,
            row["row"],
            fontsize=9.5,
            fontweight="bold",
            color=INK,
            ha="right",
            va="center",
        )
    for place, (name, colour, cells) in enumerate(lines):
        y = (top - CELLS * (place + 1)) / height
        if colour:
            figure.text(0.3 / WIDTH, y, "■", fontsize=11, color=colour, va="center")
        figure.text(0.52 / WIDTH, y, name, fontsize=9.5, color=INK if colour else QUIET, va="center")
        for x, cell in zip(columns, cells):
            figure.text(x / WIDTH, y, cell, fontsize=9.5, color=INK if colour else QUIET, ha="right", va="center")
    named = " and ".join(str(count) for count in sorted({len(row["kernels"]) for row in rows}))
    figure.text(
        0.3 / WIDTH,
        (top - CELLS * (len(lines) + 1)) / height,
        f"{REST[0].capitalize()} holds what no group is for, and every kernel beyond the {named} longest. A "
        "dash: none of those.",
        fontsize=8.5,
        color=QUIET,
        va="center",
    )


def _cell(milliseconds, total, launches=None):
    if launches is not None:
        return f"{milliseconds:,.0f} ms, {launches:,} launches"
    return f"{milliseconds:,.1f} ms  {100 * milliseconds / total:4.1f} %" if milliseconds else "—"
