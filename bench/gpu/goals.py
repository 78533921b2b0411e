"""What was to be reached on a GPU, beside what was measured: one line a figure, for README and bench/README."""

from dataclasses import dataclass

from bench.gpu import ladder
from bench.train_presets import ROWS

KERNELS = {  # least percentage of the copy bandwidth of the same run
    "spatio_temporal_pool": 90,
    "grid_pool": 85,
    "frame_patchify": 75,
    "add_layer_norm": 92,
    "quick_gelu": 90,
    "splice_video": 85,
    "add_rms_norm": 92,
    "rope_qk": 90,
    "rope_keys": 90,
    "merge_parts": 88,
    "swiglu": 90,
    "adamw8bit_step": 75,
}
PEAK = 990e12  # dense bf16 FLOP/s of the data sheet
CARD = "H200"  # what speeds are meant for; shares and ratios hold for every card
MEMORY = 6  # percent between the plan's estimate and the peak
# Rows that must run on a small card: {row: (what, GB of 10⁹ bytes)}. A card sold with 24 GB has 25.8 of these, so 1.8
# are left for its context and what the allocator cannot fill.
SMALL_CARDS = {"smallest": ("7B adapter, bf16, all recomputed", 24), "smallest_nf4": ("the same in NF4", 12)}
FP8_COSINE = 0.99  # of an FP8 tower's states to the unquantised tower's, on average
CURVE = 0.5  # percent between FP8's mean loss and bf16's


@dataclass(frozen=True)
class Line:
    """A figure.

    Attributes:
        what, goal, measured, share: the table's cells; `share` is of the card's roof.
        reached: None where there is no goal, or nothing was measured.
        commits: of the rows that it comes from.
    """

    what: str
    goal: str
    measured: str
    share: str = ""
    reached: bool | None = None
    commits: tuple = ()


def _line(what, goal, reached, measured, share, *rows):
    return Line(
        what,
        goal,
        measured + (" — **falls short**" if reached is False else ""),
        share,
        reached,
        tuple(dict.fromkeys(row["commit"] for row in rows)),
    )


def _missing(what, goal, why=""):
    return Line(what, goal, f"not measured{why}")


def kernel_lines(card, rows):
    """A line for each case of each kernel: ours against the copy or the product of the same run.

    Args:
        rows: of `bench.report.of_checks`.
    """
    from bench.report import KERNELS as ALL
    from bench.report import duration, percent_of_roof

    for kernel in ALL:
        found = [row for row in rows if row["kernel"] == kernel and row["way"] == "ours" and row["device"] == card.name]
        least = KERNELS.get(kernel)
        goal = f"≥ {least} % of a copy" if least else "—"
        if not found:
            yield _missing(f"`{kernel}`", goal, card.why_missing("kernels", kernel))
        for row in found:
            others = [
                other
                for other in rows
                if other["way"] != "ours"
                and other["device"] == row["device"]
                and (other["kernel"], other["case"]) == (kernel, row["case"])
            ]
            best = min(others, key=lambda other: other["median"], default=None)
            rate = f"{row['gb_per_s']:,.0f} GB/s" if "gb_per_s" in row else f"{row['tflop_per_s']:,.0f} TFLOP/s"
            beside = f", {best['median'] / row['median']:.2f} × {best['way']}" if best else ""
            roof = percent_of_roof(row)
            yield _line(
                f"`{kernel}` {row['case']}",
                goal,
                roof >= least if least else None,
                f"{duration(row['median'])}, {rate}{beside}",
                f"{roof:.0f} %",
                row,
                *([best] if best else []),
            )


def _family(made, *, fp8, shared):
    """The timed adapter rows of fastvid that a user's flags can make, whatever their batches."""
    for row in made["rows"] if made else ():
        about = ROWS[row["row"]]
        flags = " ".join(about.flags)
        ours = row["seconds"] and about.kind == "fastvid" and about.apart and not about.full
        if ours and "--recompute none" in flags and (("fp8" in flags) == fp8 and ("--share_video" in flags) == shared):
            yield row


def _best(made, key, **family):
    return max(_family(made, **family), key=lambda row: row[key], default=None)


