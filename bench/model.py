"""Where a training step's time goes on a GPU, predicted from counts: python bench/model.py --card h200

Counts what each row of the ladder moves, computes and launches (`bench.counted`), divides it by what the card reaches
(`measured_roofs`, `nominal_roofs`), and prints predicted beside measured. No GPU is needed.
"""

import argparse
import json
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from bench.counted import GATHERED, counted  # noqa: E402  found by the line above
from bench.gpu import ladder, merge, profiles  # noqa: E402
from bench.report import aligned  # noqa: E402
from bench.traffic import ATTENTION, ATTENTION_BACKWARD, FP8_PRODUCT, MOVED, PRODUCT  # noqa: E402
from bench.train_presets import PRESETS, ROWS  # noqa: E402
from fastvid.training.flops import peak_flops  # noqa: E402

RESULTS = ROOT / "bench" / "results"
# Assumed, not measured: what lies between two kernels on the device, and what Python takes to launch one.
GAP_SECONDS, HOST_SECONDS = 1e-6, 36e-6
# Name that CUDA gives the card, bytes per second and FP8 products by the data sheets, for cards that were not measured.
NOMINAL = {
    "h100": ("NVIDIA H100 80GB HBM3", 3.35e12, 1979e12),
    "a100": ("NVIDIA A100-SXM4-80GB", 2.04e12, None),
    "l40s": ("NVIDIA L40S", 0.864e12, 733e12),
    "b200": ("NVIDIA B200", 8.0e12, 4500e12),
}
DATA_SHEET = {"h200": ("NVIDIA H200", 4.8e12, 1979e12)}
PLACES, ROTATES = "_place_keys_kernel", "_rope_qk_kernel"
GROUPS = {PRODUCT: "products", FP8_PRODUCT: "products", ATTENTION: "attention", ATTENTION_BACKWARD: "attention"}


@dataclass(frozen=True)
class Roofs:
    """What a card reaches.

    Attributes:
        card: its name.
        per_second: {kind of call: bytes (of MOVED) or operations per second}; None: it has no such units.
        sources: where each is from, a line each.
    """

    card: str
    per_second: dict[str, float | None]
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Prediction:
    """Seconds of one optimizer step.

    Attributes:
        groups: {"products", "attention", "moved", "gaps": seconds on the device}.
        host: seconds that Python takes to launch everything.
    """

    row: str
    samples: int
    rows: int
    groups: dict[str, float]
    host: float

    @property
    def seconds(self):
        """The host runs ahead of the device unless it takes longer."""
        return max(sum(self.groups.values()), self.host)


def lacking(card):
    """What a GPU check did not measure of a card, without which its roofs are not known."""
    newest = max(card.rows, key=lambda row: row["date"])
    found = {
        "copy": any(row["row"] == "copy" for row in card.of("probe")),
        "product after ten seconds": card.roof("sustained", newest)[0],
        "profile of exact": any(row["row"] == "exact" for row in profiles.of(card)),
    }
    return [name for name, measured in found.items() if not measured]


def measured_roofs(card, exact):
    """`Roofs` of a card that a GPU check measured.

    Args:
        card: `bench.gpu.merge.Card`.
        exact: `CountedStep` of the row "exact", whose profile tells attention's rate.

    Raises:
        ValueError: the check measured no copy, product or profile; says which.
    """
    if names := lacking(card):
        raise ValueError(f"no {', no '.join(names)} on {card.name}: run the check's stages probe and train")
    newest = max(card.rows, key=lambda row: row["date"])
    burst, sustained, fp8 = (card.roof(name, newest)[0] for name in ("burst", "sustained", "fp8"))
    copies = [row["bytes_per_second"] for row in card.of("probe") if row["row"] == "copy"]
    profile = next(row for row in profiles.of(card) if row["row"] == "exact")
    calls = exact.calls()
    rates = {}
    for kind, holds in ((ATTENTION, r"flash_fwd"), (ATTENTION_BACKWARD, r"flash_bwd")):
        spent = sum(milliseconds for name, milliseconds, _ in profile["kernels"] if re.search(holds, name)) / 1e3
        if not spent:
            raise ValueError(f"the profile of exact on {card.name} names no kernel {holds}")
        rates[kind] = sum(call.flops * times for call, times in calls.items() if call.kind == kind) / spent
    fp8 = fp8 and fp8 * sustained / burst
    return Roofs(
        card.name,
        {MOVED: copies[-1], PRODUCT: sustained, FP8_PRODUCT: fp8, **rates},
        (
            f"copy {copies[-1] / 1e12:.2f} TB/s",
            f"bf16 product after ten seconds {sustained / 1e12:,.0f} TFLOP/s",
            f"FP8 product {fp8 / 1e12:,.0f} TFLOP/s: a layer's in a burst, times what the bf16 product kept of its own"
            if fp8
            else "no FP8 product",
            f"attention {rates[ATTENTION] / 1e12:,.0f} forward, {rates[ATTENTION_BACKWARD] / 1e12:,.0f} TFLOP/s "
            "backward: from the profile of `exact`, whose prediction it is thus a part of",
        ),
    )


