"""The kernels' benchmark: its clock, its comparison, its table and picture, and the command that runs it."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT

from bench import kernel_rows, measure, optimizer_cases, report, roofline, vision_cases
from bench.gpu import sweep

GPU = {"device": "GPU X", "copy_bytes_per_second": 4e12, "matmul_flops_per_second": 8e14}
COMMON = {
    "python": "3.12",
    "commit": "abc",
    "date": "2026-11-22",
    "versions": {"torch": "2.11"},
    "small": False,
    "peak_extra_mib": None,
    "times_as_fast_as_baseline": 2.0,
    "bytes": 0,
    "flops": 0,
}


def row(kernel, way, median, **info):
    return {
        "extra_info": COMMON | {"kernel": kernel, "case": "forward", "way": way} | info,
        "stats": {"median": median, "iqr": median / 50},
    }


GPU_ROWS = [
    row("swiglu", "ours", 1e-4, bytes=3.6e8, gb_per_s=3600.0, percent_of_copy=90.0, **GPU),
    row("swiglu", "eager", 2e-4, bytes=3.6e8, gb_per_s=1800.0, percent_of_copy=45.0, **GPU),
    row("linear_cross_entropy", "ours", 1e-3, flops=6e11, tflop_per_s=600.0, **GPU),
]
CPU_ROWS = [
    row("frame_patchify", "ours", 0.25, bytes=1e8, gb_per_s=0.4, device="CPU Y"),
    row("frame_patchify", "reference's chain", 1.0, bytes=1e8, gb_per_s=0.1, device="CPU Y"),
]


def written(folder, rows, date="2026-01-01", name="rows.json"):
    (folder / name).write_text(json.dumps({"datetime": date, "benchmarks": rows}))
    return folder


def test_replayed_times_are_those_measured():
    clock = measure.Replay()
    clock.load([0.25, 0.5])
    readings = [clock() for _ in range(4)]
    assert [readings[1] - readings[0], readings[3] - readings[2]] == [0.25, 0.5]


def test_calls_are_timed_round_by_round_on_copies_in_turn():
    seen = []
    times = measure.time_calls(
        lambda x: lambda: seen.append(x) or time.sleep(0.002), [(1,), (2,)], rounds=5, on_cuda=False
    )
    assert len(times) == 5 and min(times) >= 0.002
    assert seen == [1, 2, 1, 2, 1, 2, 1]  # both once before the rounds


def test_slow_calls_get_fewer_rounds():
    times = measure.time_calls(lambda: lambda: time.sleep(0.002), [()], rounds=50, seconds=0.005, on_cuda=False)
    assert len(times) == measure.SLOW_ROUNDS


@pytest.mark.parametrize("change", ["nan", "one element", "shape", "count"])
def test_a_wrong_result_is_seen(change):
    right = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    wrong = right.clone()
    if change == "nan":
        wrong[3, 3] = float("nan")
    elif change == "one element":
        wrong[3, 3] += 1e-3
    elif change == "shape":
        wrong = wrong[:5]
    measure.assert_agree((right.bfloat16(), right), (right, right))
    with pytest.raises(AssertionError):
        measure.assert_agree((right, wrong)[: 1 if change == "count" else 2], (right, right))


def test_sampled_bytes_are_whole_sectors():
    height, width, size, patch = 37, 50, 30, 7
    touched = set()
    for y in torch.floor(torch.arange(28) * torch.tensor(height / size)).int().tolist():
        for x in torch.floor(torch.arange(28) * torch.tensor(width / size)).int().tolist():
            touched |= {(3 * (y * width + x) + channel) // 32 for channel in range(3)}
    assert vision_cases.sampled_bytes(height, width, size, patch) == 32 * len(touched)


def test_numpy_pooling_is_the_reference():
    x = torch.randn(4, 6, 8).half()
    found = vision_cases.pool_with_numpy(x.numpy()).numpy()
    assert found.dtype == np.float16 and found.shape == (100 + 6, 8)
    np.testing.assert_array_equal(found[:4], x.numpy().mean(1))
    np.testing.assert_array_equal(found[100:], x.numpy().mean(0))
    assert not found[4:100].any()


def test_newest_row_counts_and_tiny_shapes_do_not(tmp_path):
    written(tmp_path, GPU_ROWS, "2026-02-01", "a.json")
    written(tmp_path, [row("swiglu", "ours", 1.0, gb_per_s=1.0, **GPU)], "2026-01-01", "b.json")
    written(tmp_path, [row("rope_qk", "ours", 1.0, gb_per_s=1.0, **GPU) | {}], "2026-03-01", "c.json")
    small = row("splice_video", "ours", 1.0, gb_per_s=1.0, **GPU)
    small["extra_info"]["small"] = True
    written(tmp_path, [small], name="d.json")
    (tmp_path / "conversion.json").write_text('{"environment": {}, "rows": [{"records": 1}]}')
    rows = report.read([tmp_path])
    assert {(r["kernel"], r["way"], r["median"]) for r in rows} == {
        ("swiglu", "ours", 1e-4),
        ("swiglu", "eager", 2e-4),
        ("linear_cross_entropy", "ours", 1e-3),
        ("rope_qk", "ours", 1.0),
    }


def test_table_shows_rates_and_what_is_not_measured(tmp_path):
    text = report.table(report.read([written(tmp_path, GPU_ROWS + CPU_ROWS)]))
    (ours, _, loss) = [line.split() for line in text.splitlines() if "GPU" not in line and "/s" in line][1:4]
    assert ours == "ours 100 µs ± 1 % 3,600 GB/s 90 % 2.00".split()
    assert loss[7:11] == "600 TFLOP/s 75 %".split() or "75" in loss
    missing = [line.split()[0] for line in text.splitlines() if line.endswith("not yet measured")]
    assert missing == [kernel for kernel in report.KERNELS if kernel not in ("swiglu", "linear_cross_entropy")]


@pytest.mark.parametrize("seconds, text", [(2.0, "2.00 s"), (0.0123, "12.3 ms"), (5.4e-5, "54.0 µs"), (0.2, "200 ms")])
def test_durations(seconds, text):
    assert report.duration(seconds) == text


def texts(figure):
    return [text.get_text() for place in (figure, *figure.axes) for text in place.texts]


@pytest.mark.slow
def test_picture_of_a_gpu(tmp_path):
    figure = roofline.draw(report.read([written(tmp_path, GPU_ROWS + CPU_ROWS)]))
    assert [[bar.get_width() for bar in axis.patches] for axis in figure.axes] == [[3600.0], [600.0], [4.0]]
    assert {"copy 4,000", "90 %", "matrix product 800", "75 %", "4.0×"} <= set(texts(figure))
    assert not any("not yet measured" in text for text in texts(figure))
    figure.savefig(tmp_path / "picture.png")


def test_picture_without_a_gpu_says_so(tmp_path):
    figure = roofline.draw(report.read([written(tmp_path, CPU_ROWS)]))
    assert len(figure.axes) == 1 and "On a GPU: not yet measured." in texts(figure)


def test_every_kernel_has_cases_and_block_sizes_to_try():
    assert {case.kernel for case in kernel_rows.all_cases(small=False)} == set(report.KERNELS)
    assert set(sweep.SPACES) == set(report.KERNELS)


# A pytest that another one runs in several processes is none of them: it would not measure.
ALONE = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]


@pytest.mark.slow
def test_rows_of_pytest_benchmark(tmp_path):
    command = [
        *PYTEST,
        "bench",
        "-k",
        "test_kernels and spatio",
        "--small",
        f"--benchmark-json={tmp_path / 'rows.json'}",
    ]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=ALONE | {"PYTHONPATH": ".:kernels"})
    content = json.loads((tmp_path / "rows.json").read_text())
    ours, chain = (
        next(r for r in content["benchmarks"] if r["extra_info"]["way"] == way) for way in ("ours", "reference's chain")
    )
    info = ours["extra_info"]
    assert info["times_as_fast_as_baseline"] == round(chain["stats"]["median"] / ours["stats"]["median"], 3)
    assert info["gb_per_s"] == pytest.approx(info["bytes"] / ours["stats"]["median"] / 1e9, abs=0.01)
    assert {"device", "versions", "commit", "date", "shapes"} <= info.keys() and ours["stats"]["rounds"] == 5


BREAKER = """
from bench import vision_cases
whole = vision_cases.spatio_temporal_pool
vision_cases.spatio_temporal_pool = lambda *x, **keywords: whole(*x, **keywords) + 1
"""


INTERPRETER = """
import sys
sys.path.insert(0, "tests/support")
import interpreter
interpreter.repair()
interpreter.repair_libdevice()
"""


@pytest.mark.slow
def test_rows_of_liger_agree(tmp_path):
    """Its Triton kernels, interpreted, do the jobs that ours are compared on."""
    (tmp_path / "interpreted.py").write_text(INTERPRETER)
    command = [*PYTEST, "-p", "interpreted", "bench", "-k", "agree and Liger", "--small"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:.:kernels", "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert "7 passed" in result.stdout, result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_of_bitsandbytes_agrees(dtype, monkeypatch):
    import bitsandbytes

    monkeypatch.setattr(bitsandbytes.functional, "is_on_gpu", lambda tensors: True)
    case = optimizer_cases._case(1000, dtype)
    inputs = case.make(torch.Generator().manual_seed(0), "cpu")
    expected = case.expected(*[x.clone() for x in inputs])()
    update = optimizer_cases._in_place(optimizer_cases._bitsandbytes())
    measure.assert_agree(update(*inputs)(), expected, case.tolerance)


@pytest.mark.slow
def test_wrong_kernel_is_not_timed(tmp_path):
    (tmp_path / "breaker.py").write_text(BREAKER)
    command = [*PYTEST, "-p", "breaker", "bench", "-k", "spatio or swiglu", "--small"]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{tmp_path}:.:kernels"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    # Its forward is wrong, so neither its rows on a CPU are timed, nor do other kernels suffer.
    assert "1 failed, 13 passed, 2 skipped" in result.stdout, result.stdout
