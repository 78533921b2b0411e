"""What a CPU's training does with freed memory, in a process of its own."""

import subprocess
import sys

import pytest
import torch
from training_run import config_of, write_run

from fastvid import host_memory, parallel, train

CPU = parallel.World(0, 1, 0, torch.device("cpu"), False)
STEP = """
import resource
import torch
from fastvid import host_memory

{call}
torch.empty(2**26, dtype=torch.uint8).fill_(1)  # freed at once
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.empty(2**25, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults_of_a_step(call):
    run = subprocess.run([sys.executable, "-c", STEP.format(call=call)], capture_output=True, text=True, check=True)
    return int(run.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc is told")
def test_freed_memory_is_used_again():
    # Even in huge pages, 32 MiB that come anew from the system are 16 faults.
    assert faults_of_a_step("assert host_memory.keep_freed()") < 12 < faults_of_a_step("")


def test_a_library_without_the_call_is_left_alone(monkeypatch):
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: object())
    assert not host_memory.keep_freed()


def test_training_on_a_cpu_asks_for_it(monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr(host_memory, "keep_freed", lambda: calls.append(1))
    train.build(config_of(write_run(tmp_path), tmp_path / "output"), CPU)
    assert calls == [1]
