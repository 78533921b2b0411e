"""What a run keeps when it ends early, and what it leaves alone of an earlier one."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import pytest
import torch
from checkpoint_cases import flip_a_bit
from conftest import ROOT
from training_run import config_of, flags, losses, overflowing, start, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint, saver, shards
from fastvid.data.loader import Loader
from fastvid.dist import parallel, processes
from fastvid.features.file import load_features, save_features
from fastvid.training import recovery, run_lock
from fastvid.training.metrics import read_metrics


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


@pytest.mark.parametrize(
    "own, others, expected",
    [
        (0, (0, 0), 0),
        (signal.SIGTERM, (signal.SIGTERM, signal.SIGTERM), signal.SIGTERM),
        (0, (0, signal.SIGINT), signal.SIGINT),
    ],
)
def test_every_rank_learns_which_signal_stops_the_run(run, own, others, expected):
    state = train.build(config_of(run, "unused"), parallel.World(0, 1, 0, torch.device("cpu"), False))
    state.world, state.stop_signal = Three(0, 3, 0, torch.device("cpu"), False, signals=others), own
    assert train.train_step(state, state.loader.read(0)[0]).stop_signal == expected


STOPPED_RANKS = """
import json, os, signal, sys
from fastvid import train
stopped, codes = json.loads(sys.argv[1]), sys.argv[2]
step, rank = train.train_step, os.environ["RANK"]
def train_step(state, batches, waited):
    if state.step == 1 and int(rank) in stopped:
        os.kill(os.getpid(), signal.SIGTERM)
    return step(state, batches, waited)