def training_lines(card, made):
    """Of the training step: speeds, ratios, the full fine-tune, and memory beside what the plan said.

    Args:
        made: `ladder.result`, or None.
    """
    for what, key, least, aim, unit, task, family in (
        (
            "7B adapter, bf16, exact",
            "tokens_per_second",
            22_000,
            24_000,
            "tokens/s",
            "exact",
            {"fp8": False, "shared": False},
        ),
        ("7B adapter, FP8", "tokens_per_second", 33_000, 36_000, "tokens/s", "fp8", {"fp8": True, "shared": False}),
        (
            "7B adapter, FP8, shared video first",
            "samples_per_second",
            125,
            167,
            "samples/s",
            "shared_fp8",
            {"fp8": True, "shared": True},
        ),
    ):
        row, here = _best(made, key, **family), CARD in card.name
        goal = f"≥ {least:,} {unit}, aim {aim:,}" if here else f"— (set for an {CARD})"
        if row is None:
            yield _missing(what, goal, card.why_missing("train", task))
        else:
            yield _line(
                what,
                goal,
                row[key] >= least if here else None,
                f"{row[key]:,.0f} {unit} (`{row['row']}`)",
                *_share(card, row),
            )
    yield _ratio_line(card, made, "exact", "exact", 2.5, 1.2, fp8=False, shared=False)
    yield _ratio_line(card, made, "with everything (FP8, shared video)", "shared_fp8", 12, 6, fp8=True, shared=True)
    full = next((row for row in made["rows"] if row["row"] == "full" and row["seconds"]), None) if made else None
    what, goal = "7B full fine-tune", f"≥ 57 % of {PEAK / 1e12:.0f} TFLOP/s"
    if full is None:
        yield _missing(what, goal, card.why_missing("train", "full"))
    else:
        part = 100 * full["flops_per_second"] / PEAK
        yield _line(
            what, goal, part >= 57, f"{full['flops_per_second'] / 1e12:,.0f} TFLOP/s, {part:.1f} %", *_share(card, full)
        )


def _share(card, row):
    """Of the card's product in the row's precision, and the rows that both come from."""
    key, name, text = (
        ("fp8_share", "fp8", "an FP8") if ladder.in_fp8(row["row"]) else ("matmul_share", "burst", "a bf16")
    )
    roof = card.roof(name, row)[1]
    return (f"{100 * row[key]:.0f} % of {text} product", row, roof) if roof else ("", row)


def _ratio_line(card, made, title, task, least, least_best, **family):
    """Times the reference's recipe, and times the fastest other row of transformers' model, on the same samples."""
    what, goal = f"{title}: × reference recipe / × best transformers row", f"≥ {least} × / ≥ {least_best} ×"
    ours = max(
        (row for row in _family(made, **family) if not ROWS[row["row"]].budget),
        key=lambda row: row["samples_per_second"],
        default=None,
    )
    if ours is None:
        return _missing(what, goal, card.why_missing("train", task))
    timed = {row["row"]: row for row in made["rows"] if row["seconds"] and ladder.is_baseline(row["row"])}
    reference = timed.pop("reference", None)
    best = max(timed.values(), key=lambda row: row["samples_per_second"], default=None)
    times = [row and ours["samples_per_second"] / row["samples_per_second"] for row in (reference, best)]
    known = [(value, wanted) for value, wanted in zip(times, (least, least_best)) if value]
    reached = all(value >= wanted for value, wanted in known) if known else None
    if reached and len(known) < 2:
        reached = None  # of half of a goal nothing is said
    cells = [
        f"{value:.2f} ×" if value else f"not measured{card.why_missing('train', name)}"
        for value, name in zip(times, ("reference", "tuned"))
    ]
    return _line(
        what,
        goal,
        reached,
        f"{cells[0]} / {cells[1]} (`{ours['row']}`" + (f" and `{best['row']}`)" if best else ")"),
        "",
        ours,
        *filter(None, (reference, best)),
    )


def memory_lines(card, made):
    """The peak of every row whose plan was printed, beside the plan's estimate; of SMALL_CARDS beside the card too."""
    held = next((row["memory_bytes"] for row in card.of("probe") if "memory_bytes" in row), None)
    planned = {row["row"]: row for row in made["rows"] if "estimated_bytes" in row} if made else {}
    for name, row in planned.items():
        if name not in SMALL_CARDS:
            apart = _apart(row)
            yield _line(
                f"peak memory, `{name}`",
                f"within {MEMORY} % of the plan's {row['estimated_bytes'] / 2**30:.1f} GiB",
                abs(apart) <= MEMORY,
                f"{row['peak_bytes'] / 2**30:.1f} GiB, {apart:+.1f} %",
                f"{100 * row['peak_bytes'] / held:.0f} % of the memory" if held else "",
                row,
            )
    if not planned.keys() - SMALL_CARDS.keys():
        yield _missing("peak memory", f"within {MEMORY} % of the plan's estimate")
    for name, (what, most) in SMALL_CARDS.items():
        what, goal = f"peak memory, {what}", f"< {most} GB, within {MEMORY} % of the plan"
        row = planned.get(name)
        if row is None:
            yield _missing(what, goal, card.why_missing("train", name))
            continue
        built, apart = row.get("build_peak_bytes", 0), _apart(row)
        largest = max(row["peak_bytes"], built)
        yield _line(
            what,
            goal,
            largest < most * 1e9 and abs(apart) <= MEMORY,
            f"{row['peak_bytes'] / 1e9:.1f} GB, {apart:+.1f} % (`{name}`)"
            + (f", {built / 1e9:.1f} GB while it was built" if built > row["peak_bytes"] else ""),
            "",
            row,
        )


