"""A training step at LLaMA's true sizes: fastvid's rows and transformers', as `bench.train_presets` describes them."""

import logging
import os
import statistics
import time
from pathlib import Path

import torch
import transformers.models.llama.modeling_llama  # noqa: F401  imported before the task's time begins
from torch.profiler import ProfilerActivity
from torch.profiler import profile as profiled

from bench import baselines, train_rows  # noqa: F401
from bench.executed import executed_flops
from bench.train_data import write
from bench.train_presets import PRESETS, ROWS
from fastvid import train  # noqa: F401
from fastvid.model.quantize import FORMATS, check_device

HELD = {}  # what the rows of one process share: the last row's object, by what its model is made of
SHOWN = 80  # kernels that a profile names


def folder():
    return Path(os.environ["FASTVID_CHECK_SCRATCH"]) / "train"


def data(small, preset):
    """Write the model of random weights, features and records that all rows start from."""
    begin = time.perf_counter()
    write(folder(), PRESETS[preset].shape, PRESETS[preset].videos, budget_videos=PRESETS[preset].budget_videos)
    size = sum(path.stat().st_size for path in folder().rglob("*") if path.is_file())
    yield {"row": "data", "bytes": size, "seconds": time.perf_counter() - begin}


class _Heard(logging.Handler):
    """What fastvid says while it is built."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def row(small, preset, name, seconds=4.0):
    """One row: loss and gradient norm of a first step at learning rate 0, then `seconds` of steps, at least three.

    Of a row for memory one step, without a warm-up.
    """
    what, device, heard = ROWS[name], "cuda" if torch.cuda.is_available() else "cpu", _Heard()
    try:
        for few_bits in set(FORMATS).intersection(what.flags):
            check_device(few_bits, torch.device(device))
    except ValueError as error:
        yield {"row": name, "absent": str(error)}
        return
    logger = logging.getLogger("fastvid")
    logger.addHandler(heard)
    logger.setLevel(logging.INFO)
    begin = time.perf_counter()
    key = what.kind, what.full, what.model_flags
    made = HELD.get(key)
    new = made is None
    if new:
        HELD.clear()
        if device == "cuda":
            torch.cuda.empty_cache()
        made = train_rows.make(name, folder(), torch.bfloat16, PRESETS[preset].micro_batch)
        HELD[key] = made
    elif what.kind == "fastvid":
        made.take(what, PRESETS[preset].micro_batch)
    else:
        made.take(train_rows.step_samples(what, folder())[1], what.micro_batch or PRESETS[preset].micro_batch)
    built, to_build = time.perf_counter() - begin, 0
    if device == "cuda":
        torch.cuda.synchronize()
        to_build = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    (loss, norm), flops = executed_flops(made.step)
    first = time.perf_counter() - begin - built
    if what.rounds == 0:
        yield _described(name, made, new, loss, norm, flops, [], heard, built, first, to_build)
        return
    short = small or what.for_memory
    for _ in range(0 if what.for_memory else 1 if small else 2):
        made.step()
    times, until = [], time.perf_counter() + (0.0 if small else seconds)
    while len(times) < (1 if short else 3) or time.perf_counter() < until:
        _synchronize(device)
        start = time.perf_counter()
        made.step()
        _synchronize(device)
        times.append(time.perf_counter() - start)
    yield _described(name, made, new, loss, norm, flops, times, heard, built, first, to_build)


def _described(name, made, new, loss, norm, flops, times, heard, built, first, to_build):
    row = {
        "row": name,
        "title": ROWS[name].title,
        "dtype": "bf16",
        "loss": loss,
        "norm": norm,
        "samples": made.samples,
        "rows": made.rows,
        "sample_rows": made.sample_rows,
        "flops": flops,
        "in_parts": getattr(made, "in_parts", False),
        "build_seconds": built,
        "first_step_seconds": first,
        "seconds_each": times,
        "start_bytes": 0,
    }
    if times:
        median = statistics.median(times)
        row |= {
            "seconds": median,
            "first_three": statistics.mean(times[:3]),
            "last_three": statistics.mean(times[-3:]),
            "steps": len(times),
            "samples_per_second": made.samples / median,
            "tokens_per_second": made.rows / median,
            "sample_tokens_per_second": made.sample_rows / median,
            "flops_per_second": flops / median,
        }
    if torch.cuda.is_available():
        stats = torch.cuda.memory_stats()
        row |= {
            "device": torch.cuda.get_device_name(),
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
            "retries": stats.get("num_alloc_retries", 0),
        }
        if new:  # before the first step, loading the weights included
            row |= {"build_peak_bytes": to_build}
    plan = getattr(getattr(made, "state", None), "plan", None)
    if plan and new and not ROWS[name].budget:  # a plan is of the batches that the model was built with
        row |= {"estimated_bytes": plan.estimated, "recompute": plan.recompute}
    said = [line for line in heard.lines if "recompute" in line or "attention" in line]
    return row | ({"said": " | ".join(line.splitlines()[0] for line in said)[:400]} if said else {})


def profile(small, name):
    """Where the device's time goes in a step of the row that this process measured last."""
    (made,) = HELD.values()
    on_gpu = torch.cuda.is_available()
    with profiled(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as record:
        made.step()
        _synchronize("cuda" if on_gpu else "cpu")
    events = [
        (event.key, event.device_time_total if on_gpu else event.cpu_time_total, event.count)
        for event in record.key_averages()
    ]
    events.sort(key=lambda event: -event[1])
    total = sum(time for _, time, _ in events)
    yield {
        "row": name,
        "in_parts": getattr(made, "in_parts", False),
        "device_ms": total / 1e3,
        "launches": sum(count for *_, count in events),
        "kernels": [[key[:90], round(spent / 1e3, 3), count] for key, spent, count in events[:SHOWN]],
    }


def _synchronize(device):
    if device == "cuda":
        torch.cuda.synchronize()
