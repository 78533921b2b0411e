"""Python's garbage collector while a run's steps are made."""

import gc

import pytest
import torch
from ranks import on_ranks
from test_loop import CPU, MODES
from training_run import config_of, flags, write_run

from fastvid import train
from fastvid.data.prefetch import Prefetcher
from fastvid.dist import host_memory, parallel


@pytest.fixture(autouse=True)
def quick_runs():
    """Runs as they are."""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.slow
def test_it_works_when_told_only_and_afterwards_as_before(run, tmp_path, monkeypatch):
    seen, collected = [], []
    step, collect = train.train_step, gc.collect

    def train_step(state, batches, waited):
        seen.append((gc.isenabled(), gc.get_freeze_count() > 0))
        return step(state, batches, waited)

    monkeypatch.setattr(train, "train_step", train_step)
    monkeypatch.setattr(train, "_COLLECT_EVERY", 4)
    monkeypatch.setattr(gc, "collect", lambda *generation: collected.append(len(seen)) or collect(*generation))
    assert gc.isenabled()
    assert train.main(flags(run, tmp_path, "--max_steps", "9", "--save_strategy", "no")) == 0
    assert seen == [(False, True)] * 9
    assert [steps for steps in collected if 0 < steps < 9] == [4, 8]
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.disable()
    try:
        with host_memory.collecting_when_told():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def is_enabled(number):
    return torch.tensor(gc.isenabled())


def test_processes_that_read_collect_by_themselves():
    gc.disable()
    try:
        assert all(Prefetcher(is_enabled, 2).map(range(4)))
    finally:
        gc.enable()


def tensors_after_steps(state, steps=5):
    """How many tensors Python knows after each of some steps without its collector."""
    batches, _ = state.loader.read(0)
    counts = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(steps):
            train.train_step(state, batches)
            counts.append(sum(issubclass(type(found), torch.Tensor) for found in gc.get_objects()))
    finally:
        gc.enable()
    return counts


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_step_leaves_no_tensor_to_the_collector(run, tmp_path, mode):
    """Else memory would fill up between collections."""
    state = train.build(config_of(run, tmp_path, "--dataloader_num_workers", "0", *MODES[mode]), CPU)
    assert len(set(tensors_after_steps(state)[1:])) == 1


SHARDED = [
    ["--tune_mm_mlp_adapter", "False"],
    ["--tune_mm_mlp_adapter", "False", "--recompute", "full"],
    ["--gradient_accumulation_steps", "2"],
]


def counts_of_a_rank(rank, run, output):
    world = parallel.World(rank, 2, rank, torch.device("cpu"), True, 2)
    return [
        tensors_after_steps(
            train.build(config_of(run, output, "--dataloader_num_workers", "0", *options), world), steps=12
        )
        for options in SHARDED
    ]


@pytest.mark.slow
def test_nor_does_a_sharded_one(run, tmp_path):
    """A step's last collective may hold its tensor a moment longer, in gloo's thread; what is left behind adds up."""
    for found in on_ranks(2, counts_of_a_rank, tmp_path, run, tmp_path / "out"):
        for counts in found:
            assert min(counts[7:]) <= min(counts[2:7]), counts
