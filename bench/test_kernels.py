"""`pytest bench -k kernels --benchmark-json FILE`: every kernel, checked and then timed.

On a GPU every case is a row for each way of doing it: ours, eager torch, torch.compile, and the libraries that are
installed. On a CPU the cases are checked at small shapes, and only what runs on CPUs in earnest is timed, against the
reference's own code. A kernel whose result is wrong gets no further row.
"""

import pytest
import torch

from bench import decoder_cases, optimizer_cases, vision_cases
from bench.measure import Replay, assert_agree, copies_needed, peak_extra_bytes, time_calls

ON_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if ON_CUDA else "cpu"
CLOCK = Replay()
WRONG = set()


def all_cases(small):
    return [case for module in (vision_cases, decoder_cases, optimizer_cases) for case in module.cases(small)]


def pytest_generate_tests(metafunc):
    small = metafunc.config.getoption("small")
    skipped = metafunc.config.getoption("skip_kernels").split(",")
    if metafunc.function is test_kernels:
        cases = all_cases(small) if ON_CUDA else list(vision_cases.cpu_cases(small))
    else:
        cases = [] if ON_CUDA else all_cases(small=True)
    pairs = [(case, way) for case in cases for way in case.ways if case.kernel not in skipped]
    pairs.sort(key=lambda pair: pair[1] == "torch.compile")  # which takes longest to prepare: last, if time runs out
    metafunc.parametrize("case, way", pairs, ids=[f"{case.kernel} {case.name} {way}" for case, way in pairs])


def agree(case, way, generator):
    """Compare one way with the case's expectation on fresh inputs; our own failure rules the kernel out."""
    inputs = case.make(generator, DEVICE)
    expected = case.expected(*clone(inputs))()
    try:
        assert_agree(case.ways[way](*inputs)(), expected, case.tolerance)
    except Exception:
        if way == "ours":
            WRONG.add(case.kernel)
        raise


def clone(x):
    """A copy: some ways write into their inputs."""
    if isinstance(x, tuple):
        return tuple(map(clone, x))
    return x.clone() if isinstance(x, torch.Tensor) else x


def test_kernels_agree(case, way):
    agree(case, way, torch.Generator().manual_seed(0))


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_kernels(case, way, benchmark, run_info, request):
    if case.kernel in WRONG:
        pytest.skip(f"{case.kernel} gave a wrong result")
    generator = torch.Generator(DEVICE).manual_seed(0)
    agree(case, way, generator)
    prepare = case.ways[way]
    first = case.make(generator, DEVICE)
    copies = [first] + [case.make(generator, DEVICE) for _ in range(copies_needed(first) - 1)]
    peak = peak_extra_bytes(prepare(*first)) if ON_CUDA else None
    times = time_calls(prepare, copies, rounds=5 if request.config.getoption("small") else 50, on_cuda=ON_CUDA)
    CLOCK.load(times)
    benchmark.group = f"{case.kernel} {case.name}"
    benchmark.pedantic(lambda: None, rounds=len(times))
    benchmark.extra_info.update(row(case, way, run_info, peak, benchmark.stats.stats.median))
    del copies, first
    if ON_CUDA:
        torch.cuda.empty_cache()


def row(case, way, run_info, peak, median):
    """What a row says beside pytest-benchmark's statistics; rates in 1e9 bytes and 1e12 FLOP per second."""
    info = {**run_info, "kernel": case.kernel, "case": case.name, "way": way, "shapes": case.shapes,
            "baseline": "eager" if "eager" in case.ways else "reference's chain", "bytes": case.bytes,
            "flops": case.flops, "peak_extra_mib": peak and round(peak / 2**20, 1)}
    if case.bytes:
        info["gb_per_s"] = round(case.bytes / median / 1e9, 2)
    if case.flops:
        info["tflop_per_s"] = round(case.flops / median / 1e12, 1)
    if case.bytes and "copy_bytes_per_second" in run_info:
        info["percent_of_copy"] = round(100 * case.bytes / median / run_info["copy_bytes_per_second"], 1)
    return info
