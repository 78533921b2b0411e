"""The rows of the kernels' benchmark: what they hold, how they are checked and timed."""

import statistics

import torch

from bench import decoder_cases, fp8_cases, optimizer_cases, token_cases, vision_cases
from bench.measure import assert_agree, copies_needed, peak_extra_bytes, time_calls

LAST = ("torch.compile",)  # ways that take longest to prepare: last, if time runs out


def all_cases(small):
    """Every case of every kernel."""
    modules = (vision_cases, decoder_cases, token_cases, fp8_cases, optimizer_cases)
    return [case for module in modules for case in module.cases(small)]


def device():
    """Where rows are measured."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def agree(case, way, generator):
    """Compare one way with the case's expectation, on fresh inputs.

    Raises:
        AssertionError: they differ by more than rounding; says where and by how much.
    """
    inputs = case.make(generator, device())
    expected = case.expected(*clone(inputs))()
    assert_agree(case.ways[way](*inputs)(), expected, case.looser.get(way, case.tolerance))


def clone(x):
    """A copy: some ways write into their inputs."""
    if isinstance(x, tuple):
        return tuple(map(clone, x))
    return x.clone() if isinstance(x, torch.Tensor) else x


def timed(case, way, *, small, rounds=50):
    """(seconds of each call, extra bytes at the peak or None) of one way on inputs that no cache holds."""
    on_cuda = torch.cuda.is_available()
    generator = torch.Generator(device()).manual_seed(1)
    prepare, first = case.ways[way], case.make(generator, device())
    copies = [first] + [case.make(generator, device()) for _ in range(copies_needed(first) - 1)]
    peak = peak_extra_bytes(prepare(*first)) if on_cuda else None
    return time_calls(prepare, copies, rounds=5 if small else rounds, on_cuda=on_cuda), peak


def describe(case, way, run_info, peak, median):
    """What a row says beside its times; rates in 1e9 bytes and 1e12 FLOP per second."""
    info = {
        **run_info,
        "kernel": case.kernel,
        "case": case.name,
        "way": way,
        "shapes": case.shapes,
        "baseline": "eager" if "eager" in case.ways else "reference's chain",
        "bytes": case.bytes,
        "flops": case.flops,
        "peak_extra_mib": peak and round(peak / 2**20, 1),
    }
    if case.bytes:
        info["gb_per_s"] = round(case.bytes / median / 1e9, 2)
    if case.flops:
        info["tflop_per_s"] = round(case.flops / median / 1e12, 1)
    if case.bytes and "copy_bytes_per_second" in run_info:
        info["percent_of_copy"] = round(100 * case.bytes / median / run_info["copy_bytes_per_second"], 1)
    return info


def spread(times):
    """Median and quartiles' distance of a row's times, in seconds."""
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    return {"median": quartiles[1], "iqr": quartiles[2] - quartiles[0], "rounds": len(times)}
