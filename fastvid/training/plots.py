"""The picture that a training run leaves: its loss and its learning rate over the steps."""

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fastvid.files import StrPath, atomic_path, shown

INK, QUIET, GRID = "#1f2933", "#7b8794", "#e4e7eb"
LOSS, EVAL, RATE = "#1f6feb", "#d9480f", "#7b8794"
_LOG_FROM = 10  # largest over smallest loss from which on a linear axis shows a flat line
_LONGEST_NAME = 60


def draw_loss_curve(lines: Sequence[dict[str, Any]], png_path: StrPath, name: str | None = None) -> bool:
    """Draw the lines of a metrics.jsonl as a PNG of 900 x 600 pixels, replaced atomically.

    Above the loss: raw faint, smoothed strong, validation losses as points; on a log axis where the largest is ten
    times the smallest. Below the learning rate, where it was logged. Uses no state of matplotlib's that others share
    (no pyplot).

    Args:
        lines: as `fastvid.training.metrics.read_metrics` gives them.
        name: of the run, for the title.

    Returns:
        Whether there was a loss to draw; without one no file is written.
    """
    loss, evaluation, rate = (_points(lines, name) for name in ("loss", "eval_loss", "learning_rate"))
    if not loss and not evaluation:
        return False
    figure = Figure(figsize=(9, 6), dpi=100, facecolor="white")
    heights = [4, 1] if rate else [1]
    axes = figure.subplots(
        len(heights),
        1,
        sharex=True,
        squeeze=False,
        gridspec_kw={"height_ratios": heights, "hspace": 0.12, "left": 0.1, "right": 0.97, "top": 0.86, "bottom": 0.1},
    )[:, 0]
    _draw_losses(axes[0], loss, evaluation)
    if rate:
        _draw_rate(axes[1], rate)
    last = max(step for step, _ in loss + evaluation)
    for axis in axes:
        _dress(axis, last)
    axes[-1].set_xlabel("optimizer step", color=QUIET)
    _title(figure, loss, evaluation, name)
    figure.align_ylabels(axes)

    with atomic_path(png_path) as temporary:
        figure.savefig(temporary, format="png")
    return True


def _draw_losses(axis, loss, evaluation):
    if loss:
        steps, values = zip(*loss)
        smooth = smoothed(values, span=math.sqrt(len(values)))
        if smooth != list(values):
            axis.plot(steps, values, color=LOSS, alpha=0.45, linewidth=1, label="training, as logged")
        axis.plot(
            steps,
            smooth,
            color=LOSS,
            linewidth=2,
            marker="o" if len(loss) == 1 else None,
            label="training" if smooth == list(values) else "training, smoothed",
        )
    if evaluation:
        axis.plot(
            *zip(*evaluation),
            color=EVAL,
            linewidth=1,
            linestyle=(0, (4, 3)),
            marker="o",
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=1,
            label="validation",
        )
    axis.set_ylabel("loss per supervised token", color=QUIET)
    values = [value for _, value in loss + evaluation]
    if min(values) > 0 and max(values) >= _LOG_FROM * min(values):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.yaxis.set_minor_locator(NullLocator())
    else:
        axis.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
    axis.legend(loc="upper right", frameon=False, labelcolor=INK, fontsize=10, handlelength=1.8)


def _draw_rate(axis, rate):
    peak = max(value for _, value in rate)
    axis.plot(*zip(*rate), color=RATE, linewidth=1.5, marker="o" if len(rate) == 1 else None)
    axis.set_ylabel("learning rate", color=QUIET)
    axis.set_ylim(0, peak * 1.15 or 1)
    axis.set_yticks([0, peak] if peak else [0], ["0", f"{peak:.2g}".replace("e-0", "e-")] if peak else ["0"])


def _dress(axis, last):
    axis.grid(axis="y", color=GRID, linewidth=1)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(QUIET)
    axis.tick_params(colors=QUIET, length=0, labelsize=9)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axis.xaxis.set_major_locator(MaxNLocator(8, integer=True, steps=[1, 2, 5, 10]))
    axis.set_xlim(0, max(last, 1) * 1.015)


def _title(figure, loss, evaluation, name):
    title = "Training loss"
    if name:
        name = shown(name)  # bytes that are no text cannot be drawn; a dollar sign would begin mathematics
        name = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}…"
        title = f"Training loss of {name}".replace("$", r"\$")
    figure.text(0.1, 0.955, title, fontsize=15, fontweight="bold", color=INK, va="center")
    parts = [
        f"{kind} {points[-1][1]:.4g} at step {points[-1][0]:,}"
        for kind, points in (("training", loss), ("validation", evaluation))
        if points
    ]
    figure.text(0.1, 0.91, "last: " + ", ".join(parts), fontsize=10, color=QUIET, va="center")


def _points(lines, name):
    """[(step, value)] in order of steps; of lines for the same step the last counts, non-finite ones never do."""
    found = {line["step"]: line[name] for line in lines if isinstance(line.get(name), int | float)}
    return sorted((step, value) for step, value in found.items() if math.isfinite(value))


def smoothed(values: Sequence[float], span: float) -> list[float]:
    """Mean of each value and its neighbours, about `span` in all, as many before as after: no lag; span < 3:
    unchanged."""
    result = []
    for i in range(len(values)):
        reach = min(int(span) // 2, i, len(values) - 1 - i) if span >= 3 else 0
        result.append(math.fsum(values[i - reach : i + reach + 1]) / (2 * reach + 1))
    return result
