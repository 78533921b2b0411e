"""The kernels that took most of some recorded steps, and how near they came to what the device can do."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastvid.training.flops import peak_flops

SHOWN = 10


@dataclass(frozen=True)
class Roofs:
    """What a device could do by its data sheet; None where that is not known.

    Attributes:
        bytes_per_second: of its memory.
        flops_per_second: of dense bf16 products. Those in FP8 are twice as many.
    """

    bytes_per_second: float | None = None
    flops_per_second: float | None = None

    @staticmethod
    def of(device: torch.device) -> "Roofs":
        """Those of a GPU; of a CPU none is known."""
        if device.type != "cuda":
            return Roofs()
        properties = torch.cuda.get_device_properties(device)
        kilohertz, bits = (getattr(properties, name, 0) for name in ("memory_clock_rate", "memory_bus_width"))
        bandwidth = 2 * 1e3 * kilohertz * bits / 8  # two transfers a cycle
        return Roofs(bandwidth or None, peak_flops(torch.cuda.get_device_name(device)))


@dataclass(frozen=True)
class Spent:
    """What one kernel, or on a CPU one operator, took of a step, on average.

    Attributes:
        milliseconds: all its calls together.
        share: of the step by the clock.
        bytes, flops: that its calls move and compute, where known.
        of_roof: the time that those would take at the device's roof, as a share of what they took.
    """

    name: str
    milliseconds: float
    share: float
    calls: float
    bytes: float | None
    flops: float | None
    of_roof: float | None


def product_flops(name: str, shapes: Sequence[Sequence[int]]) -> int | None:
    """Operations of a matrix product of torch's, by its inputs' shapes; None of any other operator."""
    match name.removeprefix("aten::"):
        case "mm" | "bmm" | "_scaled_mm":
            left, right = shapes[:2]
        case "addmm" | "addmm_" | "baddbmm" | "baddbmm_":
            left, right = shapes[1:3]
        case _:
            return None
    if not len(left) == len(right) in (2, 3):
        return None  # torch does not tell shapes of some tensors
    batch = left[0] if len(left) == 3 else 1
    return 2 * batch * left[-2] * left[-1] * right[-1]


def longest(
    recording: Any, *, steps: int, seconds: float, gpu: bool, moved: Mapping[str, int], roofs: Roofs
) -> list[Spent]:
    """The kernels of most time, the longest first; on a CPU operators, by their own time.

    Args:
        recording: a `torch.profiler.profile` that was stopped, with shapes.
        steps: that it holds.
        seconds: that they took by the clock.
        moved: bytes that all launches of kernels of ours moved, by name (`watch_launches`).
    """
    flops, fp8 = Counter(), set()
    for event in recording.events():
        found = product_flops(event.name, event.input_shapes or ())
        if not found:
            continue
        # Of several kernels, such as one that clears memory, the longest multiplies.
        name = max(event.kernels, key=lambda kernel: kernel.duration).name if gpu and event.kernels else event.name
        if gpu and not event.kernels:
            continue
        flops[name] += found
        if event.name == "aten::_scaled_mm":
            fp8.add(name)
    spent = {}
    for event in recording.key_averages():
        # A range that somebody named, such as FSDP2's, is on the GPU's line, too, around the kernels in it.
        if gpu and (event.device_type != torch.autograd.DeviceType.CUDA or event.is_user_annotation):
            continue
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        spent[event.key] = microseconds / 1e6, event.count
    rows = []
    for name, (took, calls) in sorted(spent.items(), key=lambda item: -item[1][0])[:SHOWN]:
        peak = roofs.flops_per_second and roofs.flops_per_second * (2 if name in fp8 else 1)
        at_best = None
        if name in flops and peak:
            at_best = flops[name] / peak
        elif name in moved and roofs.bytes_per_second:
            at_best = moved[name] / roofs.bytes_per_second
        rows.append(
            Spent(
                name=name,
                milliseconds=1e3 * took / steps,
                share=took / seconds,
                calls=calls / steps,
                bytes=moved[name] / steps if name in moved else None,
                flops=flops[name] / steps if name in flops else None,
                of_roof=at_best / took if at_best is not None and took else None,
            )
        )
    return rows


def table(rows: Sequence[Spent], *, steps: int, seconds: float, gpu: bool) -> str:
    """The rows as text."""
    kind = "kernels by GPU time" if gpu else "operators by CPU time"
    lines = [
        f"profile of {steps} steps of {1e3 * seconds / steps:,.1f} ms: {kind} of their own",
        f"{'ms a step':>10} {'of step':>7} {'calls':>7} {'GB':>8} {'TFLOP':>8} {'of roof':>7}  "
        f"{'kernel' if gpu else 'operator'}",
    ]
    for row in rows:
        known = "" if row.of_roof is None else f"{row.of_roof:.0%}"
        moved, computed = ("" if x is None else f"{x / unit:.3g}" for x, unit in ((row.bytes, 1e9), (row.flops, 1e12)))
        lines.append(
            f"{row.milliseconds:10.2f} {row.share:7.1%} {row.calls:7.1f} {moved:>8} {computed:>8} {known:>7}  "
            f"{row.name[:80]}"
        )
    return "\n".join(lines)


def as_json(rows: Sequence[Spent], *, steps: int, seconds: float, gpu: bool, roofs: Roofs) -> dict[str, Any]:
    """What a file holds: {"steps", "seconds_a_step", "of", "roofs", "longest"}."""
    return {
        "steps": steps,
        "seconds_a_step": seconds / steps,
        "of": "kernels" if gpu else "operators",
        "roofs": asdict(roofs),
        "longest": [asdict(row) for row in rows],
    }
