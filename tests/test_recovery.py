"""What a run keeps when it ends early, and what it leaves alone of an earlier one."""

import json
import math
import os
import shutil
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from training_run import config_of, flags, losses, start, write_run

from fastvid import checkpoint, parallel, recovery, shards, train
from fastvid.data.features import load_features, save_features
from fastvid.metrics import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@dataclass(frozen=True)
class Three(parallel.World):
    """Rank 0 of three: what the others contribute to a step is nothing but their signals."""

    signals: tuple = (0, 0)

    def sum_on_host(self, values):
        return [*values[:-1], values[-1] + sum(self.signals)]

    def gather_objects(self, value):
        return [value, *self.signals]


@pytest.mark.parametrize("own, others, expected", [
    (0, (0, 0), 0), (signal.SIGTERM, (signal.SIGTERM, signal.SIGTERM), signal.SIGTERM), (0, (0, signal.SIGINT),
                                                                                          signal.SIGINT)])
def test_every_rank_learns_which_signal_stops_the_run(run, own, others, expected):
    state = train.build(config_of(run, "unused"), parallel.World(0, 1, 0, torch.device("cpu"), False))
    state.world, state.stop_signal = Three(0, 3, 0, torch.device("cpu"), False, signals=others), own
    assert train.train_step(state, state.loader.read(0)[0]).stop_signal == expected


STOPPED_RANKS = """
import json, os, signal, sys
from fastvid import train
stopped, codes = json.loads(sys.argv[1]), sys.argv[2]
step, rank = train.train_step, os.environ["RANK"]
def train_step(state, batches):
    if state.step == 1 and int(rank) in stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(state, batches)
train.train_step = train_step
open(codes + rank, "w").write(str(train.main(sys.argv[3:])))
"""


