"""Where kernels are launched: on their tensors' own device, whichever is current. GPUs are pretended."""

import ast
import importlib

import pytest
import torch
from conftest import ROOT
from fastvid_kernels import dispatch
from fastvid_kernels.cpu import rows as rows_of_cpu
from torch._subclasses.fake_tensor import FakeTensorMode

FILES = [
    path for path in sorted((ROOT / "kernels" / "fastvid_kernels").glob("*.py")) if "@triton.jit" in path.read_text()
]


@pytest.fixture
def current(monkeypatch):
    """[index of the current GPU], of two that are pretended."""
    current = [0]

    def exchange(index):
        previous, current[0] = current[0], current[0] if index < 0 else index
        return previous if index >= 0 else -1

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return current


def test_kernels_launch_on_their_tensors_device(current):
    seen = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *arguments, **options: seen.append((current[0], grid, len(arguments), options))

    with FakeTensorMode():
        for device in ("cuda:1", "cuda:0", "cpu"):
            dispatch.launch(Kernel(), (7, 2), torch.empty(3, device=device), 5, num_warps=4)
            assert current == [0]
    assert seen == [(index, (7, 2), 2, {"num_warps": 4}) for index in (1, 0, 0)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_launch_goes_through_the_guard(path):
    calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    assert [call.value.id for call in calls if isinstance(call, ast.Subscript)] == []
    assert any(isinstance(call, ast.Name) and call.id == "launch" for call in calls)


def rows(*shape, dtype=torch.bfloat16, device="cuda:0"):
    return torch.empty(*shape, dtype=dtype, device=device)


# Arguments of which the last tensor lies on the second GPU.
ELSEWHERE = {
    "add_rms_norm": lambda: (rows(2, 8), rows(2, 8), rows(8, device="cuda:1"), 1e-5, torch.bfloat16),
    "swiglu": None,  # takes one tensor
    "rope_qk": lambda: (rows(2, 24), rows(2, dtype=torch.int32), rows(4, dtype=torch.float32, device="cuda:1"), 1, 1),
    "splice_video": lambda: (
        rows(9, dtype=torch.int64),
        rows(9, 8),
        rows(2, 8),
        rows(2, dtype=torch.int64),
        rows(2, 8, device="cuda:1"),
        rows(2, dtype=torch.int64),
        torch.bfloat16,
    ),
    "linear_cross_entropy": lambda: (rows(2, 8), rows(9, 8), rows(2, dtype=torch.int64, device="cuda:1")),
    "merge_parts": lambda: (
        rows(2, 1, 8),
        rows(1, 2, dtype=torch.float32),
        rows(2, 1, 8),
        rows(1, 2, dtype=torch.float32, device="cuda:1"),
    ),
    "rope_keys": lambda: (rows(2, 24), rows(2, dtype=torch.int32), rows(4, dtype=torch.float32, device="cuda:1"), 1, 1),
    "rope_keys_backward": lambda: (
        *(rows(2, 1, 8) for _ in range(3)),
        rows(2, dtype=torch.int32),
        rows(4, dtype=torch.float32, device="cuda:1"),
    ),
    "rope_keys_fp8": lambda: (
        *(rows(2, 1, 8) for _ in range(3)),
        rows(2, dtype=torch.int32),
        rows(4, dtype=torch.float32, device="cuda:1"),
    ),
    "quantize_fp8": lambda: (rows(2, 8), rows(1, dtype=torch.float32, device="cuda:1")),
    "spatio_temporal_pool": None,
    "grid_pool": None,
    "quick_gelu": None,
    "add_layer_norm": lambda: (rows(2, 8), rows(2, 8), rows(8), rows(8, device="cuda:1"), 1e-5),
    "adamw8bit_step": lambda: (
        rows(256),
        rows(256),
        *(rows(256, dtype=torch.uint8) for _ in range(2)),
        *(rows(1, dtype=torch.float32, device=f"cuda:{i}") for i in (0, 1)),
    ),
    "adamw_step": lambda: (rows(256), rows(256), *(rows(256, dtype=torch.float32, device=f"cuda:{i}") for i in (0, 1))),
    "frame_patchify": lambda: ([rows(1, 4, 4, 3, dtype=torch.uint8, device=f"cuda:{i}") for i in (0, 0, 1)],),
    "yuv_patchify": lambda: (
        [
            tuple(rows(*shape, dtype=torch.uint8, device=f"cuda:{i}") for shape in ((4, 4), (2, 2), (2, 2)))
            for i in (0, 1)
        ],
        [(1,) * 6] * 2,
    ),
}
ADAM = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "step": 1}
PATCHES = {"size": 4, "patch": 2, "mean": (0.5,) * 3, "std": (0.5,) * 3}
OPTIONS = {"adamw8bit_step": ADAM, "adamw_step": ADAM, "frame_patchify": PATCHES, "yuv_patchify": PATCHES}