train.train_step = train_step
open(codes + rank, "w").write(str(train.main(sys.argv[3:])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [[1], [0, 1]])
def test_a_signal_to_any_rank_saves_and_ends_all(run, tmp_path, stopped):
    program = tmp_path / "program.py"
    program.write_text(STOPPED_RANKS)
    options = "--save_strategy", "no", "--max_steps", "4", "--per_device_train_batch_size", "1"
    finished = start(
        [str(program)], [json.dumps(stopped), str(tmp_path / "code"), *flags(run, tmp_path / "out", *options)], ranks=2
    )
    assert finished.returncode == 0, finished.stderr
    assert [(tmp_path / f"code{rank}").read_text() for rank in range(2)] == [str(128 + signal.SIGTERM)] * 2
    assert checkpoint.newest_valid(tmp_path / "out").name == "checkpoint-2"
    assert "stopped by a signal after step 2" in finished.stderr


@pytest.mark.slow
def test_a_stop_does_not_wait_for_a_validation(run, tmp_path, monkeypatch):
    def validate(state):
        raise AssertionError("validated")

    step = train.train_step

    def train_step(state, batches, waited):
        os.kill(os.getpid(), signal.SIGTERM)
        return step(state, batches, waited)

    monkeypatch.setattr(train, "evaluate", validate)
    monkeypatch.setattr(train, "train_step", train_step)
    argv = flags(
        run, tmp_path, "--eval_data_path", str(run / "train.json"), "--eval_strategy", "steps", "--eval_steps", "1"
    )
    assert train.main(argv) == 128 + signal.SIGTERM
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-1"


@pytest.mark.slow
def test_a_non_finite_step_is_kept_where_nothing_else_is_saved(run, tmp_path):
    (tmp_path / "feats").mkdir()
    for path in (run / "feats").iterdir():
        features, header = load_features(path)
        save_features(tmp_path / "feats" / path.name, overflowing(run).expand(features.shape).contiguous(), header)
    argv = flags(run, tmp_path / "out", "--video_folder", str(tmp_path / "feats"), "--save_strategy", "no")
    assert train.main(argv) == 1
    assert checkpoint.newest_valid(tmp_path / "out").name == "checkpoint-0"


@pytest.mark.slow
def test_a_checkpoint_that_could_not_be_written_ends_the_run_at_the_next_step(run, tmp_path, monkeypatch):
    """Not at the next save; what was computed until then would be thrown away."""
    monkeypatch.setattr(saver, "RETRY_AFTER", 0.0)
    step, wait = train.train_step, threading.Event().wait

    def train_step(state, batches, waited):
        result = step(state, batches, waited)
        if state.step == 8 and result is not None:  # saved after this: give it the time of a step
            state.saver.save = lambda *a, save=state.saver.save, **k: (save(*a, **k), wait(1.0))
        return result

    monkeypatch.setattr(train, "train_step", train_step)
    write = shards.write

    def full(path, held, mark):
        if "checkpoint-8." in str(path):
            raise OSError(28, "No space left on device")
        write(path, held, mark)

    monkeypatch.setattr(shards, "write", full)
    with pytest.raises(OSError, match="checkpoint-8 of .*No space left"):
        train.main(flags(run, tmp_path))
    assert max(losses(tmp_path)) == 8 and checkpoint.newest_valid(tmp_path).name == "checkpoint-4"
    monkeypatch.setattr(train, "train_step", step)
    with pytest.raises(OSError, match="checkpoint-8 of .*No space left"):
        train.main(flags(run, tmp_path, "--max_steps", "8"))
    assert (tmp_path / "mm_projector.bin").is_file()  # the run's own result is there all the same


@pytest.mark.slow
def test_the_stall_of_a_save_is_logged(run, tmp_path, monkeypatch):
    """A write that ends one second later keeps the next save waiting, and that is said."""
    write = shards.write
    monkeypatch.setattr(shards, "write", lambda *a: (time.sleep(1), write(*a)))
    assert train.main(flags(run, tmp_path, "--max_steps", "5", "--save_steps", "2")) == 0
    stalls = {line["step"]: line.get("checkpoint_stall_seconds") for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert set(stalls) == set(range(1, 6)) and stalls[1] is stalls[2] is stalls[4] is None
    assert 0 < stalls[3] < stalls[5] and stalls[5] > 0.5


@pytest.mark.slow
def test_a_stall_is_the_saver_s_alone(run, tmp_path, monkeypatch):
    """Not what the ranks, or the host and its GPU, wait for each other."""
    state = train.build(config_of(run, tmp_path), parallel.World(0, 1, 0, torch.device("cpu"), False))
    monkeypatch.setattr(recovery, "skipped_samples", lambda state: time.sleep(0.5))
    monkeypatch.setattr(state.saver, "save", lambda *a, **k: None)
    assert recovery.save(state) < 0.25


@pytest.mark.slow
def test_skipped_samples_are_counted_over_a_resume(run, tmp_path, caplog):
    feats = tmp_path / "feats"
    feats.mkdir()
    for path in (run / "feats").iterdir():
        (feats / path.name).write_bytes(b"torn" if path.name == "clip7.safetensors" else path.read_bytes())
    argv = flags(run, tmp_path / "out", "--video_folder", str(feats), "--save_steps", "6")
    assert train.main([*argv, "--max_steps", "6"]) == 0
    assert train.main([*argv, "--max_steps", "12"]) == 0
    assert [line["skipped_samples"] for line in read_metrics(tmp_path / "out" / "metrics.jsonl")][5::6] == [1, 2]


@pytest.mark.slow
def test_a_run_of_a_version_with_fewer_flags_goes_on(run, tmp_path, monkeypatch):
    argv = flags(run, tmp_path, "--save_steps", "2")
    assert train.main([*argv, "--max_steps", "2"]) == 0
    read = checkpoint.read_state

    def read_older(folder):
        state = read(folder)
        del state["skipped"], state["config"]["share_video"], state["config"]["tokens_per_batch"]
        return state

    def read_with_older_name(folder):
        state = read(folder)
        state["config"]["rows_per_batch"] = state["config"].pop("tokens_per_batch") or 400
        return state

    monkeypatch.setattr(checkpoint, "read_state", read_with_older_name)
    with pytest.raises(ValueError, match="--tokens_per_batch was 400, is None"):
        train.main([*argv, "--max_steps", "4"])
    monkeypatch.setattr(checkpoint, "read_state", read_older)
    with pytest.raises(ValueError, match="--share_video was False, is True"):
        train.main([*argv, "--max_steps", "4", "--share_video"])
    assert train.main([*argv, "--max_steps", "4"]) == 0
    assert set(losses(tmp_path)) == {1, 2, 3, 4}


@pytest.mark.slow
def test_an_older_order_of_samples_is_not_gone_on_from(run, tmp_path, monkeypatch):
    """12 samples in steps of 2 x 5: the first step of either order takes the same, the third does not."""

    def reference(output, accumulation=5):
        return flags(
            run,
            tmp_path / output,
            "--save_steps",
            "1",
            "--parity",
            "reference",
            "--per_device_train_batch_size",
            "1",
            "--gradient_accumulation_steps",
            str(accumulation),
            "--lr_scheduler_type",
            "constant",
        )

    for argv in (reference("out"), reference("same", 1)):
        assert train.main([*argv, "--max_steps", "3"]) == 0
    read = checkpoint.read_state

    def read_older(folder):
        state = read(folder)
        assert state.pop("reference_order") == 2
        return state

    monkeypatch.setattr(checkpoint, "read_state", read_older)
    with pytest.raises(
        ValueError,
        match="checkpoint-3 was written when .*accumulation_steps 5 had another order of "
        "samples.* Start over with --resume never",
    ):
        train.main([*reference("out"), "--max_steps", "4"])
    for number in (2, 3):
        shutil.rmtree(tmp_path / "out" / f"checkpoint-{number}")
    for argv in (reference("out"), reference("same", 1)):
        assert train.main([*argv, "--max_steps", "4"]) == 0


@pytest.mark.slow
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
    state = train.build(
        config_of(
            run,
            tmp_path / "out",
            "--video_folder",
            str(tmp_path / "feats"),
            "--eval_strategy",
            "steps",
            "--eval_data_path",
            str(tmp_path / "eval.json"),
        ),
        parallel.World(0, 1, 0, torch.device("cpu"), False),
    )
    assert train.evaluate(state) > 0
    (tmp_path / "feats" / "gone.safetensors").write_bytes(b"torn")
    assert math.isnan(train.evaluate(state))


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_run_goes_on_on_other_ranks_and_layouts(run, tmp_path):
    """Three steps on one rank, three on two that shard, three on one: the losses of one rank alone."""
    common = "--save_steps", "3", "--lr_scheduler_type", "constant"
    assert train.main(flags(run, tmp_path / "straight", "--max_steps", "9", *common)) == 0
    assert train.main(flags(run, tmp_path / "out", "--max_steps", "3", *common)) == 0
    finished = start(
        ["-m", "fastvid.train"],
        flags(
            run, tmp_path / "out", "--max_steps", "6", *common, "--shard", "full", "--per_device_train_batch_size", "1"
        ),
        ranks=2,
    )
    assert finished.returncode == 0, finished.stderr
    assert train.main(flags(run, tmp_path / "out", "--max_steps", "9", *common)) == 0
    found, expected = losses(tmp_path / "out"), losses(tmp_path / "straight")
    assert found.keys() == expected.keys() == set(range(1, 10))
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)


# --- signals


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_while_data_is_waited_for_saves_what_is_done(run, tmp_path, monkeypatch, number):
    """A process that reads hangs: no step will come."""
    read, main = Loader.read, os.getpid()

    def hangs(loader, step, **options):
        if step == 2 and os.getpid() != main:
            os.kill(main, number)
            time.sleep(1000)
        return read(loader, step, **options)

    monkeypatch.setattr(Loader, "read", hangs)
    begin = time.monotonic()
    argv = flags(run, tmp_path, "--save_strategy", "no", "--dataloader_num_workers", "1")
    assert train.main(argv) == 128 + number
    assert checkpoint.newest_valid(tmp_path).name in ("checkpoint-1", "checkpoint-2")
    assert time.monotonic() - begin < 30


@pytest.mark.slow
def test_a_signal_in_a_validation_ends_it(run, tmp_path, monkeypatch):
    evaluate, looked = train.evaluate, []

    def evaluating(state):
        def iterate(*args):
            for each in type(state.evaluation).iterate(state.evaluation, *args):
                looked.append(each)
                os.kill(os.getpid(), signal.SIGTERM)
                yield each

        state.evaluation.iterate = iterate
        return evaluate(state)

    monkeypatch.setattr(train, "evaluate", evaluating)
    argv = flags(
        run,
        tmp_path,
        "--eval_data_path",
        str(run / "train.json"),
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "3",
        "--per_device_eval_batch_size",
        "1",
        "--dataloader_num_workers",
        "0",
    )
    assert train.main(argv) == 128 + signal.SIGTERM
    assert len(looked) == 1 and checkpoint.newest_valid(tmp_path).name == "checkpoint-3"
    assert not [line for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in line]


@pytest.mark.slow
def test_a_validation_that_a_signal_ended_is_made_up_for(run, tmp_path, monkeypatch):
    argv = flags(
        run,
        tmp_path / "out",
        "--max_steps",
        "6",
        "--eval_data_path",
        str(run / "train.json"),
        "--eval_strategy",
        "steps",
        "--eval_steps",
        "3",
        "--dataloader_num_workers",
        "0",
    )
    assert train.main([*argv, "--output_dir", str(tmp_path / "straight")]) == 0
    evaluate, calls = train.evaluate, []

    def stopped(state):
        os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(state)

    def counted(state):
        calls.append(state.step)
        return evaluate(state)

    monkeypatch.setattr(train, "evaluate", stopped)
    assert train.main(argv) == 128 + signal.SIGTERM
    assert train.main(argv) == 128 + signal.SIGTERM  # still at it
    monkeypatch.setattr(train, "evaluate", counted)
    assert train.main(argv) == 0
    found, expected = (
        [
            (line["step"], line["eval_loss"])
            for line in read_metrics(tmp_path / name / "metrics.jsonl")
            if "eval_loss" in line
        ]
        for name in ("out", "straight")
    )
    assert calls == [3, 6] and found == expected
    assert train.main(argv) == 0 and calls == [3, 6]  # all is done


@pytest.mark.slow
def test_what_was_just_saved_is_not_saved_again(run, tmp_path, monkeypatch):
    saved, save = [], recovery.save
    monkeypatch.setattr(recovery, "save", lambda state: (saved.append(state.step), save(state))[1])
    step = train.train_step

    def train_step(state, batches, waited):
        if state.step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
            return step(state, None, waited)
        return step(state, batches, waited)

    monkeypatch.setattr(train, "train_step", train_step)
    assert train.main(flags(run, tmp_path)) == 128 + signal.SIGTERM
    assert saved == [4]


@pytest.mark.slow
def test_a_run_whose_reader_is_gone_saves_and_ends(run, tmp_path, forked):
    program = "import sys; from fastvid.cli import run; run('train', sys.argv[1:])"
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *flags(run, tmp_path, "--save_strategy", "no")],
        stderr=writing,
        timeout=120,
        env=environment,
    )
    os.close(writing)
    assert done.returncode == 128 + signal.SIGPIPE
    assert checkpoint.newest_valid(tmp_path) is not None


