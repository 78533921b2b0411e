"""Reading ahead in processes: the same results in the same order, signals, death."""

import errno
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT

from fastvid.data import prefetch as workers
from fastvid.data.prefetch import Prefetcher, Stopped

pytestmark = pytest.mark.usefixtures("forked")
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}


def results(number):
    """What a loader's function returns is like: nested, some tensors small, some large, some without a numpy twin."""
    generator = torch.Generator().manual_seed(number)
    large = torch.randn(3, 700, 300, generator=generator).half()
    return [(large, {"small": torch.arange(number), "bf16": torch.ones(2, dtype=torch.bfloat16)})], f"text {number}"


def same(found, expected):
    if isinstance(expected, torch.Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key]) for key in expected)
    if isinstance(expected, (list, tuple)):
        return type(found) is type(expected) and len(found) == len(expected) and all(map(same, found, expected))
    return found == expected


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 1, 4])
def test_results_and_their_order_are_the_same_for_any_number_of_processes(processes):
    def slow_first(number):
        time.sleep(0.05 if number % 4 == 0 else 0)
        return results(number)

    torch.manual_seed(7)
    before = torch.get_rng_state()
    found = list(Prefetcher(slow_first, processes).map(range(2, 13)))
    assert len(found) == 11 and all(same(a, results(number)) for a, number in zip(found, range(2, 13)))
    found[0][0][0][1]["small"] += 1  # as writable as what was sent
    assert torch.equal(torch.get_rng_state(), before), "the global generator was drawn from"


@pytest.mark.slow
def test_an_abandoned_map_ends_its_processes_and_can_be_called_again():
    ahead = Prefetcher(lambda number: (number, os.getpid()), 2)
    some = ahead.map(range(100))
    pids = {next(some)[1], next(some)[1]}
    assert len(pids) == 2 and os.getpid() not in pids
    some.close()
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert [number for number, _ in ahead.map(range(3))] == [0, 1, 2]


def test_an_error_in_a_process_is_raised_here():
    def fails(number):
        if number == 3:
            raise KeyError("broken sample")
        return number

    found = Prefetcher(fails, 2).map(range(9))
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(KeyError, match="broken sample"):
        next(found)


@pytest.mark.slow
def test_signals_to_the_whole_job_leave_the_processes_alone():
    def signalled(number):
        for sent in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(os.getpid(), sent)
        return number

    assert list(Prefetcher(signalled, 2).map(range(5))) == list(range(5))


@pytest.mark.slow
def test_a_dead_process_is_named():
    def dies(number):
        if number == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.02)
        return number

    found = []
    with pytest.raises(ChildProcessError, match="exit code -9.*--dataloader_num_workers"):
        for number in Prefetcher(dies, 2).map(range(20)):
            found.append(number)
            time.sleep(0.2)  # a step: the death is not told in its midst
    assert found == list(range(len(found))) and len(found) <= 4


# What cannot be sent


class Own(Exception):
    def __init__(self, first, second):
        super().__init__(first)


@pytest.mark.parametrize(
    "raised, expected",
    [
        (MemoryError(), (ChildProcessError, "--dataloader_num_workers")),
        (Own("odd", 2), (RuntimeError, "Own: odd")),
        (type("Local", (Exception,), {})("local"), (RuntimeError, "Local: local")),
        (ValueError("file.pkl: is empty"), (ValueError, "^file.pkl: is empty$")),
    ],
)
def test_an_exception_that_cannot_be_sent_is_told_all_the_same(raised, expected):
    def fails(number):
        raise raised

    with pytest.raises(expected[0], match=expected[1]) as caught:
        list(Prefetcher(fails, 1).map(range(2)))
    assert "in fails" in str(caught.value.__cause__)  # where it was raised


def test_a_result_that_cannot_be_pickled_is_an_error():
    with pytest.raises((AttributeError, TypeError, pickle.PicklingError), match="pickle"):
        list(Prefetcher(lambda number: lambda: None, 2).map(range(4)))


def test_too_many_open_files_are_named():
    def crowded(number):
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")), 4096))
        held = []
        while True:
            try:
                held.append(os.dup(0))
            except OSError:
                return results(number), held

    with pytest.raises(ChildProcessError, match="Too many open files.*ulimit -n.*--dataloader_num_workers 0"):
        list(Prefetcher(crowded, 1).map(range(2)))


def test_a_full_memory_is_named(monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workers, "_memory", full)
    with pytest.raises(ChildProcessError, match=r"/dev/shm has \S+ MiB .*docker run --shm-size.*_num_workers"):
        list(Prefetcher(results, 2).map(range(2)))


