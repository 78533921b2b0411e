"""What a CPU's training does with freed memory, in a process of its own."""

import os
import subprocess
import sys

import pytest
import torch
from training_run import config_of, write_run

from fastvid import train
from fastvid.dist import host_memory, parallel

CPU = parallel.World(0, 1, 0, torch.device("cpu"), False)
STEP = """
import resource
import torch
from fastvid.dist import host_memory

{call}
torch.empty(2**26, dtype=torch.uint8).fill_(1)  # freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(2**25, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_a_step(call):
    run = subprocess.run([sys.executable, "-c", STEP.format(call=call)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.slow
def test_freed_memory_is_used_again():
    # Even in huge pages, 32 MiB that come anew from the system are 16 faults.
    assert faults_of_a_step("assert host_memory.keep_freed(True)") < 12 < faults_of_a_step("")


HOLES = """
import torch
from fastvid.dist import host_memory

assert host_memory.keep_freed(not {keep}) and host_memory.keep_freed({keep})  # the last word counts
blocks = [torch.ones(2**22) for _ in range(16)]
del blocks[::2]  # a hole of 16 MiB between any two: too small for what comes
larger = torch.ones(2**25)
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 2**10)
"""


@pytest.mark.slow
def test_memory_between_what_is_held_goes_back_when_it_is_not_kept():
    peak = {
        keep: float(
            subprocess.run(
                [sys.executable, "-c", HOLES.format(keep=keep)], capture_output=True, text=True, check=True
            ).stdout
        )
        for keep in (True, False)
    }
    assert 100 < peak[True] - peak[False] < 140  # MiB; the holes are 128


def test_a_containers_limit_counts(monkeypatch, tmp_path):
    limits = tmp_path / "memory.max", tmp_path / "limit_in_bytes"
    monkeypatch.setattr(host_memory, "_LIMITS", limits)
    machine = host_memory.total()
    assert machine == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for text, expected in (("max\n", machine), (f"{2**63 - 4096}\n", machine), (f"{2**30}\n", 2**30)):
        for path in limits:
            path.write_text(text)
            assert host_memory.total() == expected
            path.unlink()


def test_a_library_without_the_call_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed(True)


@pytest.mark.slow
@pytest.mark.parametrize("recompute, keeps", [("none", True), ("selective", True), ("full", False)])
def test_training_on_a_cpu_keeps_it_unless_memory_is_short(monkeypatch, tmp_path, recompute, keeps):
    calls = []
    monkeypatch.setattr(host_memory, "keep_freed", calls.append)
    train.build(config_of(write_run(tmp_path), tmp_path / "output", "--recompute", recompute), CPU)
    assert calls == [keeps]
