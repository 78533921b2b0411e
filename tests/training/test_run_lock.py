"""One run at a time in an output folder."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from conftest import ROOT
from ranks import on_ranks
from training_run import HOLD

from fastvid.dist import parallel, processes
from fastvid.training import run_lock

pytestmark = pytest.mark.usefixtures("forked")

ALONE = parallel.World(0, 1, 0, torch.device("cpu"), False)


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 0.3)


@pytest.fixture
def holder(tmp_path):
    """A living process that holds tmp_path/out."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "out")], stdout=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def take(folder):
    with run_lock.held(folder, ALONE):
        return json.loads((folder / run_lock.NAME).read_text())


def write(folder, **changed):
    folder.mkdir(exist_ok=True)
    lock = {
        "host": "there",
        "pid": os.getppid(),
        "since": "2020-01-01 00:00:00",
        "machine": processes.machine(),
        "started": processes.started(os.getppid()),
        "mark": "0",
    }
    (folder / run_lock.NAME).write_text(json.dumps(lock | changed))


@pytest.mark.slow
def test_a_second_run_is_refused_and_the_killed_one_s_lock_counts_for_nothing(tmp_path, holder):
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=f"--output_dir {out}: process {holder.pid} on .* since 20"):
        take(out)
    holder.kill()
    holder.wait()
    assert (out / run_lock.NAME).exists()
    assert take(out)["pid"] == os.getpid()


def test_what_was_taken_is_given_back(tmp_path):
    assert take(tmp_path / "new")["machine"] == processes.machine()
    assert not (tmp_path / "new").exists()  # nothing was written
    take(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_job_that_is_just_ending_is_waited_for(tmp_path, holder, monkeypatch):
    monkeypatch.setattr(run_lock, "PATIENCE", 20.0)
    threading.Timer(0.5, lambda: (holder.kill(), holder.wait())).start()
    assert take(tmp_path / "out")["pid"] == os.getpid()


@pytest.mark.parametrize("changed", [{"started": "1"}, {"pid": 2**22 + 5}])
def test_the_number_of_a_dead_process_may_be_another_s(tmp_path, changed):
    write(tmp_path, **changed)
    assert take(tmp_path)["mark"] != "0"


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": "x"}'])
def test_a_lock_that_was_cut_short_counts_for_nothing(tmp_path, text):
    (tmp_path / run_lock.NAME).write_text(text)
    assert take(tmp_path)["pid"] == os.getpid()


@pytest.mark.slow
def test_another_machine_s_run_lives_while_it_touches_its_lock(tmp_path, monkeypatch):
    write(tmp_path, machine="elsewhere")
    timer = threading.Timer(0.5, os.utime, [tmp_path / run_lock.NAME])
    timer.start()
    with pytest.raises(ValueError, match="on there"):
        take(tmp_path)
    monkeypatch.setattr(run_lock, "SILENCE", 1.0)
    assert take(tmp_path)["mark"] != "0"  # no sign of life any more


def test_a_run_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "EVERY", 0.05)
    with run_lock.held(tmp_path, ALONE):
        os.utime(tmp_path / run_lock.NAME, (0, 0))
        deadline = time.monotonic() + 20
        while (tmp_path / run_lock.NAME).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.02)
        assert (tmp_path / run_lock.NAME).stat().st_mtime > 0


def test_a_pipe_in_its_place_is_refused(tmp_path):
    os.mkfifo(tmp_path / run_lock.NAME)
    with pytest.raises(ValueError, match="is no regular file"):
        take(tmp_path)


def refused(rank, folder):
    run_lock.PATIENCE = 0.3
    try:
        with run_lock.held(folder, parallel.World(rank, 2, rank, torch.device("cpu"), True)):
            return None
    except ValueError as error:
        return str(error)


@pytest.mark.slow
def test_all_ranks_are_refused(tmp_path, holder):
    said = on_ranks(2, refused, tmp_path, tmp_path / "out")
    assert said[0] == said[1] and "another run is writing" in said[0]