def test_a_full_shm_at_the_start_is_named(monkeypatch):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(workers._Fork, "Queue", full)
    with pytest.raises(ChildProcessError, match="/dev/shm has .*--shm-size.*--dataloader_num_workers 0"):
        list(Prefetcher(results, 2).map(range(2)))


def test_a_system_without_such_memory_uses_a_temporary_file(monkeypatch):
    def none(name):
        raise OSError(errno.ENOSYS, "not here")

    monkeypatch.setattr(os, "memfd_create", none)
    assert all(same(a, results(number)) for number, a in enumerate(Prefetcher(results, 2).map(range(3))))


SMALL_SHM = """
import torch
from fastvid.data.prefetch import Prefetcher
print(sum(len(large) for large in Prefetcher(lambda number: torch.zeros(3_000_000), 2).map(range(8))))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="mounting needs root")
def test_a_small_shm_does_not_matter():
    """Containers have 64 MB; here 1 MB, for batches of 12."""
    script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "{sys.executable}" -W ignore -c "$0"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, SMALL_SHM], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    if "mount" in done.stderr:
        pytest.skip(f"no mount: {done.stderr}")
    assert done.stdout.split() == ["24000000"], done


@pytest.mark.slow
def test_a_long_wait_ends_when_it_is_told_to():
    def hangs(number):
        if number == 2:
            time.sleep(1000)
        return os.getpid()

    begin, found = time.monotonic(), []
    with pytest.raises(Stopped):
        for pid in Prefetcher(hangs, 1).map(range(5), lambda: time.monotonic() - begin > 0.5):
            found.append(pid)
    assert len(found) == 2 and time.monotonic() - begin < 30
    with pytest.raises(ProcessLookupError):
        os.kill(found[0], 0)


@pytest.mark.parametrize("kind", [RuntimeError, ConnectionError, EOFError])
def test_an_error_of_the_function_is_not_taken_for_a_death(kind):
    def fails(number):
        raise kind("the function's own")

    with pytest.raises(kind, match="the function's own") as raised:
        list(Prefetcher(fails, 1).map(range(2)))
    assert not isinstance(raised.value, ChildProcessError)


FAILS = """
from fastvid.data.prefetch import Prefetcher
def fails(number):
    if number == 3:
        raise KeyError("broken sample")
for _ in Prefetcher(fails, 2).map(range(1000)):
    pass
"""


@pytest.mark.slow
def test_an_error_that_nobody_catches_ends_the_run():
    """Its traceback keeps every frame until the interpreter's exit."""
    failed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAILS], stderr=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60
    )
    assert failed.returncode == 1 and "KeyError: 'broken sample'" in failed.stderr


ORPHANS = """
import os, signal, torch
from fastvid.data.prefetch import Prefetcher
results = Prefetcher(lambda number: (os.getpid(), torch.zeros(50_000)), 2).map(range(1000))
print(*{next(results)[0] for _ in range(4)}, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_processes_do_not_outlive_a_killed_run():
    """More lies in their pipes than those hold: nobody will ever read it."""
    killed = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ORPHANS], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT, timeout=60
    )  # returns when nobody holds the pipe any more
    assert killed.returncode == -signal.SIGKILL and len(killed.stdout.split()) == 2


HANGS = """
import mmap, os, time
from fastvid.data import prefetch
prefetch._SIGN_OF_LIFE = (2, 2, 20)
children, hang, parent = mmap.mmap(-1, 1), {hang}, os.getpid()
def begin():
    children[0] += 1
    if children[0] in hang:
        time.sleep(1000)
os.register_at_fork(after_in_child=begin)
print(*prefetch.Prefetcher(lambda number: number + os.getppid() - parent, 2).map(range(4)), children[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("hang", [set(), {1}, {1, 2, 4}])
def test_a_process_that_hangs_in_fork_is_replaced(hang):
    """As a child of Python 3.11 does when a thread of its parent held the interpreter's list of threads."""
    program = HANGS.format(hang=hang or "set()")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert done.returncode == 0 and done.stdout.split() == ["0", "1", "2", "3", str(2 + len(hang))], done


@pytest.mark.slow
def test_processes_that_never_begin_are_given_up():
    program = HANGS.format(hang="range(100)").replace("(2, 2, 20)", "(0.5, 0.5, 0.5)")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    assert done.returncode == 1 and "ChildProcessError" in done.stderr and "--dataloader_num_workers 0" in done.stderr
