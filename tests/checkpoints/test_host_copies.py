"""Copies in host memory: their memory, and in what order a GPU's streams make and await them."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from training_run import config_of, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint, host_copies, shards
from fastvid.checkpoints.host_copies import HostCopies
from fastvid.checkpoints.saver import Saver
from fastvid.dist import parallel

SHAPES = {"weight": (3, 5), "scalar": (), "empty": (0, 4), "codes": (7,), "half": (2, 3)}
DTYPES = {"codes": torch.uint8, "half": torch.bfloat16}


def tensors(value=0):
    return {
        name: (torch.arange(torch.Size(shape).numel()) + value).view(shape).to(DTYPES.get(name, torch.float32))
        for name, shape in SHAPES.items()
    }


def addresses(copies):
    return {name: copy.data_ptr() for name, copy in copies.items() if copy.numel()}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        assert found[name].is_contiguous()


@pytest.mark.parametrize("block", [host_copies.BLOCK_BYTES, 64, 100, 1])
def test_copies_lie_apart_and_in_the_same_memory_again(monkeypatch, block):
    monkeypatch.setattr(host_copies, "BLOCK_BYTES", block)
    copies, sources = HostCopies(), tensors() | {"turned": torch.randn(4, 3).T}
    first = copies.take(sources)
    assert_same(first, sources)
    places = addresses(first)
    for tensor in sources.values():
        tensor.add_(1)
    second = copies.take(sources)
    assert_same(second, sources)
    assert addresses(second) == places
    del sources["scalar"]
    assert_same(copies.take(sources), sources)


class FakeCuda:
    """A GPU whose streams keep a diary; stands for torch.cuda in `fastvid.checkpoints.host_copies`."""

    def __init__(self):
        self.diary, self.name = [], "main"

    def Stream(self, device):
        return self._stream("side")

    def _stream(self, name):
        event = SimpleNamespace(synchronize=lambda: self.diary.append("host waits for the copies"))
        return SimpleNamespace(
            name=name,
            device="cuda:0",
            wait_event=lambda event: self.diary.append(f"{name} waits for the copies"),
            wait_stream=lambda other: self.diary.append(f"{name} waits for {other.name}"),
            record_event=lambda: self.diary.append(f"{self.name} has made the copies") or event,
        )

    def current_stream(self, device):
        return self._stream(self.name)

    @contextmanager
    def stream(self, stream):
        self.name = stream.name
        yield
        self.name = "main"


@pytest.fixture
def cuda(monkeypatch):
    """Tensors count as a GPU's, and memory is page-locked by name only."""
    cuda = FakeCuda()
    monkeypatch.setattr(host_copies.torch, "cuda", cuda)
    monkeypatch.setattr(host_copies, "_gpu_of", lambda tensors: torch.device("cuda", 0))
    empty, copy = torch.empty, torch.Tensor.copy_

    def locked(*shape, pin_memory=False, **options):
        if pin_memory:
            cuda.diary.append("page-locks memory")
        return empty(*shape, **options)

    def noted(target, source, non_blocking=False):
        if non_blocking:
            cuda.diary.append(f"{cuda.name} copies")
        return copy(target, source)

    monkeypatch.setattr(host_copies.torch, "empty", locked)
    monkeypatch.setattr(torch.Tensor, "copy_", noted)
    return cuda


def test_a_gpu_copies_on_a_side_stream_into_page_locked_memory(cuda):
    copies, sources = HostCopies(), tensors()
    copies.hold()  # nothing to wait for
    copies.wait()
    assert_same(copies.take(sources), sources)
    begun = ["side waits for main", *["side copies"] * len(SHAPES), "side has made the copies"]
    assert cuda.diary == ["page-locks memory", *begun]
    cuda.diary.clear()
    copies.hold()
    copies.wait()
    assert cuda.diary == ["main waits for the copies", "host waits for the copies"]
    cuda.diary.clear()
    copies.take(sources)
    assert cuda.diary == begun


def test_memory_that_cannot_be_page_locked_serves_all_the_same(cuda, monkeypatch, caplog):
    empty = torch.empty

    def full(*shape, pin_memory=False, **options):
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")
        return empty(*shape, **options)

    monkeypatch.setattr(host_copies.torch, "empty", full)
    monkeypatch.setattr(host_copies, "BLOCK_BYTES", 64)
    sources = tensors()
    assert_same(HostCopies().take(sources), sources)
    [record] = caplog.records  # of several blocks
    assert "out of memory" in record.getMessage() and "\n" not in record.getMessage()


def test_a_file_is_written_when_its_copies_are_made(cuda, tmp_path, monkeypatch):
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda *a: (cuda.diary.append("writes"), write(*a))[1])
    with Saver() as saver:
        saver.save(tmp_path, 1, groups={"model": {"weight": torch.ones(3)}}, state={})
    assert cuda.diary[-2:] == ["host waits for the copies", "writes"]
    cuda.diary.clear()
    checkpoint.save(tmp_path, 2, groups={"model": {"weight": torch.ones(3)}}, state={})
    assert cuda.diary[-2:] == ["host waits for the copies", "writes"]


def test_no_update_overtakes_the_copies(tmp_path, monkeypatch):
    state = train.build(
        config_of(write_run(tmp_path / "run"), tmp_path / "out"), parallel.World(0, 1, 0, torch.device("cpu"), False)
    )
    order, step = [], state.optimizer.step
    monkeypatch.setattr(state.saver, "hold", lambda: order.append("hold"))
    monkeypatch.setattr(state.optimizer, "step", lambda *a, **k: order.append("update") or step(*a, **k))
    for number in range(2):
        train.train_step(state, state.loader.read(number)[0])
    assert order == ["hold", "update"] * 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_gpu_s_copies_are_what_it_held_when_they_were_taken():
    copies, source = HostCopies(), torch.zeros(2**24, device="cuda")
    for step in range(1, 4):
        source.fill_(step)
        [copy] = copies.take({"x": source}).values()
        assert copy.is_pinned()
        copies.hold()
        source.fill_(-1)
        copies.wait()
        assert (copy == step).all()
