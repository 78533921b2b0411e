"""Bytes that launches are said to move, beside the addresses that interpreted kernels read and write."""

import numpy as np
import pytest
import torch
from fastvid_kernels.adamw8bit_step import adamw8bit_step
from fastvid_kernels.adamw_step import adamw_step
from fastvid_kernels.add_rms_norm import add_rms_norm_fp8
from fastvid_kernels.dispatch import watch_launches
from fastvid_kernels.grid_pool import grid_pool
from fastvid_kernels.launch_bytes import launch_bytes, name_of
from fastvid_kernels.merge_parts import merge_parts
from fastvid_kernels.quantize_fp8 import quantize_fp8
from fastvid_kernels.rope_keys_backward import rope_keys_backward
from fastvid_kernels.rope_keys_fp8 import rope_keys_backward_fp8
from fastvid_kernels.swiglu import swiglu_backward_fp8, swiglu_fp8
from fastvid_kernels.way_back import Twice, WayBack
from model_cases import FEW, loss_and_gradients, prepared, random_model, with_prefix
from triton.runtime.interpreter import InterpreterBuilder


@pytest.fixture
def touched(monkeypatch):
    """[(kernel, bytes that its launch is said to move, distinct bytes that it read and wrote)] of interpreted ones."""
    launches, read, written = [], [], []
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def note(places, ptrs, mask):
        masked = np.broadcast_to(mask.data, ptrs.data.shape).astype(bool)
        addresses = ptrs.data[masked].astype(np.int64)
        size = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
        places.append((addresses[:, None] + np.arange(size)).ravel())

    def loads(self, ptrs, mask, *others):
        note(read, ptrs, mask)
        return load(self, ptrs, mask, *others)

    def stores(self, ptrs, value, mask, *others):
        note(written, ptrs, mask)
        return store(self, ptrs, value, mask, *others)

    def end():
        if launches:
            launches[-1][2] = sum(len(np.unique(np.concatenate(places))) for places in (read, written) if places)
        read.clear(), written.clear()

    def begin(kernel, arguments, options):
        end()
        launches.append([name_of(kernel), launch_bytes(kernel, arguments, options), 0])

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", loads)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", stores)
    with watch_launches(begin):
        yield lambda: end() or launches


@pytest.mark.parametrize("frames, over_time", [(3, True), (3, False), (8, True), (8, False), (11, False)])
def test_grids_touch_the_frames_that_they_take(touched, monkeypatch, frames, over_time):
    """Of some frames those alone; of more steps than frames each frame once."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.randn(8, 16, 24).half()
    grid_pool(x, (frames, 2, 2), over_time=over_time)
    ((name, said, moved),) = touched()
    assert name == "_grid_pool_kernel" and said == moved
    assert said == 2 * (x[0].numel() * (8 if over_time else min(frames, 8)) + frames * 4 * 24)


def others(dtype):
    """Launch what a small model in the compute dtype does not."""

    def drawn(*shape):
        return torch.randn(shape, dtype=dtype)

    quantize_fp8(drawn(5, 96))
    swiglu_fp8(drawn(5, 192))
    swiglu_backward_fp8(drawn(5, 192), drawn(5, 96))
    add_rms_norm_fp8(drawn(5, 96), drawn(5, 96), torch.ones(96), 1e-5, dtype)
    rows_M = torch.tensor([0, 1, 2, 3, 4, 2, 3, 4, 0])  # two constant rows, three packed ones
    way_back = WayBack.of(rows_M, 2, 3)
    for backward in rope_keys_backward, rope_keys_backward_fp8:
        options = {"way_back": (way_back.starts_N1, way_back.places)}
        backward(drawn(3, 4, 8), *(drawn(9, 2, 8) for _ in range(2)), torch.arange(3), torch.ones(4), **options)
        for keys, first in (9, 4), (4, 4):
            more = [drawn(count, heads, 8) for count, heads in ((2, 4), (5, 2), (5, 2))]
            grads = drawn(3, 4, 8), *(drawn(keys, 2, 8) for _ in range(2))
            options["more"] = more, Twice(1, keys, first, 5)
            backward(*grads, torch.arange(3), torch.ones(4), **options)
    parts = [x for _ in range(2) for x in (drawn(5, 4, 24), torch.randn(4, 5))]
    merge_parts(*parts)
    merge_parts(*parts, inplace=True)
    options = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
    codes, scales = (torch.zeros(1024, dtype=torch.uint8) for _ in range(2)), (torch.zeros(4) for _ in range(2))
    adamw8bit_step(drawn(1024), drawn(1024), *codes, *scales, **options)
    adamw_step(torch.randn(1024).bfloat16(), torch.randn(1024), torch.zeros(1024), torch.zeros(1024), **options)


@pytest.mark.slow
def test_kernels_touch_what_they_are_said_to_move(touched, monkeypatch):
    """But for a few rows of a table that several samples read, and for rows that nobody reads."""
    dtype, (_, batch) = torch.bfloat16, with_prefix(text_only=False, shapes=FEW)
    batch = batch.parted()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    made = prepared(random_model(compute_dtype=dtype))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    loss_and_gradients(made, batch)
    others(dtype)
    launches = touched()
    assert {name for name, *_ in launches} >= {
        "_add_rms_norm_fwd_kernel",
        "_add_rms_norm_bwd_kernel",
        "_rope_qk_kernel",
        "_place_keys_kernel",
        "_collect_kernel",
        "_swiglu_fwd_kernel",
        "_swiglu_bwd_kernel",
        "_softmax_gradient_kernel",
        "_splice_fwd_kernel",
        "_splice_video_bwd_kernel",
        "_quantize_fp8_kernel",
        "_swiglu_fp8_fwd_kernel",
        "_swiglu_fp8_bwd_kernel",
        "_collect_fp8_kernel",
        "_merge_parts_kernel",
        "_adamw_step_kernel",
        "_adamw8bit_step_kernel",
    }
    wrong = [launch for launch in launches if not 0.9 * launch[1] - 400 <= launch[2] <= 1.02 * launch[1] + 400]
    assert not wrong
    assert sum(launch[2] for launch in launches) == pytest.approx(sum(launch[1] for launch in launches), rel=0.02)