FUNCTIONS = {"rope_keys_fp8": "rope_keys_backward_fp8"}


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("name", [name for name, arguments in ELSEWHERE.items() if arguments])
def test_tensors_of_two_gpus_are_refused(name, impl):
    function = getattr(importlib.import_module(f"fastvid_kernels.{name}"), FUNCTIONS.get(name, name))
    with (
        FakeTensorMode(),
        pytest.raises(ValueError, match=f"{FUNCTIONS.get(name, name)}: .* one device, found cuda:0, cuda:1"),
    ):
        function(*ELSEWHERE[name](), impl=impl, **OPTIONS.get(name, {}))


FP8 = {"add_rms_norm_fp8": "add_rms_norm", "swiglu_fp8": "swiglu", "swiglu_backward_fp8": "swiglu"}
ALONE = {  # arguments of those that take one tensor, or are second in their file
    "swiglu": lambda: (rows(2, 8),),
    "swiglu_fp8": lambda: (rows(2, 8),),
    "swiglu_backward_fp8": lambda: (rows(2, 8), rows(2, 4)),
    "add_rms_norm_fp8": lambda: (rows(2, 8), rows(2, 8), rows(8), 1e-5, torch.bfloat16),
    "spatio_temporal_pool": lambda: (rows(2, 3, 4),),
    "grid_pool": lambda: (rows(2, 4, 8), (1, 1, 1)),
    "quick_gelu": lambda: (rows(2, 8),),
}


@pytest.mark.parametrize("name", [*ELSEWHERE, *FP8])
def test_reference_is_the_plain_twin_itself(name, monkeypatch):
    """No second plain implementation, which nothing else compares: it is called, and what it returns comes back."""
    module, called = importlib.import_module(f"fastvid_kernels.{FP8.get(name, name)}"), []
    name = FUNCTIONS.get(name, name)

    def plain(*arguments, **options):
        called.append(name)
        return called

    monkeypatch.setattr(module, f"{name}_reference", plain)
    with FakeTensorMode():
        arguments = (ELSEWHERE | ALONE)[module.__name__.rpartition(".")[2] if name in FUNCTIONS.values() else name]()
        found = getattr(module, name)(*arguments, impl="reference", **OPTIONS.get(name, {}))
    assert called == [name] and (found is called or name in ("adamw_step", "adamw8bit_step"))


def test_meta_tensors_stand_for_others(monkeypatch):
    monkeypatch.setattr(dispatch, "INTERPRETED", False)
    x = rows(2, device="meta")
    assert not dispatch.use_triton("auto", x, name="x") and not dispatch.on_gpu(x)
    with dispatch.meta_stands_for("cuda"):
        assert dispatch.use_triton("auto", x, name="x") and dispatch.on_gpu(x)
        assert not dispatch.use_triton("auto", rows(2, device="cpu"), name="x")
        dispatch.launch(None, (1,), x)
        with dispatch.meta_stands_for("cpu"):
            assert not dispatch.use_triton("auto", x, name="x")
        assert dispatch.on_gpu(x)


@pytest.mark.parametrize("obstacle", [None, "no such CPU"])
def test_meta_tensors_compile_nothing(monkeypatch, obstacle):
    monkeypatch.setattr(rows_of_cpu, "_library", lambda: pytest.fail("compiled"))
    monkeypatch.setattr(rows_of_cpu, "foreseen_obstacle", lambda: obstacle)
    x = rows(2, device="meta")
    assert rows_of_cpu.serve(x, x) == (obstacle is None)
    assert not rows_of_cpu.serve(x, dtypes=[torch.float32])
    rows_of_cpu.quick_gelu(x, x)


def test_a_gpu_and_the_cpu_together_are_refused():
    with FakeTensorMode(), pytest.raises(ValueError, match="x: .* found cpu, cuda:0"):
        dispatch.use_triton("auto", rows(2), rows(2, device="cpu"), name="x")


def test_every_kernel_is_asked():
    assert set(ELSEWHERE) == {path.stem for path in FILES}
