"""Rows of a GPU check as its stages write them, of two runs on one card, for tests of its report."""

import json

import pytest

from bench.gpu import merge

CARD = "NVIDIA H200"
VERSIONS = {"torch": "2.11.0", "triton": "3.6.0", "transformers": "5.17.0"}


def begin(commit, date="2026-01-01", **more):
    return {
        "stage": "run",
        "task": "run",
        "status": "ok",
        "row": "environment",
        "small": False,
        "device": CARD,
        "python": "3.12.3",
        "commit": commit,
        "date": date,
        "versions": VERSIONS,
    } | more


def end(stage, task, status="ok", error=None):
    return {"stage": stage, "task": task, "status": status, "row": "end", "seconds": 1.0} | (
        {"error": f"{status.replace('_', ' ')}: {error}"} if error else {}
    )


def probed(name, **figures):
    return {"stage": "probe", "task": "any", "status": "ok", "at": 0.1, "row": name, **figures}


CARD_ROW = probed("card", driver_version="580.1", memory_bytes=100 * 2**30)


def timed(kernel, way, median, *, stage="kernels", bytes=4e8, case="forward N=1", **more):
    row = {
        "stage": stage,
        "task": kernel,
        "status": "ok",
        "at": 1.0,
        "row": f"{case} {way}",
        "kernel": kernel,
        "case": case,
        "way": way,
        "median": median,
        "iqr": median / 50,
        "rounds": 50,
        "small": False,
        "device": CARD,
        "copy_bytes_per_second": 4e12,
        "matmul_flops_per_second": 8e14,
        "baseline": "eager",
        "bytes": bytes,
        "flops": 0,
        "peak_extra_mib": 1.0,
        "gb_per_s": round(bytes / median / 1e9, 2),
    }
    return row | {"percent_of_copy": round(100 * bytes / median / 4e12, 1)} | more


def step(name, seconds, *, rows=24_000, loss=11.0, flops=4e14, **more):
    times = [seconds] * 3 if seconds else []
    row = {
        "stage": "train",
        "task": name,
        "status": "ok",
        "at": 9.0,
        "row": name,
        "title": f"title of {name}",
        "dtype": "bf16",
        "loss": loss,
        "norm": 15.0,
        "samples": 30,
        "rows": rows,
        "sample_rows": 24_000,
        "flops": flops,
        "seconds_each": times,
        "start_bytes": 0,
        "peak_bytes": 40 * 2**30,
    }
    return row | ({"seconds": seconds} if seconds else {}) | more


def profiled(name, device_ms, names):
    return {
        "stage": "train",
        "task": f"{name} profile",
        "status": "ok",
        "row": name,
        "device_ms": device_ms,
        "launches": 99,
        "kernels": names,
    }


def best(seconds, block):
    return {
        "stage": "sweep",
        "task": "swiglu",
        "status": "ok",
        "at": 1.0,
        "row": f"best: forward N=1 block {block}",
        "best": True,
        "kernel": "swiglu",
        "case": "forward N=1",
        "candidate": {"block": block},
        "seconds": seconds,
        "percent_of_copy": 125.0,
    }


FIRST = [
    begin("aaa"),
    CARD_ROW,
    probed("product, burst", flops_per_second=8e14),
    probed("product, sustained", flops_per_second=6e14),
    probed("products of a layer, 8448 rows, fp8", flops_per_second=1.5e15),
    timed("swiglu", "ours", 2e-4),
    timed("swiglu", "eager", 4e-4),
    end("kernels", "swiglu"),
    step("exact", 2.0, estimated_bytes=39 * 2**30),
    end("train", "exact"),
    end("train", "reference", "failed", "ran past its limit"),
    end("extract", "tower", "left_out", "no time"),
    best(7e-5, 256),
    {"stage": "correct", "task": "AdamW", "status": "failed", "row": "float32", "at": 1.0},
    end("correct", "AdamW", "failed", "float32"),
]
SECOND = [
    begin("bbb", "2026-01-02"),
    timed("swiglu", "ours", 1e-4),
    timed("swiglu", "Liger", 1.25e-4, stage="libraries"),
    step("exact", 1.0, estimated_bytes=30 * 2**30),
    step("exact_8448", 0.5, rows=13_000, sample_rows=13_500, samples=16),
    step("tuned", 1.25),
    step("strong", 1.5),
    step("strong_video_first", None),
    step("shared", 0.4, rows=6000),
    step("shared_fp8", 0.2, rows=6000),
    step("fp8", 0.7),
    step("full", 1.6, flops=9.6e14),
    profiled(
        "exact", 100.0, [["nvjet_sm90_tst", 50.0, 9], ["void pytorch_flash::flash_fwd_kernel<cutlass::bf16>", 20.0, 3]]
    ),
    end("train", "reference", "left_out", "no time"),
    best(8e-5, 512),
]


def write(path, rows, cut=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + cut)
    return path


@pytest.fixture
def files(tmp_path):
    return [
        write(tmp_path / "a" / "results.jsonl", FIRST),
        write(tmp_path / "b.jsonl", SECOND, '{"stage": "train", "ro'),
    ]


@pytest.fixture
def card(files):
    (card,) = merge.read(files)
    return card


def only(rows, **wanted):
    (row,) = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return row
