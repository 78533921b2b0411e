"""Passes of a tower as replays of a CUDA graph: what is captured when, and that results are those of plain calls."""

import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from towers import write_siglip

from fastvid.video import passes
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers import graph
from fastvid.video.towers.graph import GraphedStates, captured
from fastvid.video.towers.load import open_tower

CPU = torch.device("cpu")


@pytest.fixture
def tower(tmp_path):
    write_siglip(tmp_path / "tower")
    return open_tower(tmp_path / "tower", CPU, torch.float32)


@pytest.fixture(autouse=True)
def untold():
    graph._tell.cache_clear()


class Captures:
    """A stand-in for `captured`: the output lies at one place, and what input and output are is fixed."""

    def __init__(self):
        self.captured, self.replayed = [], 0

    def __call__(self, states, patches_BPK):
        self.captured.append(patches_BPK.data_ptr())
        out_BPC = torch.full_like(states(patches_BPK), torch.nan)

        def replay():
            self.replayed += 1
            return out_BPC.copy_(states(patches_BPK))

        return replay


def patches(count, seed=0, dtype=torch.float32):
    return torch.randn(count, 4, 592, generator=torch.Generator().manual_seed(seed)).to(dtype)


def test_one_capture_serves_every_pass(tower):
    """A pass of fewer images is padded with those of an earlier one, which do not matter."""
    captures = Captures()
    states_of = GraphedStates(tower, 3, CPU, capture=captures)
    assert captures.captured == [] and not states_of.captured  # before the first call nothing is
    for count, seed in ((3, 0), (1, 1), (2, 2), (3, 3)):
        found = states_of(patches(count, seed))
        padded = torch.cat([patches(count, seed), torch.zeros(3 - count, 4, 592)])
        assert torch.equal(found, tower.states(padded)[:count])
    assert len(captures.captured) == 1 and captures.replayed == 4 and states_of.captured


def test_a_pass_is_overwritten_by_the_next(tower):
    states_of = GraphedStates(tower, 2, CPU, capture=Captures())
    first = states_of(patches(2, 0))
    kept = first.clone()
    states_of(patches(2, 1))
    assert not torch.equal(first, kept)


def test_rows_of_another_dtype_are_rounded_once(tower):
    found = GraphedStates(tower, 2, CPU)(patches(2, dtype=torch.float16))
    assert found.dtype == torch.float32 and torch.equal(found, tower.states(patches(2, dtype=torch.float16).float()))


def test_where_it_cannot_be_captured_passes_are_plain_and_a_line_says_so_once(tower, caplog):
    tried = []

    def fails(states, patches_BPK):
        tried.append(states)
        raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be ...")

    for _ in range(2):
        states_of = GraphedStates(tower, 2, CPU, capture=fails)
        for seed in (0, 1):
            assert torch.equal(states_of(patches(2, seed)), tower.states(patches(2, seed))) and not states_of.captured
    assert len(tried) == 2  # once for each
    assert [record.getMessage() for record in caplog.records] == [
        "no CUDA graph of the vision tower (operation not permitted when stream is capturing): its kernels are "
        "launched one by one"
    ]


def test_a_moment_without_memory_does_not_give_up_the_graph(tower):
    captures, short = Captures(), [True]

    def capture(*arguments):
        if short.pop() if short else False:
            raise torch.OutOfMemoryError("no memory")
        return captures(*arguments)

    states_of = GraphedStates(tower, 2, CPU, capture=capture)
    with pytest.raises(torch.OutOfMemoryError):
        states_of(patches(2))
    assert torch.equal(states_of(patches(2)), tower.states(patches(2))) and states_of.captured


def test_no_graph_on_a_cpu(tower, monkeypatch):
    monkeypatch.setattr(graph, "captured", None)
    assert torch.equal(GraphedStates(tower, 2, CPU)(patches(2)), tower.states(patches(2)))


def test_threads_of_an_encoder_have_passes_of_their_own(tmp_path, monkeypatch):
    """Two threads encode side by side; a third call later makes no third."""
    write_siglip(tmp_path / "tower")
    made, meet = [], threading.Barrier(2, timeout=30)

    class Watched(GraphedStates):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, capture=Captures(), **options)
            self.users = set()
            made.append(self)

        def __call__(self, rows):
            if not self.users:
                meet.wait()
            self.users.add(threading.get_ident())
            return super().__call__(rows)

    monkeypatch.setattr(passes, "GraphedStates", Watched)
    encoder = FeatureEncoder(tmp_path / "tower", device="cpu", dtype=torch.float32, batch_size=2, num_temporal=5)
    frames = [np.random.default_rng(i).integers(0, 256, (5, 8, 9, 3), dtype=np.uint8) for i in range(2)]
    found = {}
    threads = [threading.Thread(target=lambda i=i: found.update({i: encoder.encode(frames[i])})) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 2 and [len(one.users) for one in made] == [1, 1]
    for i in range(2):
        assert torch.equal(encoder.encode(frames[i]), found[i])
    assert len(made) == 2


def test_what_failed_half_way_is_not_used_again(tmp_path):
    """The device may be at work with it still."""
    write_siglip(tmp_path / "tower")
    encoder = FeatureEncoder(tmp_path / "tower", device="cpu", batch_size=2, num_temporal=5)
    with pytest.raises(RuntimeError):
        encoder.encode_patches(torch.zeros(5, 3, 592))  # three patches where there are four
    assert encoder._idle == []
    encoder.encode_patches(torch.zeros(5, 4, 592))
    assert len(encoder._idle) == 1


def test_the_order_of_a_capture(monkeypatch):
    """Warmed up on the stream that is captured, which waits for the caller's; the caller's waits for it."""
    told = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            told.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self):
            told.append("replay")

    @contextmanager
    def on(what):
        told.append(f"on {what.name if isinstance(what, Stream) else what}")
        yield
        told.append("off")

    @contextmanager
    def capturing(made, *, stream, capture_error_mode):
        assert isinstance(made, Graph) and graph._CAPTURING.locked()
        told.append(f"capture on {stream.name}, {capture_error_mode}")
        yield
        told.append("captured")

    for name, fake in (
        ("Stream", Stream),
        ("CUDAGraph", Graph),
        ("graph", capturing),
        ("stream", on),
        ("device", on),
        ("current_stream", lambda: Stream("own")),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)
    given = torch.zeros(2)

    def states(patches_BPK):
        assert patches_BPK is given
        told.append("states")
        return patches_BPK + 1

    replay = captured(states, given)
    assert told == [
        "on cpu",
        "side waits for own",
        "on side",
        "states",
        "states",
        "off",
        "capture on side, thread_local",
        "states",
        "captured",
        "own waits for side",
        "off",
    ]
    assert not graph._CAPTURING.locked()
    assert replay() is replay() and told[-2:] == ["replay", "replay"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_a_gpu_the_bits_are_those_of_plain_calls(tmp_path):
    write_siglip(tmp_path / "tower")
    device = torch.device("cuda")
    tower = open_tower(tmp_path / "tower", device, torch.float16)
    states_of = GraphedStates(tower, 3, device)
    for seed in range(3):
        rows = patches(3, seed, torch.float16).to(device)
        with torch.cuda.stream(torch.cuda.Stream()):
            assert torch.equal(states_of(rows), tower.states(rows))
            torch.cuda.current_stream().synchronize()
    assert states_of.captured
