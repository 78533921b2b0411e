"""A card's training rows in the format of `bench/train_step.py`'s files, and as a table."""

import statistics
from pathlib import Path

from bench import train_step
from bench.gpu.stages import preset_of
from bench.train_presets import ROWS


def of(card):
    """A card's rows of training steps that the presets still have, baselines first, in the presets' order."""
    rows = [row for row in card.of("train") if row["row"] in ROWS and "loss" in row]
    return sorted(rows, key=lambda row: (ROWS[row["row"]].kind == "fastvid", list(ROWS).index(row["row"])))


def result(card):
    """What the JSON file holds; None without a row. "against" names the strongest row of transformers' model.

    `matmul_share` is of a large bf16 product in a burst, `sustained_share` of the same after ten seconds, `fp8_share`
    of a layer's products in FP8, for rows that multiply so: each of the row's own run where that measured it, else of
    another run on the card; None where none did. "roofs": {name: (FLOP/s, commit)} of the newest row.
    """
    rows = [_figures(row, card) for row in of(card)]
    if not rows:
        return None
    newest = max(rows, key=lambda row: row["date"])
    about = {key: newest[key] for key in ("driver", "python", "date", "versions")}
    about |= {"device": card.name, "commit": " and ".join(dict.fromkeys(row["commit"] for row in rows))}
    roofs = {
        name: (rate, row["commit"])
        for name in ("burst", "sustained", "fp8")
        for rate, row in (card.roof(name, newest),)
        if rate
    }
    burst = roofs.get("burst", (None,))[0]
    return {
        "environment": about,
        "preset": preset_of(small=False),
        "rows": rows,
        **train_step.summary(rows, {"bf16": burst}),
        "ratios": ratios(rows),
        "against": strongest(rows),
        "roofs": roofs,
        "faults": list(train_step.compare(rows)),
    }


def _figures(row, card):
    row = dict(row)
    times = row.pop("seconds_each")
    median = statistics.median(times) if times else None
    roofs = {
        "matmul_share": "burst",
        "sustained_share": "sustained",
        **({"fp8_share": "fp8"} if in_fp8(row["row"]) else {}),
    }
    rates = {
        f"{name.replace('rows', 'tokens')}_per_second": median and row[name] / median
        for name in ("samples", "rows", "sample_rows", "flops")
    }
    done = rates["flops_per_second"]
    shares = {key: card.roof(name, row)[0] for key, name in roofs.items()}
    return (
        row
        | rates
        | {key: done and rate and done / rate for key, rate in shares.items()}
        | {"seconds": times, "cpu_seconds": [], "spread": median and (max(times) - min(times)) / median}
    )


def is_baseline(name):
    """Whether a row is transformers' model."""
    return ROWS[name].kind != "fastvid"


def in_fp8(name):
    """Whether a row's frozen weights are multiplied in FP8."""
    return "fp8" in ROWS[name].flags


def strongest(rows):
    """The name of the fastest timed row of transformers' model; None without one."""
    timed = [row for row in rows if is_baseline(row["row"]) and row["seconds"]]
    return max(timed, key=lambda row: row["sample_tokens_per_second"])["row"] if timed else None


def ratios(rows):
    """{"OURS_vs_THEIRS": times as fast} of every timed adapter row, by the rows of the samples that it trained on.

    Samples of budgets are others than those of the baselines, so samples per second would not compare.
    """
    timed = {row["row"]: row["sample_tokens_per_second"] for row in rows if row["seconds"]}
    return {
        f"{ours}_vs_{theirs}": timed[ours] / timed[theirs]
        for ours in timed
        for theirs in timed
        if is_baseline(theirs) and not is_baseline(ours) and not ROWS[ours].full
    }


def table(result):
    """The rows as a table in markdown: speed, share of the product's rate, memory, times each baseline."""
    rows = [row for row in result["rows"] if row["seconds"]]
    baselines = [row["row"] for row in rows if is_baseline(row["row"])]
    heads = [
        "row",
        "",
        "samples/s",
        "±",
        "tokens/s",
        "TFLOP/s",
        "of a bf16 product, burst",
        "sustained",
        "of FP8's",
        "peak memory",
        *(f"× `{name}`" for name in baselines),
        "commit",
    ]
    lines = [_line(heads), "|---|---|" + "---:|" * (len(heads) - 3) + "---|"]
    for row in rows:
        lines.append(
            _line(
                [
                    f"`{row['row']}`",
                    row["title"],
                    f"{row['samples_per_second']:.1f}",
                    f"{50 * row['spread']:.1f} %",
                    f"{row['tokens_per_second']:,.0f}",
                    f"{row['flops_per_second'] / 1e12:,.0f}",
                    _percent(row["matmul_share"]),
                    _percent(row["sustained_share"]),
                    _percent(row.get("fp8_share")),
                    f"{row['peak_bytes'] / 2**30:.1f} GiB",
                    *(_times(result["ratios"].get(f"{row['row']}_vs_{name}")) for name in baselines),
                    f"`{row['commit']}`",
                ]
            )
        )
    names = {"burst": "bf16 product in a burst", "sustained": "after ten seconds", "fp8": "a layer's FP8 products"}
    roofs = ", ".join(
        f"{names[name]} {rate / 1e12:,.0f} TFLOP/s (`{commit}`)" for name, (rate, commit) in result["roofs"].items()
    )
    said = "× compares the rows of whole samples per second, as batches of a budget have other samples. " + (
        f"Roofs: {roofs}." if roofs else ""
    )
    return "\n".join([*lines, "", said.strip()])


def _line(cells):
    return "| " + " | ".join(cells) + " |"


def _percent(share):
    return "" if share is None else f"{100 * share:.0f} %"


def _times(ratio):
    return "" if ratio is None else f"{ratio:.2f}"


def path(folder, card, made):
    """Where a result goes."""
    return Path(folder) / f"train-{made['preset']}-{card.slug}.json"