# --- damage


@pytest.mark.slow
def test_only_damaged_checkpoints_are_an_error_and_stay(run, tmp_path, caplog):
    argv = flags(run, tmp_path, "--max_steps", "4", "--save_total_limit", "1")
    assert train.main(argv) == 0
    path = tmp_path / "checkpoint-4" / "model-00000-of-00001.safetensors"
    flip_a_bit(path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="checkpoint-4 is damaged: .*model-00000.*Restore.*--resume never"):
        train.main(argv)
    assert path.read_bytes() == before
    assert train.main([*argv, "--resume", "never"]) == 0  # the remedy
    assert (tmp_path / "previous-1" / "checkpoint-4" / path.name).read_bytes() == before
    assert "moved" in caplog.text


@pytest.mark.slow
def test_left_over_folders_are_cleared_at_the_start(run, tmp_path):
    argv = flags(run, tmp_path, "--max_steps", "4")
    assert train.main(argv) == 0
    (tmp_path / ".checkpoint-9.tmp").mkdir()
    (tmp_path / "checkpoint-4").rename(tmp_path / ".checkpoint-4.replaced")
    assert train.main(argv) == 0
    assert [path.name for path in tmp_path.iterdir() if "checkpoint" in path.name] == ["checkpoint-4"]


@pytest.mark.slow
def test_results_of_others_are_moved_not_written_over(run, tmp_path):
    (tmp_path / "mm_projector.bin").write_bytes(b"theirs")
    (tmp_path / "model").mkdir()
    assert train.main(flags(run, tmp_path, "--max_steps", "1")) == 0
    assert (tmp_path / "previous-1" / "mm_projector.bin").read_bytes() == b"theirs"
    assert (tmp_path / "previous-1" / "model").is_dir() and (tmp_path / "mm_projector.bin").stat().st_size > 6


