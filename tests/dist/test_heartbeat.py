"""A rank that dies is named, and the others end soon, wherever they are."""

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta

import pytest
import torch.distributed as dist
from forks import FORKS
from waiting import LONG, wait_until

from fastvid.dist import parallel
from fastvid.dist.heartbeat import Heartbeat, what_follows

SILENCE = 4.0  # seconds: a busy machine may keep one of three processes waiting while the others run


def connect(port):
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=LONG))


def live(rank, size, port, errors):
    """A rank that hangs outside every collective."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_APPEND), 2)
    store = connect(port)
    heartbeat = Heartbeat(store, rank, size, every=0.1, silence=SILENCE)
    store.add("ready", 1)
    heartbeat.start()
    time.sleep(600)


@pytest.fixture
def ranks(tmp_path):
    """Three living ranks, the store where they meet, and the file to which they write errors."""
    errors = tmp_path / "errors"
    errors.touch()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [FORKS.Process(target=live, args=(rank, 3, store.port, str(errors)), daemon=True) for rank in range(3)]
    for process in processes:
        process.start()
    wait_until(lambda: store.add("ready", 0) == 3)
    yield processes, store, errors
    for process in processes:
        process.kill()
        process.join()


def beats(store):
    """How often each of three ranks has given a sign of life."""
    return [int(store.get(f"heartbeat/{rank}").split()[0]) for rank in range(3)]


@pytest.mark.slow
@pytest.mark.parametrize("dead", [0, 2])
def test_a_dead_rank_is_named_by_all_others(ranks, dead):
    processes, store, errors = ranks
    first = beats(store)
    wait_until(lambda: min(now - then for now, then in zip(beats(store), first)) > SILENCE / 0.1)
    assert all(process.is_alive() for process in processes) and errors.read_text() == ""
    os.kill(processes[dead].pid, signal.SIGKILL)
    others = [process for rank, process in enumerate(processes) if rank != dead]
    for process in others:
        process.join(LONG)
    assert [process.exitcode for process in others] == [1, 1]
    said = errors.read_text().splitlines()
    lines = [line for line in said if "error:" in line]
    assert len(lines) == 2
    assert sum(line.endswith(" in live") for line in said) == 2  # where the main threads of the others stood
    for line in lines:
        assert f"error: rank {dead} (pid {processes[dead].pid} on " in line
        assert f"no sign of life for {SILENCE:g} s" in line
    for rank in {0, 1, 2} - {dead}:
        assert sum(f"; rank {rank} ends" in line for line in lines) == 1


@pytest.mark.slow
def test_a_job_that_stood_still_goes_on(ranks):
    """As Slurm's suspend, a frozen container or a moved virtual machine makes it."""
    processes, _, errors = ranks
    for process in reversed(processes):  # not in the same moment: rank 0, which listens to all, stands still last …
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(0.3)
    time.sleep(SILENCE + 1)
    for process in processes:  # … and wakes first
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(0.3)
    assert all(process.is_alive() for process in processes) and errors.read_text() == ""


@pytest.mark.slow
def test_the_ranks_end_when_nobody_answers_them(tmp_path):
    """The store lies with rank 0 or its launcher: its machine is gone."""
    errors = tmp_path / "errors"
    errors.touch()
    host = FORKS.Process(target=hold_store, args=(str(tmp_path / "port"),), daemon=True)
    host.start()
    wait_until((tmp_path / "port").exists)
    port = int((tmp_path / "port").read_text())
    process = FORKS.Process(target=live, args=(0, 1, port, str(errors)), daemon=True)
    process.start()
    while connect(port).add("ready", 0) < 1:
        time.sleep(0.05)
    host.kill()
    process.join(LONG)
    assert process.exitcode == 1 and "rank 0 or its launcher is gone" in errors.read_text()


def hold_store(path):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with open(path + ".tmp", "w") as file:
        file.write(str(store.port))
    os.rename(path + ".tmp", path)
    time.sleep(600)


def test_a_rank_that_has_finished_may_stop():
    store = dist.HashStore()
    first, second = (Heartbeat(store, rank, 2, every=0.05, silence=0.3) for rank in range(2))
    first.start()
    second.start()
    second.stop()
    first.stop()  # else it would end this process
    time.sleep(0.5)


def test_a_failed_collective_names_who_is_silent():
    store = dist.HashStore()
    mine, living, dead = (Heartbeat(store, rank, 3, every=0.05, silence=60) for rank in range(3))
    living.start()
    world = parallel.World(0, 3, 0, None, True, heartbeat=mine)
    lost = rf"^rank 0 lost rank 2 \(pid {os.getpid()} on [^)]*\)\. Start the same"
    with pytest.raises(ConnectionError, match=lost), parallel.naming_the_dead(world):
        raise RuntimeError("Connection closed by peer")
    dead.start()
    with pytest.raises(RuntimeError, match="out of memory"), parallel.naming_the_dead(world):
        raise RuntimeError("out of memory")

    def unreachable(ranks):
        raise RuntimeError("recvValueWithTimeout failed")

    mine._heard = unreachable
    lost = "rank 0 lost rank 0 or its launcher"
    with pytest.raises(ConnectionError, match=lost), parallel.naming_the_dead(world):
        raise RuntimeError("Connection closed by peer")
    for heartbeat in (living, dead):
        heartbeat.stop()


HANGS = """
import os, time
from fastvid.dist import heartbeat
heartbeat.show_stacks()
def stands_here():
    print("ready", flush=True)
    END
stands_here()
"""


@pytest.mark.slow
@pytest.mark.parametrize("end, code", [("time.sleep(60)", -signal.SIGKILL), ("os.abort()", -signal.SIGABRT)])
def test_a_process_shows_where_it_stands(end, code, forked):
    process = subprocess.Popen(
        [sys.executable, "-X", "faulthandler=0", "-c", HANGS.replace("END", end)],
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout.readline() == "ready\n"
    if code == -signal.SIGKILL:  # at the signal it shows its stack, and lives on
        process.send_signal(signal.SIGUSR1)
        assert any("in stands_here" in line for line in iter(process.stderr.readline, ""))
        assert process.poll() is None
        process.kill()
    said = process.communicate(timeout=20)[1]
    assert process.returncode == code and ("in stands_here" in said) == (code == -signal.SIGABRT)


@pytest.mark.parametrize(
    "count, most, said",
    [
        (None, None, "Start the same command again"),
        ("0", "3", r"torchrun, .* starts the job again \(restart 1 of 3\)"),
        ("3", "3", "Start the same command again"),
    ],
)
def test_what_follows_is_said(monkeypatch, count, most, said):
    for name, value in (("RESTART_COUNT", count), ("MAX_RESTARTS", most)):
        monkeypatch.delenv(f"TORCHELASTIC_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"TORCHELASTIC_{name}", value)
    assert re.match(said, what_follows())
