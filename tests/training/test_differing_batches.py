"""Ranks whose batches differ in kind, under --parity reference --bf16: none waits for another for ever."""

import json
import math

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from training_run import config_of, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.data.packing import pack
from fastvid.dist import parallel
from fastvid.training import diagnosis, recovery

CPU = torch.device("cpu")
ALONE = parallel.World(0, 1, 0, CPU, False)
OPTIONS = [
    "--parity",
    "reference",
    "--bf16",
    "True",
    "--dataloader_num_workers",
    "0",
    "--max_steps",
    "4",
    "--per_device_train_batch_size",
    "1",
    "--per_device_eval_batch_size",
    "1",
    "--eval_strategy",
    "steps",
]
MASKED, VIDEO_FIRST, QUESTION_FIRST, ANOTHER = 0, 2, 3, 4
# (flags, samples of both ranks)
CASES = {
    "full fine-tune, a rank without a supervised token": (["--tune_mm_mlp_adapter", "False"], (VIDEO_FIRST, MASKED)),
    "full fine-tune, recomputed": (["--tune_mm_mlp_adapter", "False", "--recompute", "full"], (MASKED, QUESTION_FIRST)),
    "full fine-tune, an empty rank": (["--tune_mm_mlp_adapter", "False"], (VIDEO_FIRST, None)),
    "adapter, a rank with frozen rows": (["--shard", "full"], (VIDEO_FIRST, QUESTION_FIRST)),
    "adapter, an empty rank": (["--shard", "full"], (None, QUESTION_FIRST)),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = write_run(tmp_path_factory.mktemp("run"))
    records = json.loads((run / "train.json").read_text())
    records[MASKED]["conversations"][1]["value"] = "a ASSISTANT: b"  # which the reference masks
    (run / "train.json").write_text(json.dumps(records))
    (run / "eval.json").write_text(json.dumps(records[1:4]))  # of the second pair one rank has none
    return run


def build(run, output, world, *more):
    state = train.build(config_of(run, output, *OPTIONS, "--eval_data_path", str(run / "eval.json"), *more), world)
    assert state.model.precision.residual == torch.float32
    return state


def batch_of(state, index):
    """The packed micro-batch of one sample, or of none."""
    samples = state.loader.samples
    chosen = [] if index is None else [samples.read(index)]
    return pack(chosen, samples.tokenizer.tokens, samples.channels, **state.loader.packing)


def trained(rank, run, output, options, chosen):
    """[(loss, gradient norm) of three steps, validation loss after the second, diagnosis]; what it is of is saved."""
    world = parallel.World(rank, 2, rank, CPU, True, 2)
    state = build(run, output, world, *options)
    found = []
    for step in range(3):
        result = train.train_step(state, [batch_of(state, chosen[rank - step % 2])])  # they change places
        found.append((result.loss.item(), result.gradient_norm.item()))
        if step == 1:
            recovery.save(state)
            state.saver.wait()
            evaluated = train.evaluate(state)
    found.append(evaluated)
    poisoned = batch_of(state, ANOTHER)
    if rank == 1:
        poisoned.features[3, 2] = math.nan
    state.loader.read = lambda step: ([poisoned], [])
    found.append(diagnosis.explain_not_finite(state, 3))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_ranks_with_other_kinds_of_batches_train_as_one_process(run, tmp_path, case):
    options, chosen = CASES[case]
    state = build(run, tmp_path, ALONE, *options, "--shard", "none", "--gradient_accumulation_steps", "2")
    batches = [batch_of(state, index) for index in chosen]
    if MASKED in chosen:
        assert batches[chosen.index(MASKED)].num_supervised == 0
    assert len({(batch.frozen_rows > 0, batch.num_supervised > 0) for batch in batches}) == 2

    found = on_ranks(2, trained, tmp_path, run, tmp_path / "ranks", options, chosen, timeout=20)
    for step in range(3):
        result = train.train_step(state, batches)
        for steps in found:
            assert steps[step] == pytest.approx((result.loss.item(), result.gradient_norm.item()), rel=1e-6)
        if step == 1:
            folder = checkpoint.newest_valid(tmp_path / "ranks")
            for group, ours in (("model", state.optimizer.parameters), ("optimizer", state.optimizer.state_tensors())):
                saved = checkpoint.read_full(folder, group)
                assert saved.keys() == ours.keys()
                for name, tensor in ours.items():
                    # Half a bit of a weight of 0.2.
                    torch.testing.assert_close(saved[name], tensor.detach(), rtol=1e-6, atol=1e-8)
                # From here on the same: a last bit of one may decide how it is rounded to bf16.
                checkpoint.load_into(folder, group, ours)
            eval_loss = train.evaluate(state)
    for *_, evaluated, said in found:
        assert evaluated == pytest.approx(eval_loss, rel=1e-6)
        assert said == f"rank 1: non-finite loss, samples clip{ANOTHER}"


def resumed(rank, run, output, options):
    state = build(run, output, parallel.World(rank, 2, rank, CPU, True, 2), *options)
    folder = checkpoint.newest_valid(output)
    checkpoint.load_into(folder, "model", dict(state.optimizer.parameters))
    checkpoint.load_into(folder, "optimizer", state.optimizer.state_tensors())
    checkpoint.save(
        output.with_name("again"),
        1,
        state={},
        groups={"model": dict(state.optimizer.parameters), "optimizer": state.optimizer.state_tensors()},
    )
    return [dist.get_world_size(), recovery.skipped_samples(state)]


@pytest.mark.slow
def test_norms_of_one_process_are_loaded_by_two(run, tmp_path):
    options = ["--tune_mm_mlp_adapter", "False"]
    state = build(run, tmp_path / "one", ALONE, *options)
    for _ in range(2):
        train.train_step(state, [batch_of(state, VIDEO_FIRST)])
    recovery.save(state)
    state.saver.wait()
    assert on_ranks(2, resumed, tmp_path, run, tmp_path / "one", options, timeout=20) == [[2, 0], [2, 0]]
    for group in ("model", "optimizer"):
        one, two = (checkpoint.read_full(checkpoint.newest_valid(tmp_path / name), group) for name in ("one", "again"))
        assert any("norm" in name for name in one)
        assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
