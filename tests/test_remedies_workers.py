"""What messages of processes that read ahead say to do: fewer of them, none, or a higher limit."""

import os
import resource

import pytest

from fastvid.data import prefetch as workers
from fastvid.data.prefetch import Prefetcher

# Processes that read ahead. Their number is the caller's: --dataloader_num_workers.


def test_no_processes_need_no_shared_memory(monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers._Fork, "Queue", full)
    with pytest.raises(ChildProcessError, match="can be started .*--dataloader_num_workers 0 needs none"):
        list(Prefetcher(str, 1).map(range(2)))
    assert list(Prefetcher(str, 0).map(range(2))) == ["0", "1"]


def test_no_processes_need_no_memory_to_send_with(monkeypatch):
    def full():
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(workers, "_memory", full)
    with pytest.raises(ChildProcessError, match="fewer --dataloader_num_workers need less memory, 0 needs none"):
        list(Prefetcher(str, 1).map(range(2)))
    assert list(Prefetcher(str, 0).map(range(2))) == ["0", "1"]


@pytest.mark.slow
@pytest.mark.parametrize("processes, limit", [(1, 4096), (0, None)])
def test_a_limit_on_open_files(processes, limit):
    def opens_many(number):
        held = []
        try:
            while len(held) < 100:
                held.append(os.dup(0))
        except OSError:
            pass
        if parent == os.getpid():
            while held:
                os.close(held.pop())
        return number, held

    limits, parent = resource.getrlimit(resource.RLIMIT_NOFILE), os.getpid()
    few = len(os.listdir("/proc/self/fd")) + 60
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
        with pytest.raises(ChildProcessError, match="raise the limit on open files .`ulimit -n`., or give --data"):
            list(Prefetcher(opens_many, 1).map(range(2)))
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit or few, limits[1]))
        assert [number for number, _ in Prefetcher(opens_many, processes).map(range(2))] == [0, 1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_no_processes_need_no_second_memory():
    def needs_much(number):
        if os.getpid() != parent:
            raise MemoryError
        return number

    parent = os.getpid()
    with pytest.raises(ChildProcessError, match="has no memory left: fewer --dataloader_num_workers need less, 0 "):
        list(Prefetcher(needs_much, 1).map(range(2)))
    assert list(Prefetcher(needs_much, 0).map(range(2))) == [0, 1]
