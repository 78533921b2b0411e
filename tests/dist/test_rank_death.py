"""A rank is killed in the middle of a step: the job ends soon, names it, and a restarted one goes on."""

import time

import pytest
from training_run import flags, losses, start, write_run

from fastvid import train

KILL_ONE = """
import os, signal, sys, time
from pathlib import Path

from fastvid import train
from fastvid.cli import run

killed = Path(sys.argv[1])
step = train.train_step

def train_step(state, batches, waited):
    if state.step == 6 and state.world.rank == 1 and not killed.exists():
        while not Path(state.config.output_dir, "checkpoint-4").exists():
            time.sleep(0.01)  # it is written beside the steps, which may be faster
        killed.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGKILL)
    return step(state, batches, waited)

if __name__ == "__main__":
    train.train_step = train_step
    run("train", sys.argv[2:])
"""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """(flags of a run of 18 steps that saves every four, program whose rank 1 dies in the seventh)."""
    folder = tmp_path_factory.mktemp("death")
    run = write_run(folder / "run")
    program = folder / "program.py"
    program.write_text(KILL_ONE)

    def command(output, *more):
        return flags(run, output, "--per_device_train_batch_size", "1", "--dataloader_num_workers", "0", *more)

    return command, str(program)


@pytest.mark.slow
def test_the_job_ends_and_names_the_rank(job, tmp_path):
    command, program = job
    killed = tmp_path / "killed"
    finished = start([program], [str(killed), *command(tmp_path / "out")], ranks=2)
    assert time.time() - killed.stat().st_mtime < 30
    assert finished.returncode == 1
    assert f"Signal 9 (SIGKILL) received by PID {killed.read_text()}" in finished.stderr
    report = finished.stderr[finished.stderr.index("Root Cause") :]
    assert "rank      : 1 (local_rank: 1)" in report and "exitcode  : -9" in report


@pytest.mark.slow
def test_a_restarted_job_goes_on_from_the_last_checkpoint(job, tmp_path):
    command, program = job
    killed = tmp_path / "killed"
    finished = start(["--max-restarts=1", program], [str(killed), *command(tmp_path / "out")], ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert killed.exists() and "resumed from" in finished.stderr and "checkpoint-4" in finished.stderr
    assert train.main(command(tmp_path / "straight", "--per_device_train_batch_size", "2")) == 0
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "straight"), rel=1e-5)
    assert len(losses(tmp_path / "out")) == 18
