"""Tiles of the kernels: every candidate is compared with fp32 and timed, at every shape of the benchmark.

A candidate replaces a kernel module's `_tiles` and, where that does not give them, the warps of its launches.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module

import torch
import triton
from triton.runtime.jit import JITFunction

from bench import fp8_cases, kernel_rows
from bench.measure import assert_agree, copies_needed, copy_bandwidth, time_calls

POWER = triton.next_power_of_2
WARPS = {}  # of the candidate in hand
# Kernels with a layout of their own, which no candidate is about.
OTHERS = ("_finish_kernel", "_map_kernel", "_boundary_bwd_kernel", "_weight_kernel")


@dataclass(frozen=True)
class Space:
    """What is tried of a kernel.

    Attributes:
        candidates: dicts; "warps" sets launches, "chunk" the loss's chunk of logits.
        tiles: (candidate, arguments of `_tiles`) → what `_tiles` returns.
        jobs: of the cases that candidates are about; none: all of the kernel's but those to e4m3, whose tiles hold a
            whole row whatever a candidate says.
    """

    candidates: list
    tiles: Callable
    jobs: tuple = ()


def _blocks(blocks, warps):
    return [{"block": block, "warps": w} for block in blocks for w in warps if 2 <= block // (32 * w) <= 64]


def _pool(c, B, T, P, C, itemsize):
    blocks = triton.cdiv(P, c["block_p"])
    runs = max(1, min(T // 8, c["programs"] // max(B * blocks * triton.cdiv(C, c["block_c"]), 1)))
    block_p, block_c = max(16, POWER(triton.cdiv(P, blocks))), c["block_c"]
    return block_p, block_c, triton.cdiv(P, blocks), triton.cdiv(T, runs), c["warps"], c["stages"]


def _grid(c, rows, width):
    block = min(POWER(max(width, 1)), c["block"])
    return block, triton.cdiv(width, block), (rows * triton.cdiv(width, block),)


def _rope(c, heads, half):
    block = min(POWER(heads), c["heads"])
    return block, POWER(half), triton.cdiv(heads, block), c["warps"]


SPACES = {
    "spatio_temporal_pool": Space(
        [
            {"block_p": p, "block_c": 64, "warps": w, "stages": s, "programs": n}
            for p, w, s, n in (
                (64, 2, 3, 450),
                (64, 2, 2, 450),
                (64, 2, 4, 450),
                (64, 2, 3, 300),
                (64, 2, 2, 600),
                (64, 2, 3, 600),
                (64, 2, 2, 900),
                (64, 2, 3, 900),
                (64, 2, 3, 1200),
                (64, 1, 2, 450),
                (64, 1, 3, 450),
                (64, 1, 3, 900),
                (32, 1, 2, 900),
                (32, 1, 3, 900),
                (32, 1, 4, 900),
                (32, 1, 2, 1200),
                (32, 1, 3, 1200),
                (32, 1, 3, 1800),
                (32, 2, 3, 900),
                (16, 1, 3, 1800),
            )
        ],
        _pool,
        ("forward",),
    ),
    "grid_pool": Space(
        [
            {"places": k, "channels": c, "warps": w}
            for k, c, w in (
                (4, 1024, 4),
                (4, 512, 2),
                (4, 256, 1),
                (2, 1024, 4),
                (2, 256, 1),
                (8, 512, 4),
                (4, 1024, 8),
            )
        ],
        lambda c, window, C: (min(c["places"], POWER(window)), min(c["channels"], POWER(C)), c["warps"]),
    ),
    "add_rms_norm": Space(
        [{"warps": w} for w in (4, 8, 16, 32)], lambda c, D, summed=False: (POWER(max(D, 32)), c["warps"])
    ),
    "swiglu": Space(_blocks((512, 1024, 2048, 4096), (2, 4, 8)), _grid),
    "add_layer_norm": Space([{"warps": w} for w in (1, 2, 4, 8)], lambda c, D: (POWER(max(D, 32)), c["warps"])),
    "quick_gelu": Space(_blocks((512, 1024, 2048, 4096), (2, 4, 8)), lambda c: c["block"]),
    "splice_video": Space(_blocks((1024, 2048, 4096), (4, 8)), _grid),
    "rope_qk": Space(
        [{"heads": h, "warps": w} for h in (8, 16, 32, 64) for w in (1, 2, 4, 8) if 4 <= h * 2 // w <= 64], _rope
    ),
    "rope_keys": Space(
        [{"heads": h, "warps": w} for h in (8, 16, 32) for w in (1, 2, 4, 8) if 4 <= h * 2 // w <= 32],
        lambda c, heads, half: (min(POWER(heads), c["heads"]), c["warps"]),
    ),
    "merge_parts": Space(
        [{"heads": h, "warps": w} for h in (8, 16, 32) for w in (2, 4, 8) if 4 <= h * 4 // w <= 32],
        lambda c, heads, channels: (min(POWER(heads), c["heads"]), POWER(channels), c["warps"]),
    ),
    "adamw_step": Space(
        [{"blocks": b, "warps": w} for b, w in ((4, 4), (2, 2), (4, 2), (8, 4), (8, 8))],
        lambda c: (c["blocks"], c["warps"]),
    ),
    "quantize_fp8": Space(
        _blocks((2048, 4096, 8192, 16384, 32768), (4, 8, 16, 32)),
        lambda c, width: (min(POWER(width), c["block"]), c["warps"]),
    ),
    "linear_cross_entropy": Space(
        [
            {"block": b, "warps": w, "chunk": chunk}
            for b, w in ((4096, 8), (8192, 8), (8192, 16), (16384, 16), (32768, 32))
            for chunk in (2**24, 2**25, 2**26)
        ],
        lambda c, width: (min(POWER(width), c["block"]), c["warps"]),
    ),
    # One warp alone looks codes up by shuffles: 200 instructions an element, where others take 60 to 75.
    "adamw8bit_step": Space(
        [{"blocks": b, "warps": w} for b, w in ((4, 4), (8, 4), (2, 2), (2, 4), (4, 2), (8, 8), (4, 8), (16, 8))],
        lambda c: (c["blocks"], c["warps"]),
    ),
    "yuv_patchify": Space(
        [
            {"pixels": p, "frames": f, "warps": w}
            for p, w in ((64, 1), (64, 2), (128, 1), (128, 2), (128, 4), (256, 2), (256, 4))
            for f in (25, 50, 100)
        ],
        lambda c, pixels, frames: (
            min(c["pixels"], max(8, POWER(pixels))),
            max(1, min(c["frames"], frames)),
            c["warps"],
        ),
    ),
    "frame_patchify": Space(
        [
            {"block": b, "frames": f, "line": line, "warps": w}
            for b, line, w in ((256, 128, 1), (256, 128, 2), (256, 64, 2), (512, 128, 2), (512, 128, 4), (512, 256, 2))
            for f in (12, 40, 100)
        ],
        lambda c, values, frames: (
            min(c["block"], POWER(values)),
            max(1, min(c["frames"], frames)),
            min(c["line"], c["block"], POWER(values)),
            c["warps"],
        ),
    ),
}


BACKWARD = {"rope_keys": ["fastvid_kernels.rope_keys_backward"]}  # modules of kernels whose backward lies apart


def _override_warps():
    launch = JITFunction.run

    def patched(self, *args, grid, warmup, **options):
        if WARPS and not self.fn.__name__.endswith(OTHERS):
            options["num_warps"] = WARPS["warps"]
        return launch(self, *args, grid=grid, warmup=warmup, **options)

    if launch.__name__ != "patched":
        JITFunction.run = patched


def _apply(kernel, candidate):
    module, tiles = import_module(f"fastvid_kernels.{kernel}"), SPACES[kernel].tiles
    for each in module, *map(import_module, BACKWARD.get(kernel, ())):
        each._tiles = lambda *args, **options: tiles(candidate, *args, **options)
    if "chunk" in candidate:
        module.CHUNK_LOGITS = candidate["chunk"]
    WARPS.clear()
    if "warps" in candidate:
        WARPS["warps"] = candidate["warps"]


def _chosen(small, kernel):
    """(cases, candidates); `small`: the first two."""
    jobs = SPACES[kernel].jobs
    cases = [case for case in kernel_rows.all_cases(small) if case.kernel == kernel]
    cases = [case for case in cases if (case.job in jobs if jobs else not case.job.endswith(fp8_cases.JOB))]
    candidates = SPACES[kernel].candidates
    return cases, candidates[:2] if small else candidates


def compile_all(small, kernel):
    """Launch every candidate once, so that the timing process finds it in Triton's cache."""
    _override_warps()
    cases, candidates = _chosen(small, kernel)
    done, device = 0, kernel_rows.device()
    for case in cases:
        inputs = case.make(torch.Generator(device).manual_seed(0), device)
        for candidate in candidates:
            _apply(kernel, candidate)
            try:
                case.ways["ours"](*inputs)()
                done += 1
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
        if device == "cuda":
            torch.cuda.synchronize()
        del inputs
    yield {"row": "compiled", "done": done, "of": len(cases) * len(candidates)}


