"""`pytest bench -k kernels --benchmark-json FILE`: every kernel, checked and then timed.

On a GPU every case is a row for each way of doing it: ours, eager torch, torch.compile, and the libraries that are
installed. On a CPU the cases are checked at small shapes, and only what runs on CPUs in earnest is timed, against the
reference's own code. A kernel whose result is wrong gets no further row.
"""

import pytest
import torch

from bench import kernel_rows, vision_cases
from bench.measure import Replay

CLOCK = Replay()
WRONG = set()


def pytest_generate_tests(metafunc):
    small, on_cuda = metafunc.config.getoption("small"), torch.cuda.is_available()
    skipped = metafunc.config.getoption("skip_kernels").split(",")
    if metafunc.function is test_kernels:
        cases = kernel_rows.all_cases(small) if on_cuda else list(vision_cases.cpu_cases(small))
    else:
        cases = [] if on_cuda else kernel_rows.all_cases(small=True)
    pairs = [(case, way) for case in cases for way in case.ways if case.kernel not in skipped]
    pairs.sort(key=lambda pair: pair[1] in kernel_rows.LAST)
    metafunc.parametrize("case, way", pairs, ids=[f"{case.kernel} {case.name} {way}" for case, way in pairs])


def agree(case, way, generator):
    """As `kernel_rows.agree`; our own failure rules the kernel out."""
    try:
        kernel_rows.agree(case, way, generator)
    except Exception:
        if way == "ours":
            WRONG.add(case.kernel)
        raise


def test_kernels_agree(case, way):
    agree(case, way, torch.Generator().manual_seed(0))


@pytest.mark.benchmark(timer=CLOCK, disable_gc=True)
def test_kernels(case, way, benchmark, run_info, request):
    if case.kernel in WRONG:
        pytest.skip(f"{case.kernel} gave a wrong result")
    agree(case, way, torch.Generator(kernel_rows.device()).manual_seed(0))
    times, peak = kernel_rows.timed(case, way, small=request.config.getoption("small"))
    CLOCK.load(times)
    benchmark.group = f"{case.kernel} {case.name}"
    benchmark.pedantic(lambda: None, rounds=len(times))
    benchmark.extra_info.update(kernel_rows.describe(case, way, run_info, peak, benchmark.stats.stats.median))
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
