"""Accumulation under --parity reference: two epochs of five micro-batches in steps of two, as the reference records
them."""

import json
import math
import shutil

import pytest
import torch

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.config import TrainConfig
from fastvid.dist import parallel
from fastvid.flags import parse
from fastvid.training.metrics import read_metrics


@pytest.fixture(scope="module")
def recorded(golden):
    """The reference's own run: two epochs of five micro-batches, two of them a step."""
    return json.loads((golden / "model.json").read_text())["train"]["runs"]["336_accumulated_r0"]


@pytest.fixture(scope="module")
def argv(recorded, tiny):
    """The recorded command line; the output folder comes last."""
    argv = [word.replace("WORK", str(tiny)) for word in recorded["argv"]]
    argv[argv.index("--save_strategy") + 1] = "steps"
    return [*argv, "--parity", "reference", "--save_steps", "1", "--output_dir"]


@pytest.fixture(scope="module")
def straight(argv, tmp_path_factory):
    output = tmp_path_factory.mktemp("straight")
    assert train.main([*argv, str(output)]) == 0
    return output


@pytest.mark.slow
def test_the_recorded_run_is_reached(recorded, straight):
    lines = read_metrics(straight / "metrics.jsonl")
    assert [line["loss"] for line in lines] == pytest.approx(recorded["losses"], abs=1e-5)
    assert [line["grad_norm"] for line in lines] == pytest.approx(recorded["total_norm"], rel=1e-5)
    assert [line["learning_rate"] for line in lines] == pytest.approx(recorded["lr"], abs=1e-15)
    assert [line["epoch"] for line in lines] == [0.4, 0.8, 1.2, 1.6]


@pytest.mark.slow
def test_parameters_are_those_of_a_plain_loop(recorded, argv, straight, tmp_path):
    """Torch's own AdamW, clipping and schedule over the recorded order."""
    config = parse(TrainConfig, [*argv, str(tmp_path)])
    state = train.build(config, parallel.World(0, 1, 0, torch.device("cpu"), False))
    parameters = {name: p for name, p in state.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=0.0)
    taken, steps = recorded["order"], len(recorded["losses"])
    warm_up = math.ceil(0.03 * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            step / warm_up if step < warm_up else (0.5 * (1 + math.cos(math.pi * (step - warm_up) / (steps - warm_up))))
        ),
    )
    for step in range(steps):
        batches, _ = state.loader.read(step)
        assert state.order.micro_batches(step) == [taken[4 * step :][:2], taken[4 * step + 2 :][:2]]
        for batch in batches:
            (state.model(batch) / batch.num_supervised / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        assert norm.item() == pytest.approx(recorded["total_norm"][step], rel=1e-5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        saved = checkpoint.read_full(straight / f"checkpoint-{step + 1}", "model")
        assert saved.keys() == parameters.keys()
        assert all((saved[name] - p).abs().max() <= 1e-7 for name, p in parameters.items()), step


@pytest.mark.slow
@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_run_is_the_straight_one(argv, straight, tmp_path, done):
    shutil.copytree(straight / f"checkpoint-{done}", tmp_path / f"checkpoint-{done}")
    shutil.copy(straight / "metrics.jsonl", tmp_path)
    assert train.main([*argv, str(tmp_path)]) == 0
    ours, theirs = (
        [line["loss"] for line in read_metrics(folder / "metrics.jsonl")] for folder in (tmp_path, straight)
    )
    assert ours == theirs
    for group in ("model", "optimizer"):
        found, expected = (checkpoint.read_full(folder / "checkpoint-4", group) for folder in (tmp_path, straight))
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