def measure(small, kernel):
    """The candidates of a kernel at each shape, and which was best."""
    _override_warps()
    on_cuda, device = torch.cuda.is_available(), kernel_rows.device()
    roof = copy_bandwidth(small) if on_cuda else None
    cases, candidates = _chosen(small, kernel)
    for case in cases:
        copies = [case.make(torch.Generator(device).manual_seed(1), device)]
        copies += [
            case.make(torch.Generator(device).manual_seed(2 + i), device) for i in range(copies_needed(copies[0]) - 1)
        ]
        expected = case.expected(*kernel_rows.clone(case.make(torch.Generator(device).manual_seed(0), device)))()
        best = None
        for candidate in candidates:
            _apply(kernel, candidate)
            row = {
                "row": f"{case.name} {json.dumps(candidate)}",
                "kernel": kernel,
                "case": case.name,
                "candidate": candidate,
            }
            try:
                given = case.make(torch.Generator(device).manual_seed(0), device)
                assert_agree(case.ways["ours"](*given)(), expected, case.tolerance)
                times = time_calls(case.ways["ours"], copies, rounds=5 if small else 20, seconds=1.0, on_cuda=on_cuda)
            except Exception as error:
                if "CUDA error" in str(error):
                    raise
                yield row | {"unfit": f"{type(error).__name__}: {error}"[:200]}
                continue
            median = sorted(times)[len(times) // 2]
            row |= {"seconds": median}
            if roof and case.bytes:
                row["percent_of_copy"] = round(100 * case.bytes / median / roof, 1)
            yield row
            if best is None or median < best["seconds"]:
                best = row
        if best:
            yield best | {"row": f"best: {best['row']}", "best": True}
        del copies, expected
        if on_cuda:
            torch.cuda.empty_cache()
