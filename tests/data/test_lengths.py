"""Rows found at start are those that the batches have; runs by a budget of rows; their resumption."""

import json

import numpy as np
import pytest
import torch
from training_run import SAMPLES, config_of, flags, losses, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.data.loader import Loader
from fastvid.dist import parallel

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)
MODES = {
    "adapter": [],
    "adapter, shared": ["--share_video"],
    "full": ["--tune_mm_mlp_adapter", "False"],
    "full, shared": ["--tune_mm_mlp_adapter", "False", "--share_video"],
}
BUDGET = ["--tokens_per_batch", "400"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four samples per video, and a record whose video does not fit into the sample."""
    folder = write_run(tmp_path_factory.mktemp("run"))
    records = [
        {**record, "video": f"clip{i // 4}.safetensors"}
        for i, record in enumerate(json.loads((folder / "train.json").read_text()))
    ]
    text = {"from": "human", "value": "the cat " * 300 + "\n<video>"}
    records.append({**records[0], "id": "long", "conversations": [text, records[0]["conversations"][1]]})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def build(run, *more):
    return train.build(config_of(run, "unused", "--dataloader_num_workers", "0", *more), WORLD)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_batches_have_the_rows_that_were_planned(run, mode):
    state = build(run, *BUDGET, *MODES[mode])
    rows, order, seen = state.order.rows, state.order, []
    assert rows.own[SAMPLES] == rows.shared[SAMPLES] == 0, "the one that is left out"
    for step in range(order.total_steps):
        (batch,), odd = state.loader.read(step)
        (indices,) = order.micro_batches(step)
        seen += indices
        own = rows.own[indices]
        once = {} if rows.groups is None else {rows.groups.of[i]: rows.shared[i] for i in indices}
        assert batch.num_rows == own.sum() + sum(once.values()) + rows.base <= 400
        assert all("--model_max_length" in skipped for _, skipped in odd)
    assert sorted(seen) == sorted([*range(SAMPLES + 1)] * 3)
    assert (mode in ("adapter, shared", "full, shared")) == bool(rows.shared.any())


@pytest.mark.parametrize("processes", [0, 3])
def test_ranks_and_processes_measure_alike(run, processes):
    class Rank:
        size = 3

        def __init__(self, rank):
            self.rank = rank

        def gather_objects(self, value):
            found.append(value)
            return [np.zeros((len(range(rank, SAMPLES + 1, 3)), 2)) for rank in range(3)]

    from fastvid.data import lengths

    state, found = build(run, *BUDGET), []
    one = lengths.measure(state.loader.samples, WORLD, packing=state.loader.packing, processes=processes)
    assert np.array_equal(one.own, state.order.rows.own) and one.digest == state.order.rows.digest
    for rank in range(3):
        lengths.measure(state.loader.samples, Rank(rank), packing=state.loader.packing, processes=processes)
        assert np.array_equal(found[rank][:, 0], one.own[rank::3]) and np.array_equal(
            found[rank][:, 1], one.shared[rank::3]
        )


def test_a_budget_below_the_longest_sample_is_refused(run):
    with pytest.raises(
        ValueError,
        match=r"--tokens_per_batch 30: the longest sample, clip\d+ \(.*train\.json: "
        r"record \d+ .from 0.\), takes",
    ):
        build(run, "--tokens_per_batch", "30")


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [BUDGET, ["--share_video"], [*BUDGET, "--share_video", "--question_order", "video_first"]],
    ids=["rows", "shared", "rows, shared"],
)
def test_batches_are_the_same_for_any_workers_and_after_a_restart_at_any_step(run, options):
    state = build(run, *options)
    plain = list(state.loader.iterate())
    assert len(plain) == state.order.total_steps
    for workers in (0, 1, 4):
        for first in range(0, len(plain), 1 if workers == 0 else len(plain) - 1):
            loader = Loader(
                state.loader.samples, build(run, *options).order, workers=workers, packing=state.loader.packing
            )
            for (found, _), (expected, _) in zip(loader.iterate(first), plain[first:], strict=True):
                assert len(found) == len(expected)
                for a, b in zip(found, expected):
                    tensors, others = [], []
                    a.map(lambda tensor: tensors.append(tensor) or tensor)
                    b.map(lambda tensor: others.append(tensor) or tensor)
                    assert all(map(torch.equal, tensors, others)) and len(tensors) == len(others)
                    assert (a.sample_ids, a.frozen_rows, a.sample_rows) == (b.sample_ids, b.frozen_rows, b.sample_rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[*BUDGET, "--share_video"], ["--share_video", "--tune_mm_mlp_adapter", "False"]],
    ids=["rows, adapter", "samples, full"],
)
def test_a_stopped_run_goes_on_to_the_same_bits(run, tmp_path, monkeypatch, options):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    more = ["--save_steps", "2", *options]
    assert train.main(flags(run, straight, *more, "--dataloader_num_workers", "0")) == 0
    total = max(losses(straight))
    step = train.train_step

    def stop(state, batches, waited):
        if state.step == 3:
            raise KeyboardInterrupt
        return step(state, batches, waited)

    monkeypatch.setattr(train, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(flags(run, resumed, *more, "--dataloader_num_workers", "4"))
    monkeypatch.setattr(train, "train_step", step)
    assert train.main(flags(run, resumed, *more, "--dataloader_num_workers", "1")) == 0
    assert losses(resumed) == losses(straight) and total > 3
    for group in ("model", "optimizer"):
        ours, theirs = (checkpoint.read_full(checkpoint.newest_valid(path), group) for path in (resumed, straight))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_a_checkpoint_that_says_rows_is_resumed(run, tmp_path, monkeypatch):
    argv = flags(run, tmp_path, *BUDGET, "--save_steps", "1")
    assert train.main([*argv, "--max_steps", "1"]) == 0
    read = checkpoint.read_state

    def read_older(folder):
        state = read(folder)
        assert " tokens (samples" in state["samples_per_step"]
        return state | {"samples_per_step": state["samples_per_step"].replace(" tokens (", " rows (")}

    monkeypatch.setattr(checkpoint, "read_state", read_older)
    assert train.main([*argv, "--max_steps", "2"]) == 0


@pytest.mark.slow
def test_a_run_over_other_samples_is_not_resumed(run, tmp_path):
    argv = flags(run, tmp_path, *BUDGET, "--max_steps", "2", "--save_steps", "2")
    assert train.main(argv) == 0
    records = json.loads((run / "train.json").read_text())
    records[0]["conversations"][1]["value"] += " and more"
    (tmp_path / "train.json").write_text(json.dumps(records))
    with pytest.raises(ValueError, match="samples_per_step was"):
        train.main([*argv, "--data_path", str(tmp_path / "train.json"), "--max_steps", "4"])