def nominal_roofs(name, like):
    """`Roofs` of a card that nobody measured: its data sheet, and of that the shares that `like` reached.

    Args:
        name: of `NOMINAL`.
        like: `Roofs` of an H200.
    """
    card, bandwidth, fp8 = NOMINAL[name]
    _, known_bandwidth, known_fp8 = DATA_SHEET["h200"]
    bf16, known_bf16 = peak_flops(card), peak_flops(like.card)
    shares = {
        MOVED: bandwidth / known_bandwidth,
        PRODUCT: bf16 / known_bf16,
        FP8_PRODUCT: fp8 and fp8 / known_fp8,
        ATTENTION: bf16 / known_bf16,
        ATTENTION_BACKWARD: bf16 / known_bf16,
    }
    per_second = {kind: share and like.per_second[kind] * share for kind, share in shares.items()}
    return Roofs(card, per_second, ("nominal: the data sheet's figures, times what the H200 reached of its own",))


def predict(name, step, roofs):
    """`Prediction` of a row; None where the card has no units for it.

    A product takes as long as its operations or, of few rows, as reading the matrix.
    """
    groups = dict.fromkeys(("products", "attention", "moved", "gaps"), 0.0)
    launches = 0
    for call, times in step.calls().items():
        rate = roofs.per_second[call.kind]
        if rate is None:
            return None
        moved = call.bytes / roofs.per_second[MOVED]
        seconds = moved if call.kind == MOVED else max(call.flops / rate, moved)
        groups[GROUPS.get(call.kind, "moved")] += seconds * times
        launches += call.launches * times
    groups["gaps"] = GAP_SECONDS * launches
    return Prediction(name, step.samples, step.rows, groups, HOST_SECONDS * launches)


def rows_of(preset):
    """Names of the preset's rows that are predicted: fastvid's, but those for memory.

    Libraries' kernels in transformers' rows do not say what they move. Rows of shared videos stand twice: with keys
    gathered, as they were measured first, and with attention in two merged parts.
    """
    names = [name for name in PRESETS[preset].rows["bf16"] if ROWS[name].kind == "fastvid"]
    names = [name for name in names if not ROWS[name].for_memory]
    return [each for name in names for each in ([name + GATHERED] if _shares(name) else []) + [name]]


def _shares(name):
    return "--share_video" in ROWS[name].flags


def predicted_as(row):
    """The name, of `rows_of`, that predicts a row of a GPU check. Rows that do not say so gathered keys."""
    return row["row"] + (GATHERED if _shares(row["row"]) and not row.get("in_parts") else "")


def compared(predictions, measured):
    """[{"row", "predicted": …, "measured": … or None, "difference"}] of predictions.

    Args:
        measured: {name of a prediction: row of a GPU check}.

    Raises:
        ValueError: a measured step had other rows or samples than the predicted one.
    """
    found = []
    for each in predictions:
        row = {"row": each.row, "predicted": _rates(each.samples, each.rows, each.seconds)}
        row["predicted"] |= {"groups": each.groups, "host_seconds": each.host}
        if other := measured.get(each.row):
            if (other["rows"], other["samples"]) != (each.rows, each.samples):
                raise ValueError(
                    f"row {each.row}: a step of {other['samples']} samples and {other['rows']} tokens was measured, of "
                    f"{each.samples} and {each.rows} predicted; the data of the benchmark have changed"
                )
            row["measured"] = _rates(each.samples, each.rows, other["seconds"]) | {"commit": other["commit"]}
            row["difference"] = row["predicted"]["tokens_per_second"] / row["measured"]["tokens_per_second"] - 1
        found.append(row)
    return found


def _rates(samples, rows, seconds):
    return {"seconds": seconds, "tokens_per_second": rows / seconds, "samples_per_second": samples / seconds}


def table(rows):
    """Predicted beside measured, as text."""
    cells = [("row", "predicted tokens/s", "samples/s", "measured tokens/s", "samples/s", "difference", "products")]
    cells[0] += "attention", "moved", "gaps", "host"
    for row in rows:
        predicted, measured = row["predicted"], row.get("measured")
        total = sum(predicted["groups"].values())
        cells.append(
            (
                row["row"],
                f"{predicted['tokens_per_second']:,.0f}",
                f"{predicted['samples_per_second']:.1f}",
                f"{measured['tokens_per_second']:,.0f}" if measured else "not measured",
                f"{measured['samples_per_second']:.1f}" if measured else "",
                f"{100 * row['difference']:+.1f} %" if measured else "",
                *(f"{100 * seconds / total:.0f} %" for seconds in predicted["groups"].values()),
                f"{100 * predicted['host_seconds'] / total:.0f} %",
            )
        )
    return "\n".join(aligned(cells))


def profile_table(predictions, card):
    """Predicted milliseconds of each group beside those of the card's profiles, as text; "" without one."""
    cells = [("row", "group", "predicted ms", "profile's ms", "difference")]
    known = {each.row: each.groups for each in predictions}
    for row in profiles.of(card):
        if (name := predicted_as(row)) not in known:
            continue
        spent = profiles.grouped(row)
        found = {"products": spent.pop("matrix products"), "attention": spent.pop("attention")}
        found["moved"] = sum(spent.values())
        for group, milliseconds in found.items():
            predicted = 1e3 * known[name][group]
            difference = f"{100 * (predicted / milliseconds - 1):+.0f} %"
            cells.append((name, group, f"{predicted:,.1f}", f"{milliseconds:,.1f}", difference))
    return "\n".join(aligned(cells)) if len(cells) > 1 else ""


