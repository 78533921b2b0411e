"""The kernels of most time: which they are, and how near they came to the device's roofs."""

from types import SimpleNamespace

import pytest
import torch

from fastvid.training import longest

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def operator(name, shapes, *kernels):
    launched = [SimpleNamespace(name=name, duration=duration) for name, duration in kernels]
    return SimpleNamespace(name=name, input_shapes=shapes, kernels=launched)


def kernel(name, microseconds, count, device=CUDA, named=False):
    taken = {"self_device_time_total": microseconds, "count": count}
    return SimpleNamespace(key=name, device_type=device, is_user_annotation=named, **taken)


def recording_of(operators, kernels):
    """What torch's profiler gives, of a GPU."""
    return SimpleNamespace(events=lambda: operators, key_averages=lambda: kernels)


def test_kernels_are_compared_with_the_roofs_of_what_they_do():
    product = [[1000, 500], [500, 200]]  # 0.2 GFLOP
    recording = recording_of(
        [
            *[operator("aten::mm", product, ("clears memory", 1), ("nvjet", 50))] * 4,
            *[operator("aten::_scaled_mm", product, ("nvjet_qq", 20))] * 2,
            operator("aten::addmm", [[200], *product, [], []], ("nvjet_bias", 10)),
            operator("aten::matmul", product),
            operator("aten::mm", product),  # which launched nothing
        ],
        [
            kernel("nvjet", 200, 4),
            kernel("nvjet_qq", 40, 2),
            kernel("nvjet_bias", 10, 1),
            kernel("_swiglu_fwd_kernel", 100, 2),
            kernel("aten::mm", 210, 4, CPU),
            kernel("FSDP::pre_forward (layers.0)", 300, 2, named=True),
            *(kernel(f"small {i}", 1, 1) for i in range(20)),
        ],
    )
    roofs = longest.Roofs(bytes_per_second=1e12, flops_per_second=1e13)
    moved = {"_swiglu_fwd_kernel": 80_000_000, "_rope_qk_kernel": 7}
    about = {"steps": 2, "seconds": 1e-3, "gpu": True}
    rows = longest.longest(recording, moved=moved, roofs=roofs, **about)
    assert [row.name for row in rows[:4]] == ["nvjet", "_swiglu_fwd_kernel", "nvjet_qq", "nvjet_bias"]
    assert len(rows) == longest.SHOWN
    first, swiglu, fp8, bias, small = rows[:5]
    assert (first.milliseconds, first.share, first.calls) == pytest.approx((0.1, 0.2, 2))
    assert (first.flops, first.of_roof) == pytest.approx((4e8, 8e8 / 1e13 / 200e-6)) and first.bytes is None
    assert (swiglu.bytes, swiglu.of_roof) == pytest.approx((4e7, 80e-6 / 100e-6)) and swiglu.flops is None
    assert fp8.of_roof == pytest.approx(4e8 / 2e13 / 40e-6)
    assert bias.of_roof == pytest.approx(2e8 / 1e13 / 10e-6)
    assert small.flops is small.bytes is small.of_roof is None
    text = longest.table(rows, **about).splitlines()
    assert "profile of 2 steps of 0.5 ms: kernels by GPU time" in text[0]
    assert text[3].split() == ["0.05", "10.0%", "1.0", "0.04", "80%", "_swiglu_fwd_kernel"]


def test_torch_tells_ranges_that_somebody_named():
    """By what `longest` asks, of what it is given."""
    with torch.profiler.profile() as recording, torch.profiler.record_function("FSDP::pre_forward (layers.0)"):
        torch.ones(2).add(1)
    named = {event.key: bool(event.is_user_annotation) for event in recording.key_averages()}
    assert named["FSDP::pre_forward (layers.0)"] and not named["aten::add"]


@pytest.mark.parametrize(
    "name, shapes, flops",
    [
        ("aten::mm", [[3, 4], [4, 5]], 120),
        ("aten::mm", [[3, 4], [4, 5], [3, 5]], 120),
        ("aten::bmm", [[2, 3, 4], [2, 4, 5]], 240),
        ("aten::addmm", [[5], [3, 4], [4, 5], [], []], 120),
        ("aten::addmm", [[3, 5], [3, 4], [4, 5], [], [], [3, 5]], 120),
        ("aten::_scaled_mm", [[3, 4], [4, 5], [3, 1], [1, 5]], 120),
        ("aten::mm", [[], []], None),
        ("aten::add", [[3, 4], [3, 4], []], None),
    ],
)
def test_operations_of_products(name, shapes, flops):
    assert longest.product_flops(name, shapes) == flops


def test_a_cpu_has_no_roofs():
    assert longest.Roofs.of(torch.device("cpu")) == longest.Roofs(None, None)


def test_a_gpus_roofs_are_its_data_sheets(monkeypatch):
    properties = SimpleNamespace(memory_clock_rate=3_201_000, memory_bus_width=6144)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    found = longest.Roofs.of(torch.device("cuda:0"))
    assert found.bytes_per_second == pytest.approx(4.917e12, rel=1e-3) and found.flops_per_second == 989e12
