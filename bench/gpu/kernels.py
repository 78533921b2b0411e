"""The kernels at production shapes: every way is compared with fp32 first, and then timed."""

import torch

from bench import attention_rows, kernel_rows
from bench.measure import copy_bandwidth, matmul_rate

OURS = ("ours", "eager")


def rows(small, kernel, others=False):
    """Rows of one kernel: ours and eager torch, or the `others`: torch.compile and libraries."""
    cases = [case for case in kernel_rows.all_cases(small) if case.kernel == kernel]
    pairs = [
        (case, way)
        for case in cases
        for way in case.ways
        if (way in OURS) != others and (way != "reference's chain" or small)
    ]
    pairs.sort(key=lambda pair: pair[1] in kernel_rows.LAST)
    if not pairs:
        yield {"row": kernel, "absent": "no library that does this job is installed, or none can run here"}
    yield from _measured(pairs, small)


def attention(small):
    """Rows of attention: what a model would take, each library that is there, SDPA."""
    yield from _measured([(case, way) for case in attention_rows.cases(small) for way in case.ways], small)


def _measured(pairs, small):
    info = {"small": small}
    if torch.cuda.is_available():
        info |= {
            "device": torch.cuda.get_device_name(),
            "copy_bytes_per_second": copy_bandwidth(small),
            "matmul_flops_per_second": matmul_rate(small),
        }
    for case, way in pairs:
        label = {"row": f"{case.name} {way}", "kernel": case.kernel, "case": case.name, "way": way}
        try:
            kernel_rows.agree(case, way, torch.Generator(kernel_rows.device()).manual_seed(0))
            times, peak = kernel_rows.timed(case, way, small=small)
        except Exception as error:
            if "CUDA error" in str(error):  # nothing that this process computes from now on could be trusted
                raise
            yield label | {"status": "failed", "error": f"{type(error).__name__}: {error}"[:500]}
            continue
        spread = kernel_rows.spread(times)
        yield label | spread | kernel_rows.describe(case, way, info, peak, spread["median"])
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