@pytest.mark.parametrize("options", [[], ["--resume", "never"]])
def test_what_the_run_reads_is_not_moved(run, tmp_path, options):
    shutil.copytree(run / "model", tmp_path / "model")
    with pytest.raises(ValueError, match=f"--model_name_or_path {tmp_path}/model lies in --output_dir"):
        train.main(flags(run, tmp_path, "--model_name_or_path", str(tmp_path / "model"), *options))
    assert (tmp_path / "model" / "config.json").is_file()


@pytest.mark.slow
def test_a_named_checkpoint_to_start_from_is_verified(run, tmp_path):
    assert train.main(flags(run, tmp_path, "--max_steps", "4")) == 0
    flip_a_bit(tmp_path / "checkpoint-4" / "optimizer-00000-of-00001.safetensors")
    with pytest.raises(ValueError, match="checkpoint-4 is damaged: .*optimizer-00000"):
        train.main(flags(run, tmp_path / "second", "--pretrain_mm_mlp_adapter", str(tmp_path / "checkpoint-4")))


@pytest.mark.slow
def test_a_run_that_is_done_says_so(run, tmp_path, capfd):
    argv = flags(run, tmp_path, "--max_steps", "4")
    assert train.main(argv) == 0
    capfd.readouterr()
    assert train.main(argv) == 0
    assert "all 4 steps are done already" in capfd.readouterr().err


def test_a_second_run_in_the_same_folder_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.0)
    lock = {
        "host": "here",
        "pid": os.getppid(),
        "machine": processes.machine(),
        "started": processes.started(os.getppid()),
    }
    (tmp_path / run_lock.NAME).write_text(json.dumps(lock))
    with pytest.raises(ValueError, match=f"another run is writing .* process {os.getppid()} on here"):
        train.main(flags(run, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [run_lock.NAME]
    assert train.main(flags(run, tmp_path, "--dry_run")) == 0  # which writes nothing