@pytest.mark.parametrize("stopped", [[1], [0, 1]])
def test_a_signal_to_any_rank_saves_and_ends_all(run, tmp_path, stopped):
    program = tmp_path / "program.py"
    program.write_text(STOPPED_RANKS)
    options = "--save_strategy", "no", "--max_steps", "4", "--per_device_train_batch_size", "1"
    finished = start([str(program)], [json.dumps(stopped), str(tmp_path / "code"),
                                      *flags(run, tmp_path / "out", *options)], ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == [str(128 + signal.SIGTERM)] * 2
    assert checkpoint.newest_valid(tmp_path / "out").name == "checkpoint-2"
    assert "stopped by a signal after step 2" in finished.stderr


def test_a_stop_does_not_wait_for_a_validation(run, tmp_path, monkeypatch):
    def validate(state):
        raise AssertionError("validated")

    step = train.train_step

    def train_step(state, batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batches)

    monkeypatch.setattr(train, "evaluate", validate)
    monkeypatch.setattr(train, "train_step", train_step)
    argv = flags(run, tmp_path, "--eval_data_path", str(run / "train.json"), "--eval_strategy", "steps",
                 "--eval_steps", "1")
    assert train.main(argv) == 128 + signal.SIGTERM
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-1"


def test_a_non_finite_step_is_kept_where_nothing_else_is_saved(run, tmp_path):
    (tmp_path / "feats").mkdir()
    for path in (run / "feats").iterdir():
        features, header = load_features(path)
        save_features(tmp_path / "feats" / path.name, features.fill_(torch.inf), header)
    argv = flags(run, tmp_path / "out", "--video_folder", str(tmp_path / "feats"), "--save_strategy", "no")
    assert train.main(argv) == 1
    assert checkpoint.newest_valid(tmp_path / "out").name == "checkpoint-0"


def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_the_next(run, tmp_path, monkeypatch):
    write = shards.write

    def full(path, held, mark):
        if "checkpoint-8." in str(path):
            raise OSError(28, "No space left on device")
        write(path, held, mark)

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(OSError, match="checkpoint-8 of .*No space left"):
        train.main(flags(run, tmp_path))
    assert max(losses(tmp_path)) == 12 and checkpoint.newest_valid(tmp_path).name == "checkpoint-4"
    with pytest.raises(OSError, match="checkpoint-8 of .*No space left"):
        train.main(flags(run, tmp_path, "--max_steps", "8"))
    assert (tmp_path / "mm_projector.bin").is_file()  # the run's own result is there all the same


def test_the_stall_of_a_save_is_logged(run, tmp_path, monkeypatch):
    """A write that ends one second later keeps the next save waiting, and that is said."""
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda *a: (time.sleep(1), write(*a)))
    assert train.main(flags(run, tmp_path, "--max_steps", "5", "--save_steps", "2")) == 0
    stalls = {line["step"]: line.get("checkpoint_stall_seconds") for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert set(stalls) == set(range(1, 6)) and stalls[1] is stalls[2] is stalls[4] is None
    assert 0 < stalls[3] < stalls[5] and stalls[5] > 0.5


def test_a_stall_is_the_saver_s_alone(run, tmp_path, monkeypatch):
    """Not what the ranks, or the host and its GPU, wait for each other."""
    state = train.build(config_of(run, tmp_path), parallel.World(0, 1, 0, torch.device("cpu"), False))
    monkeypatch.setattr(recovery, "skipped_samples", lambda state: time.sleep(0.5))
    monkeypatch.setattr(state.saver, "save", lambda *a, **k: None)
    assert recovery.save(state) < 0.25


def test_skipped_samples_are_counted_over_a_resume(run, tmp_path, caplog):
    feats = tmp_path / "feats"
    feats.mkdir()
    for path in (run / "feats").iterdir():
        (feats / path.name).write_bytes(b"torn" if path.name == "clip7.safetensors" else path.read_bytes())
    argv = flags(run, tmp_path / "out", "--video_folder", str(feats), "--save_steps", "6")
    assert train.main([*argv, "--max_steps", "6"]) == 0
    assert train.main([*argv, "--max_steps", "12"]) == 0
    assert [line["skipped_samples"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")][5::6] == [1, 2]


def test_a_run_of_a_version_with_fewer_flags_goes_on(run, tmp_path, monkeypatch):
    argv = flags(run, tmp_path, "--save_steps", "2")
    assert train.main([*argv, "--max_steps", "2"]) == 0
    read = checkpoint.read_state

    def read_older(folder):
        state = read(folder)
        del state["skipped"], state["config"]["share_video"], state["config"]["rows_per_batch"]
        return state

    monkeypatch.setattr(checkpoint, "read_state", read_older)
    with pytest.raises(ValueError, match="--share_video was False, is True"):
        train.main([*argv, "--max_steps", "4", "--share_video"])
    assert train.main([*argv, "--max_steps", "4"]) == 0
    assert set(losses(tmp_path)) == {1, 2, 3, 4}


def test_an_older_order_of_samples_is_not_gone_on_from(run, tmp_path, monkeypatch):
    """12 samples in steps of 2 x 5: the first step of either order takes the same, the third does not."""
    def reference(output, accumulation=5):
        return flags(run, tmp_path / output, "--save_steps", "1", "--parity", "reference",
                     "--per_device_train_batch_size",
                     "1", "--gradient_accumulation_steps", str(accumulation), "--lr_scheduler_type", "constant")

    for argv in (reference("out"), reference("same", 1)):
        assert train.main([*argv, "--max_steps", "3"]) == 0
    read = checkpoint.read_state

    def read_older(folder):
        state = read(folder)
        assert state.pop("reference_order") == 2
        return state

    monkeypatch.setattr(checkpoint, "read_state", read_older)
    with pytest.raises(ValueError, match="checkpoint-3 was written when .*accumulation_steps 5 had another order of "
                                         "samples.* Start over with --resume never"):
        train.main([*reference("out"), "--max_steps", "4"])
    for number in (2, 3):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{number}")
    for argv in (reference("out"), reference("same", 1)):
        assert train.main([*argv, "--max_steps", "4"]) == 0


def test_a_validation_set_without_supervised_tokens_has_no_loss(run, tmp_path):
    records = json.loads((run / "train.json").read_text())
    for record in records:
        record["video"] = "gone.safetensors"
    (tmp_path / "eval.json").write_text(json.dumps(records[:2]))
    (tmp_path / "feats").mkdir()
    for path in (run / "feats").iterdir():
        (tmp_path / "feats" / path.name).write_bytes(path.read_bytes())
    features, header = load_features(tmp_path / "feats" / "clip0.safetensors")
    save_features(tmp_path / "feats" / "gone.safetensors", features, header)
    state = train.build(config_of(run, tmp_path / "out", "--video_folder", str(tmp_path / "feats"), "--eval_strategy",
                                  "steps", "--eval_data_path", str(tmp_path / "eval.json")),
                        parallel.World(0, 1, 0, torch.device("cpu"), False))
    assert train.evaluate(state) > 0
    (tmp_path / "feats" / "gone.safetensors").write_bytes(b"torn")
    assert math.isnan(train.evaluate(state))


def test_resume_never_starts_over_and_keeps_what_was_there(run, tmp_path):
    argv = flags(run, tmp_path, "--max_steps", "4")
    assert train.main(argv) == 0
    (tmp_path / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert set(before) > {"metrics.jsonl", "loss_curve.png", "mm_projector.bin"}
    first = losses(tmp_path)

    again = [*argv, "--resume", "never", "--learning_rate", "1e-3"]
    assert train.main([*again, "--dry_run"]) == 0
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before
    assert train.main(again) == 0
    assert losses(tmp_path)[1] == first[1] and losses(tmp_path) != first
    aside = tmp_path / "previous-1"
    assert (aside / "checkpoint-4" / "state.json").is_file()
    assert before.pop("notes.txt") == (tmp_path / "notes.txt").read_bytes()
    assert {path.name: path.read_bytes() for path in aside.iterdir() if path.is_file()} == before


def test_a_run_goes_on_on_other_ranks_and_layouts(run, tmp_path):
    """Three steps on one rank, three on two that shard, three on one: the losses of one rank alone."""
    common = "--save_steps", "3", "--lr_scheduler_type", "constant"
    assert train.main(flags(run, tmp_path / "straight", "--max_steps", "9", *common)) == 0
    assert train.main(flags(run, tmp_path / "out", "--max_steps", "3", *common)) == 0
    finished = start(["-m", "fastvid.train"], flags(run, tmp_path / "out", "--max_steps", "6", *common, "--shard",
                                                    "full", "--per_device_train_batch_size", "1"), ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert train.main(flags(run, tmp_path / "out", "--max_steps", "9", *common)) == 0
    found, expected = losses(tmp_path / "out"), losses(tmp_path / "straight")
    assert found.keys() == expected.keys() == set(range(1, 10))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)
