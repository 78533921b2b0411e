"""Counts the variants of each kernel that Triton would compile for other row counts: ``variants_worker.py`` prints
them.

Runs without Triton's interpreter, and compiles nothing: a launch ends where Triton has computed its key.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "kernels"))

from compile_worker import AbsentGPU  # noqa: E402
from fastvid_kernels import dispatch, frame_patchify, grid_pool, spatio_temporal_pool, yuv_patchify  # noqa: E402
from fastvid_kernels.adamw8bit_step import adamw8bit_step  # noqa: E402
from fastvid_kernels.adamw_step import adamw_step  # noqa: E402
from fastvid_kernels.add_layer_norm import add_layer_norm  # noqa: E402
from fastvid_kernels.add_rms_norm import add_rms_norm, add_rms_norm_fp8  # noqa: E402
from fastvid_kernels.linear_cross_entropy import linear_cross_entropy  # noqa: E402
from fastvid_kernels.merge_parts import merge_parts  # noqa: E402
from fastvid_kernels.quantize_fp8 import BackInFp8, quantize_fp8  # noqa: E402
from fastvid_kernels.quick_gelu import quick_gelu  # noqa: E402
from fastvid_kernels.rope_keys import place_keys, rope_keys  # noqa: E402
from fastvid_kernels.rope_keys_backward import rope_keys_backward  # noqa: E402
from fastvid_kernels.rope_keys_fp8 import rope_keys_backward_fp8  # noqa: E402
from fastvid_kernels.rope_qk import rope_qk  # noqa: E402
from fastvid_kernels.splice_video import splice_video  # noqa: E402
from fastvid_kernels.swiglu import swiglu, swiglu_backward_fp8, swiglu_fp8  # noqa: E402
from fastvid_kernels.way_back import Twice, WayBack  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

D, BF16 = 64, torch.bfloat16
COUNTS = (1, 2, 15, 16, 17, 32, 4000, 8192)


def indices(rows, first, dtype=torch.int64):
    """`rows` indices that begin `first` elements behind an aligned address."""
    return torch.zeros(first + rows, dtype=dtype)[first:]


def rows(count, width=D):
    return torch.empty(count, width, dtype=BF16, requires_grad=True)


def call_all(count, first):
    """Everything that a training step launches on `count` rows, and an extraction on so many frames, at most 100."""
    x, branch, weight = rows(count), rows(count), torch.empty(D, requires_grad=True)
    outputs = add_rms_norm(x, branch, weight, 1e-5, BF16, impl="triton")
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    every = rows(count + first + 1).detach(), rows(count + first + 1).detach()
    outputs = add_rms_norm(x, branch, weight, 1e-5, BF16, every=every, impl="triton")[:2]
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    outputs = add_rms_norm(x, BackInFp8.of(branch), weight, 1e-5, BF16, impl="triton")
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    swiglu(rows(count, 2 * D), impl="triton").backward(torch.empty(count, D, dtype=BF16))
    lse, other_lse = (torch.empty(4, first + count)[:, first:] for _ in range(2))
    part, other = (torch.empty(count, 4, 16, dtype=BF16) for _ in range(2))
    merge_parts(part, lse, other, other_lse, inplace=True, impl="triton")
    positions, frequencies = indices(count, first, torch.int32), torch.empty(8)
    rope_qk(rows(count, 3 * D), positions, frequencies, 4, 4, impl="triton").backward(
        torch.empty(count, 3 * D, dtype=BF16)
    )
    constant = (torch.empty(7, 4, 16, dtype=BF16),) * 2
    way_back = WayBack(indices(count + 1, first, torch.int32), indices(count, first, torch.int32), 7)
    outputs = rope_keys(
        rows(count, 3 * D),
        positions,
        frequencies,
        4,
        4,
        rows_M=indices(count + 7, first),
        way_back=way_back,
        constant=constant,
        inplace=True,
        impl="triton",
    )
    torch.autograd.backward(outputs, [torch.empty_like(output) for output in outputs])
    place_keys(rows(count, 3 * D).detach(), positions, frequencies, 4, 4, 1.0, indices(count + 7, first), constant)
    places = way_back.starts_N1, way_back.places
    for backward in rope_keys_backward, rope_keys_backward_fp8:
        backward(*outputs, positions, frequencies, way_back=places, impl="triton")
        twice = Twice(first, count, first, count)
        backward(*outputs, positions, frequencies, way_back=places, more=(outputs, twice), impl="triton")
    boundary = torch.empty(2, D, requires_grad=True)
    spliced = splice_video(
        indices(count, first),
        torch.empty(9, D, dtype=BF16),
        rows(count),
        indices(count, first),
        boundary,
        indices(2 * count, first),
        BF16,
        impl="triton",
    )
    spliced.backward(torch.empty_like(spliced))
    linear_cross_entropy(rows(count), torch.empty(100, D, dtype=BF16), indices(count, first), impl="triton")
    quantize_fp8(torch.empty(count, D, dtype=BF16), impl="triton")
    add_rms_norm_fp8(x, branch, weight, 1e-5, BF16, impl="triton")
    swiglu_fp8(torch.empty(count, 2 * D, dtype=BF16), impl="triton")
    swiglu_backward_fp8(torch.empty(count, 2 * D, dtype=BF16), torch.empty(count, D, dtype=BF16), impl="triton")
    param, grad, codes, scales = (torch.empty(256, dtype=dtype) for dtype in (BF16, BF16, torch.uint8, torch.float32))
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "impl": "triton"}
    settings |= {"step": count, "seed": 2**40 + first, "first": 8 * count}
    adamw8bit_step(
        param,
        grad,
        codes,
        codes,
        scales[:1],
        scales[:1],
        **settings,
    )
    adamw_step(
        param,
        grad,
        torch.empty(256),
        torch.empty(256),
        **settings,
    )
    states = torch.empty(count, D, dtype=BF16)
    add_layer_norm(states, states, states[0], states[0], 1e-5, impl="triton")
    quick_gelu(states, impl="triton")
    frames = torch.empty(min(count, 100), 40, 40, 3, dtype=torch.uint8)
    frame_patchify(frames, size=28, patch=14, mean=(0.5,) * 3, std=(0.5,) * 3, impl="triton")
    y, half = torch.empty(40, 40, dtype=torch.uint8), torch.empty(20, 20, dtype=torch.uint8)
    yuv_patchify(
        [(y, half, half)] * len(frames),
        [(1,) * 6] * len(frames),
        size=28,
        patch=14,
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        impl="triton",
    )
    for counts in (None, [len(frames)]):
        states = torch.empty(1, len(frames), 5, D, dtype=BF16, requires_grad=True)
        pooled = spatio_temporal_pool(states, frame_counts=counts, impl="triton")
        pooled.backward(torch.empty_like(pooled))
    grid_pool(torch.empty(len(frames), 16, D, dtype=BF16), (8, 2, 2), impl="triton")


def main():
    keys = defaultdict(dict)

    def key_only(self, *args, grid, warmup, **kwargs):
        *_, binder = self.device_caches[driver.active.get_current_device()]
        names = [parameter.name for parameter in self.params]
        _, specialization, options = binder(*args, **kwargs)
        constants = [value for kind, value in specialization if kind == "constexpr" and value is not None]
        varying = {name: str(value) for name, value in zip(names, specialization)}
        keys[self.fn.__name__].setdefault(str((constants, options)), {}).setdefault(str(varying), varying)

    JITFunction.run = key_only
    driver.set_active(AbsentGPU())
    dispatch.INTERPRETED = True  # kernels take CPU tensors, as under the interpreter
    for count in COUNTS:
        for first in (0, 1):
            call_all(count, first)
    print(
        json.dumps(
            {
                name: [list(variants.values()) for variants in by_constants.values()]
                for name, by_constants in keys.items()
            }
        )
    )


if __name__ == "__main__":
    main()