def _apart(row):
    """Percent that the peak is above the plan's estimate."""
    return 100 * (row["peak_bytes"] / row["estimated_bytes"] - 1)


def quality_lines(card):
    """FP8's loss curve, and right answers of each way of training."""
    # A failure stands until a later run measures the same.
    told = {
        (row["task"], row["row"]): row
        for row in (*card.rows, *card.failed)
        if row["stage"] == "quality" and "absent" not in row
    }
    curve = told.get(("FP8 curve", "FP8 curve"))
    what, goal = "loss of a 113M model in FP8 against bf16, 200 steps", f"within {CURVE} %"
    if curve is None:
        yield _missing(what, goal, card.why_missing("quality", "FP8 curve"))
    else:
        yield _line(
            what,
            goal,
            curve["status"] == "ok",
            f"{100 * curve['relative error']:+.2f} %, of the last 50 steps {100 * curve['of the last 50']:+.2f} %",
            "",
            curve,
        )
    ways = [row for row in told.values() if "first asked" in row]
    if not ways:
        yield _missing(
            "right answers about held-out clips", "no loss, or stated", card.why_missing("quality", "answers")
        )
    for row in ways:
        like = row.get("like")
        yield _line(
            f"right answers, {row['row']}",
            f"as {like}, but for chance" if like else "stated",
            row["status"] == "ok" if like or row["status"] != "ok" else None,
            "; ".join(
                f"{family}: {row[f'{family} right']} of {row[f'{family} asked']}" for family in ("first", "left")
            ),
            "",
            row,
        )


def extraction_lines(card):
    """The tower's images per second, and what else of extraction was timed."""
    rows, here = card.of("extract"), CARD in card.name
    what, goal = "CLIP L/14-336 to layer −2, fp16", "≥ 1,700 images/s" if here else f"— (set for an {CARD})"
    tower = next((row for row in rows if row["row"] == "tower, float16"), None)
    if tower is None:
        yield _missing(what, goal, card.why_missing("extract", "tower"))
    else:
        burst, probed = card.roof("burst", tower)
        share = f"{100 * tower['flops_per_second'] / burst:.0f} % of a bf16 product" if burst else ""
        yield _line(
            what,
            goal,
            tower["images_per_second"] >= 1700 if here else None,
            f"{tower['images_per_second']:,.0f} images/s",
            share,
            tower,
            *([probed] if burst else []),
        )
    for row in rows:
        if "mean_cosine" in row:
            yield _line(
                row["row"],
                f"cosine ≥ {FP8_COSINE} to the unquantised tower's states, faster",
                row["mean_cosine"] >= FP8_COSINE
                and (tower is None or row["images_per_second"] > tower["images_per_second"]),
                f"{row['images_per_second']:,.0f} images/s, cosine {row['mean_cosine']:.4f}, "
                f"{row['least_cosine']:.4f} at least",
                "",
                row,
            )
            continue
        rates = [
            f"{value:,.4g} {key.replace('_per_second', '/s')}"
            for key, value in row.items()
            if key.endswith("_per_second") and key not in ("bytes_per_second", "flops_per_second")
        ]
        if row is not tower and rates:
            yield _line(row["row"], "—", None, ", ".join(rates), "", row)


def short(card, made, rows):
    """README's lines: of kernels how many are where they should be, of memory the first row that is off, if any is."""
    timed = [line for line in kernel_lines(card, rows) if line.goal != "—" and line.reached is not None]
    good, commits = sum(line.reached for line in timed), tuple(dict.fromkeys(c for line in timed for c in line.commits))
    kernels = Line(
        "kernels at their share of a copy",
        "all cases",
        f"{good} of {len(timed)} cases" + ("" if good == len(timed) else " — **falls short**"),
        "",
        good == len(timed),
        commits,
    )
    off = list(memory_lines(card, made))
    return [
        *training_lines(card, made),
        *([line for line in off if line.reached is False] or off)[:1],
        *list(extraction_lines(card))[:1],
        kernels if timed else _missing("kernels", "all cases"),
    ]


def markdown(lines):
    """Lines as a table."""
    cells = ["| what | goal | measured | share of the card's roof | commit |", "|---|---|---|---:|---|"]
    return "\n".join(
        cells
        + [
            "| "
            + " | ".join(
                [line.what, line.goal, line.measured, line.share, ", ".join(f"`{commit}`" for commit in line.commits)]
            )
            + " |"
            for line in lines
        ]
    )
