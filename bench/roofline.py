"""The picture of the kernels' benchmark: what each achieves against the roof that its own run measured."""

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

INK, QUIET, GRID, OURS, ROOF = "#1f2933", "#616e7c", "#e4e7eb", "#1f6feb", "#d9480f"
WAYS = {  # marker and colour of the ways that ours is compared with
    "eager": ("o", "#9aa5b1"),
    "torch.compile": ("D", "#2f9e44"),
    "Liger": ("s", "#9c36b5"),
    "quack": ("P", "#e8590c"),
    "bitsandbytes": ("^", "#0b7285"),
    "reference's chain": ("X", "#c92a2a"),
}
ROW, EDGE, TITLE = 0.42, 1.15, 0.6  # inches: a row's height, and what titles and axes take in a panel
WIDTH, LEFT, RIGHT = 10.5, 3.55, 1.25


def draw(rows):
    """A figure of rows (see `bench.report.read`): GB/s and TFLOP/s on a GPU, the ratio to the reference on a CPU.

    Only measured values are drawn; without a GPU's rows the picture says that they are missing.
    """
    gpu = _newest_device([row for row in rows if row["on_gpu"]])
    cpu = _newest_device([row for row in rows if not row["on_gpu"]])
    panels = [
        (draw_panel, chosen)
        for draw_panel, chosen in (
            (_bandwidth, [row for row in gpu if row["bytes"]]),
            (_arithmetic, [row for row in gpu if row["flops"]]),
            (_ratios, cpu),
        )
        if chosen
    ]
    heights = [EDGE + ROW * len(_groups(chosen)) for _, chosen in panels]
    total = sum(heights) + TITLE + (0 if gpu else 0.3)
    figure = Figure(figsize=(WIDTH, total), dpi=130, facecolor="white")
    figure.text(
        0.3 / WIDTH, 1 - 0.38 / total, "fastvid's kernels", fontsize=16, fontweight="bold", color=INK, va="center"
    )
    if not gpu:
        figure.text(
            0.3 / WIDTH, 1 - 0.72 / total, "On a GPU: not yet measured.", fontsize=10.5, color=ROOF, va="center"
        )
    top = total - TITLE - (0 if gpu else 0.3)
    for (draw_panel, chosen), height in zip(panels, heights):
        box = (LEFT / WIDTH, (top - height + 0.5) / total, 1 - (LEFT + RIGHT) / WIDTH, (height - EDGE) / total)
        axis = figure.add_axes(box)
        _dress(axis, chosen, (top - 0.22) / total)
        draw_panel(axis, _groups(chosen))
        top -= height
    return figure


def _newest_device(rows):
    return [row for row in rows if row["device"] == rows[-1]["device"]]


def _groups(rows):
    """{(kernel, case): {way: row}} in the rows' order."""
    groups = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["case"]), {})[row["way"]] = row
    return groups


def _dress(axis, rows, title_height):
    groups, row = _groups(rows), rows[-1]
    axis.set_yticks(range(len(groups)))
    axis.set_yticklabels([])
    axis.set_ylim(len(groups) - 0.4, -0.6)
    for place, (kernel, case) in enumerate(groups):
        axis.text(
            -0.015,
            place - 0.16,
            kernel,
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=9.5,
            color=INK,
        )
        axis.text(
            -0.015,
            place + 0.2,
            case,
            transform=axis.get_yaxis_transform(),
            ha="right",
            va="center",
            fontsize=min(7.0, 400 / len(case)),
            color=QUIET,
        )  # so that the longest fit beside the bars
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(colors=QUIET, length=0, labelsize=8.5)
    axis.grid(axis="x", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,g}"))
    commits = " and ".join(dict.fromkeys(other["commit"] for other in rows))
    where = (
        f"{row['device']}; torch {row['versions']['torch']}; commit {commits}, {max(other['date'] for other in rows)}"
    )
    axis.figure.text(0.3 / WIDTH, title_height, where, fontsize=9, color=QUIET, va="center")


def _bandwidth(axis, groups):
    _against_roof(axis, groups, "gb_per_s", "copy_bytes_per_second", 1e9, "GB/s", "copy")


def _arithmetic(axis, groups):
    _against_roof(axis, groups, "tflop_per_s", "matmul_flops_per_second", 1e12, "TFLOP/s", "matrix product")


def _against_roof(axis, groups, rate, roof, unit, label, roof_name):
    """A bar for ours, markers for the others, and the roof as a line."""
    height = max(row[roof] for ways in groups.values() for row in ways.values()) / unit
    axis.axvline(height, color=ROOF, linewidth=1.5)
    axis.text(height, -0.66, f"{roof_name} {height:,.0f}", color=ROOF, fontsize=8.5, ha="center", va="bottom")
    drawn = {}
    for place, ways in enumerate(groups.values()):
        for way, row in ways.items():
            if way == "ours":
                axis.barh(place, row[rate], height=0.5, color=OURS, alpha=0.85)
                axis.text(
                    1.02,
                    place,
                    f"{100 * row[rate] * unit / row[roof]:.0f} %",
                    color=OURS,
                    va="center",
                    fontsize=9.5,
                    fontweight="bold",
                    transform=axis.get_yaxis_transform(),
                )
            else:
                marker, color = WAYS[way]
                (drawn[way],) = axis.plot(
                    row[rate],
                    place,
                    marker,
                    color=color,
                    markersize=6.5,
                    markeredgecolor="white",
                    markeredgewidth=0.8,
                    linestyle="none",
                )
    axis.set_xlim(0, max(height, *(row[rate] for ways in groups.values() for row in ways.values())) * 1.04)
    axis.set_xlabel(f"{label} (bar: ours)", color=QUIET, fontsize=9, loc="left", labelpad=2)
    if drawn:
        axis.legend(
            drawn.values(),
            drawn,
            loc="upper right",
            bbox_to_anchor=(1.0, -0.32 / _inches(axis)),
            frameon=False,
            borderaxespad=0,
            ncols=len(drawn),
            fontsize=8.5,
            labelcolor=INK,
            handletextpad=0.1,
            columnspacing=1.2,
        )


def _inches(axis):
    return axis.get_position().height * axis.figure.get_figheight()


def _ratios(axis, groups):
    """How many times as fast as the reference's own code, on the same inputs in the same run."""
    from bench.report import duration

    largest = 1
    for place, ways in enumerate(groups.values()):
        ours, chain = ways["ours"], ways["reference's chain"]
        ratio = chain["median"] / ours["median"]
        largest = max(largest, ratio)
        axis.barh(place, ratio, height=0.5, color=OURS, alpha=0.85)
        axis.text(
            1.02,
            place - 0.15,
            f"{ratio:.1f}×",
            color=OURS,
            va="center",
            fontsize=9.5,
            fontweight="bold",
            transform=axis.get_yaxis_transform(),
        )
        axis.text(
            1.02,
            place + 0.21,
            f"{duration(ours['median'])} of {duration(chain['median'])}",
            color=QUIET,
            va="center",
            fontsize=7,
            transform=axis.get_yaxis_transform(),
        )
    axis.axvline(1, color=ROOF, linewidth=1.5)
    axis.text(1, -0.66, "reference", color=ROOF, fontsize=8.5, ha="center", va="bottom")
    axis.set_xlim(0, largest * 1.04)
    axis.set_xlabel(
        "times as fast as the reference's code on this CPU", color=QUIET, fontsize=9, loc="left", labelpad=2
    )
