"""What all ranks must decide alike, and what repeatable computation asks for."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks

from fastvid.dist import parallel, rendezvous

ALONE = parallel.World(0, 1, 0, torch.device("cpu"), False)


@dataclass(frozen=True)
class Told(parallel.World):
    """Rank 0 of a world whose other ranks say what they are told to."""

    others: tuple = ()

    def gather_objects(self, value):
        return [value, *self.others]


def told(*others):
    return Told(0, 1 + len(others), 0, torch.device("cpu"), True, others=others)


def test_memory_is_what_the_poorest_rank_has():
    """Ranks that planned by themselves would shard and recompute differently, and wait for each other forever."""
    own = parallel.device_memory(ALONE)
    assert own > 2**28
    assert parallel.device_memory(told(own + 5, own - 5, own)) == own - 5
    assert parallel.device_memory(told(own + 5)) == own


@pytest.mark.parametrize(
    "shard, world, trained, fits, layout",
    [
        ("auto", ALONE, True, False, "replicated"),
        ("full", ALONE, True, False, "replicated"),
        ("auto", told(1), False, True, "trained"),
        ("auto", told(1), False, False, "full"),
        ("auto", told(1), True, True, "full"),
        ("full", told(1), False, True, "full"),
        ("none", told(1), True, False, "replicated"),
    ],
)
def test_layouts(shard, world, trained, fits, layout):
    assert parallel.choose_layout(shard, world, decoder_is_trained=trained, fits=fits) == layout


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("users", [None, *NAMES])
def test_gpu_memory_grows_in_place_unless_the_user_says_otherwise(monkeypatch, users):
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before afterwards
        monkeypatch.delenv(name)
    if users:
        monkeypatch.setenv(users, "max_split_size_mb:512")
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("RANK", raising=False)
    assert parallel.start().device.type == "cuda"
    found = {name: os.environ[name] for name in NAMES if name in os.environ}
    if users:
        assert (found, told) == ({users: "max_split_size_mb:512"}, [])
    else:
        assert (found, told) == ({"PYTORCH_ALLOC_CONF": "expandable_segments:True"}, ["expandable_segments:True"])


def test_repeatable_computation_gives_cublas_its_workspace(monkeypatch):
    """Without it the first matrix product on a GPU raises."""
    monkeypatch.setitem(os.environ, "CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delitem(os.environ, "CUBLAS_WORKSPACE_CONFIG")
    try:
        parallel.compute_repeatably(True)
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and torch.are_deterministic_algorithms_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory  # which would write every torch.empty
    finally:
        parallel.compute_repeatably(False)
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory


@pytest.mark.parametrize("gpu", [True, False])
def test_the_group_gets_its_timeout_and_its_device(monkeypatch, gpu):
    """With its device NCCL connects at once, where a failure is plain."""
    given = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(dist, "rendezvous", lambda url, timeout: iter([(dist.HashStore(), 0, 1)]))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: given.update(options, backend=backend))
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    parallel.start(7).heartbeat.stop()
    assert given["timeout"] == timedelta(seconds=7)
    assert given["device_id"] == (torch.device("cuda", 3) if gpu else None)
    assert given["backend"] == ("cpu:gloo,cuda:nccl" if gpu else "gloo")


def test_ranks_leave_together(monkeypatch):
    done = []
    monkeypatch.setattr(Told, "gather_objects", lambda self, value: done.append("all are here"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("left"))
    parallel.finish(told(1))
    parallel.finish(ALONE)
    assert done == ["all are here", "left"]


def test_the_ranks_of_an_attempt_find_nothing_of_an_earlier_one():
    """torchrun keeps its store when it restarts the ranks."""
    store = dist.HashStore()
    for attempt, order in enumerate([(0, 1, 2), (2, 1, 0), (1, 0, 2)]):
        with ThreadPoolExecutor(3) as pool:
            futures = {
                rank: pool.submit(rendezvous.store_of_this_attempt, store, rank, 3, timedelta(seconds=30))
                for rank in order
            }
            stores = [futures[rank].result(30) for rank in range(3)]
        assert not any(each.check(["address"]) for each in stores)
        stores[attempt].set("address", str(attempt))
        assert [each.get("address") for each in stores] == [str(attempt).encode()] * 3


def test_a_rank_that_does_not_come_is_named():
    store = dist.HashStore()
    store.set("greeting/1", "of an earlier attempt")
    with pytest.raises(ConnectionError, match="^ranks 1, 2 did not come within 0:00:00.2"):
        rendezvous.store_of_this_attempt(store, 0, 3, timedelta(seconds=0.2))


def seconds_in_a_mesh(rank, size, copies):
    """How long rank 0 waits in each group of a mesh for ranks that do not come; those leave when it has."""
    world, waited = parallel.World(rank, 4, rank, torch.device("cpu"), True, timeout=timedelta(seconds=2)), []
    mesh = rendezvous.mesh_of(world, size, copies=copies)
    for name in mesh.mesh_dim_names or (0,):
        if rank == 0 and mesh.get_group(name).size() > 1:
            begin = time.monotonic()
            with pytest.raises(RuntimeError, match="[Tt]imed out"):
                dist.all_reduce(torch.ones(()), group=mesh.get_group(name))
            waited.append(time.monotonic() - begin)
    store = dist.distributed_c10d._get_default_store()
    store.set(f"done/{rank}", "")
    store.wait([f"done/{other}" for other in range(4)], timedelta(seconds=60))
    return waited


@pytest.mark.slow
@pytest.mark.parametrize("size, copies, groups", [(2, True, 2), (4, True, 1), (4, False, 1)])
def test_the_groups_of_a_mesh_have_the_run_s_timeout(tmp_path, size, copies, groups):
    waited = on_ranks(4, seconds_in_a_mesh, tmp_path, size, copies)[0]
    assert len(waited) == groups and all(1.5 < seconds < 20 for seconds in waited), waited


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        {"SLURM_PROCID": "1", "SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "4"},
    ],
)
def test_processes_that_know_nothing_of_each_other_are_refused(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="(srun|mpirun) started [24] processes.*torchrun"):
        parallel.start()


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("WORLD_SIZE", "0", "WORLD_SIZE is '0', not the number of processes"),
        ("WORLD_SIZE", "two", "WORLD_SIZE is 'two'"),
        ("RANK", "", "RANK is '', not one of 0 to 0"),
        ("RANK", "1", "RANK is '1', not one of 0 to 0"),
        ("LOCAL_RANK", "gpu0", "LOCAL_RANK is 'gpu0', which is no number"),
    ],
)
def test_variables_that_are_no_ranks_are_named(monkeypatch, name, value, said):
    for other in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(other, "1" if other == "WORLD_SIZE" else "0")
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{said}.*torchrun"):
        parallel.start()


def test_one_process_of_a_launcher_trains(monkeypatch, caplog):
    for name, value in {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    assert parallel.start().size == 1 and not caplog.text
    monkeypatch.setenv("SLURM_NTASKS", "2")  # a batch script's own process, or the first of two
    assert parallel.start().size == 1 and "srun started 2 processes" in caplog.text