def kernel_table(steps, card, roofs):
    """What our kernels of the card's profiles reached of a copy's bandwidth, as text; "" without a profile."""
    cells = [("row", "kernel", "predicted ms", "profile's ms", "share of a copy")]
    for row in profiles.of(card):
        if (predicted := predicted_as(row)) not in steps:
            continue
        moved, spent = Counter(), Counter({name: milliseconds for name, milliseconds, _ in row["kernels"]})
        for call, times in steps[predicted].calls().items():
            moved[call.name] += call.bytes * times if call.kind == MOVED else 0
        if PLACES in moved:  # it rotates queries, too, but in profiles of before
            for each in moved, spent:
                each[PLACES] += each.pop(ROTATES, 0)
        for name, milliseconds in spent.items():
            if name in moved and milliseconds >= 0.01 * row["device_ms"]:
                at_best = 1e3 * moved[name] / roofs.per_second[MOVED]
                share = f"{100 * at_best / milliseconds:.0f} %"
                cells.append((predicted, name, f"{at_best:.1f}", f"{milliseconds:.1f}", share))
    return "\n".join(aligned(cells)) if len(cells) > 1 else ""


def measured_rows(card):
    """{what predicts it: row of a GPU check}, of those that were timed."""
    return {predicted_as(row): row for row in ladder.of(card) if row.get("seconds")}


def of_card(card, preset, nominal=None):
    """({row: CountedStep}, `Roofs`, [`Prediction`], rows as of `compared`) of a card that a GPU check measured.

    Args:
        nominal: name of another card, of which its data sheet and this card's shares of its own tell the roofs.

    Raises:
        ValueError: something was not measured, or of other data.
    """
    steps = {} if lacking(card) else counted(preset, rows_of(preset))
    roofs = measured_roofs(card, steps.get("exact"))
    if nominal:
        roofs = nominal_roofs(nominal, roofs)
    predictions = [found for name, step in steps.items() if (found := predict(name, step, roofs))]
    return steps, roofs, predictions, compared(predictions, {} if nominal else measured_rows(card))


def beside(card, preset):
    """Predicted beside measured, as text, for a card's report; why not, where its roofs are not known."""
    try:
        _, _, predictions, rows = of_card(card, preset)
    except ValueError as error:
        return f"no step is predicted: {error}"
    return "\n".join(["predicted from counts (bench/model.py):", table(rows), profile_table(predictions, card)])


def result(steps, rows, roofs):
    """What the JSON file holds."""
    return {
        "card": roofs.card,
        "roofs": {kind: rate for kind, rate in roofs.per_second.items() if rate},
        "sources": list(roofs.sources),
        "gap_seconds": GAP_SECONDS,
        "host_seconds_per_launch": HOST_SECONDS,
        "counts": {
            name: {"bytes_per_token_and_layer": step.bytes_per_row, "launches_per_layer": step.launches_per_layer}
            for name, step in steps.items()
        },
        "rows": rows,
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--card", default="h200", help=f"a measured one, or {', '.join(NOMINAL)} by the data sheet")
    parser.add_argument("--results", type=Path, help="a GPU check's rows (default: bench/results/gpu-CARD.jsonl)")
    parser.add_argument("--preset", choices=[name for name in PRESETS if name.startswith("gpu-")], default="gpu-7b")
    parser.add_argument("--counts", action="store_true", help="print what each operation of a layer moves too")
    parser.add_argument("--json", type=Path, help="file to write")
    arguments = parser.parse_args(argv)
    nominal = arguments.card in NOMINAL and arguments.results is None
    file = arguments.results or RESULTS / f"gpu-{'h200' if nominal else arguments.card}.jsonl"
    if not file.exists():
        parser.error(
            f"{file} does not exist; --card {arguments.card} needs it: bash scripts/gpu_check.sh measures, --results "
            f"names another file, and {', '.join(NOMINAL)} need none"
        )
    try:
        [card] = merge.read([file])
        steps, roofs, predictions, rows = of_card(card, arguments.preset, arguments.card if nominal else None)
    except ValueError as error:
        parser.error(f"{file}: {error}")
    if arguments.counts:
        for name, step in steps.items():
            print(f"{name}:\n{step.table()}\n")
    print(f"{roofs.card}, {arguments.preset}:\n{table(rows)}\n")
    if not nominal and (groups := profile_table(predictions, card)):
        print(f"{groups}\n\n{kernel_table(steps, card, roofs)}\n")
    print("\n".join(roofs.sources))
    print(f"assumed: {1e6 * GAP_SECONDS:g} µs between kernels, {1e6 * HOST_SECONDS:g} µs of Python a launch")
    if arguments.json:
        arguments.json.write_text(json.dumps(result(steps, rows, roofs), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
