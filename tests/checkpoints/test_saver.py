"""Checkpoints written while training goes on."""

import os
import threading
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from fastvid.checkpoints import checkpoint, shards
from fastvid.checkpoints import folders as checkpoint_folders
from fastvid.checkpoints import saver as saver_module
from fastvid.checkpoints.saver import Saver

PATIENCE = 30  # seconds until a test that waits for a thread has failed


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A failed write is tried again without delay."""
    monkeypatch.setattr(saver_module, "RETRY_AFTER", 0.0)


class Gate:
    """A `shards.write` that waits at the gate; `reached` says that it is there."""

    def __init__(self, monkeypatch):
        self.reached, self.open = threading.Event(), threading.Event()
        write = shards.write

        def gated(path, held, mark):
            self.reached.set()
            assert self.open.wait(PATIENCE)
            write(path, held, mark)

        monkeypatch.setattr(shards, "write", gated)


def save(saver, folder, step, tensors, **options):
    saver.save(folder, step, groups={"model": tensors}, state={"step": step}, **options)


def weight_of(path):
    return checkpoint.read_full(path, "model")["weight"].tolist()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    gate, tensors = Gate(monkeypatch), {"weight": torch.ones(3)}
    with Saver() as saver:
        save(saver, tmp_path, 1, tensors)
        assert gate.reached.wait(PATIENCE)
        tensors["weight"] += 1  # the next step
        assert checkpoint.newest_valid(tmp_path) is None
        gate.open.set()
    assert weight_of(checkpoint.newest_valid(tmp_path)) == [1, 1, 1]
    assert checkpoint.read_state(tmp_path / "checkpoint-1") == {"step": 1}


def test_the_next_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate, tensors, saver = Gate(monkeypatch), {"weight": torch.zeros(3)}, Saver()
    save(saver, tmp_path, 1, tensors)
    tensors["weight"] += 2
    second = threading.Thread(target=save, args=(saver, tmp_path, 2, tensors))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.open.set()
    second.join(PATIENCE)
    saver.wait()
    assert [weight_of(tmp_path / f"checkpoint-{step}") for step in (1, 2)] == [[0, 0, 0], [2, 2, 2]]
    save(saver, tmp_path, 3, tensors, total_limit=1)
    saver.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    saver.wait()  # nothing is under way


@pytest.fixture
def full_disk(monkeypatch):
    """No checkpoint but number 1 can be written."""
    write = shards.write

    def full(path, held, mark):
        if "checkpoint-1." not in str(path):
            raise OSError(28, "No space left on device")
        write(path, held, mark)

    monkeypatch.setattr(shards, "write", full)


@pytest.mark.parametrize("end", ["save", "wait", "exit"])
def test_a_failed_write_is_reported_at_the_next_save_or_the_end(tmp_path, full_disk, end):
    tensors, saver = {"weight": torch.ones(3)}, Saver()
    save(saver, tmp_path, 1, tensors)
    save(saver, tmp_path, 2, tensors)
    saver._thread.join(PATIENCE)
    with pytest.raises(OSError, match=r"checkpoint-2 of .* could not be written.* rank 0: .*No space left"):
        if end == "save":
            save(saver, tmp_path, 3, tensors)
        elif end == "wait":
            saver.wait()
        else:
            saver.__exit__(None, None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-1"
    saver.wait()  # said once


def test_what_failed_is_known_before_anyone_asks(tmp_path, full_disk, caplog):
    """The file, the reason, what is needed, and what to do; tried twice."""
    saver = Saver()
    save(saver, tmp_path, 2, {"weight": torch.ones(300_000)})
    saver._thread.join(PATIENCE)
    assert saver.failed and not saver.has(2)
    assert caplog.text.count("checkpoint-2 could not be written, and is tried again") == 1
    with pytest.raises(
        OSError,
        match=r"\.checkpoint-2\.tmp/model-00000-of-00001.*It takes 1\.2 MB, \S+ MB are free in "
        r".*: free some.*--save_total_limit.* the same command again",
    ):
        saver.wait()
    assert not saver.failed and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["rename", "fsync", "mkdir"])
def test_a_write_that_fails_once_is_made_again(tmp_path, monkeypatch, caplog, call):
    real, failures = getattr(os, call), iter([True])

    def stumbles(*args, **options):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return real(*args, **options)

    monkeypatch.setattr(os, call, stumbles)
    with Saver() as saver:
        save(saver, tmp_path, 1, {"weight": torch.ones(3)})
    assert weight_of(checkpoint.newest_valid(tmp_path)) == [1, 1, 1] and saver.has(1)
    assert "Input/output error" in caplog.text and "tried again" in caplog.text


def test_an_error_in_training_is_not_hidden_by_one_in_writing(tmp_path, full_disk, caplog):
    with pytest.raises(KeyError, match="training"), Saver() as saver:
        save(saver, tmp_path, 2, {"weight": torch.ones(3)})
        raise KeyError("training")
    assert "checkpoint-2" in caplog.text and "No space left" in caplog.text


def test_an_error_in_training_waits_for_the_write(tmp_path, monkeypatch):
    gate = Gate(monkeypatch)
    with pytest.raises(KeyError), Saver() as saver:
        save(saver, tmp_path, 1, {"weight": torch.ones(3)})
        threading.Timer(0.2, gate.open.set).start()
        raise KeyError
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-1"


def test_a_defect_keeps_its_type(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "_commit", lambda *args: 1 / 0)
    saver = Saver()
    save(saver, tmp_path, 1, {"weight": torch.ones(3)})
    with pytest.raises(ZeroDivisionError):
        saver.wait()


# Several ranks


def fail_once_on_rank_one(rank, folder):
    saver_module.RETRY_AFTER = 0.0
    write, failures = shards.write, iter([rank == 1])

    def hindered(path, held, mark):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        write(path, held, mark)

    shards.write = hindered
    weight = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    with Saver() as saver:
        save(saver, folder, 1, {"weight": weight})
        saver.wait()
        return saver.has(1)


@pytest.mark.slow
def test_both_ranks_try_again_where_one_failed(tmp_path):
    assert on_ranks(2, fail_once_on_rank_one, tmp_path, tmp_path / "out") == [True, True]
    assert weight_of(checkpoint.newest_valid(tmp_path / "out")) == [0, 1, 2, 3]


def train_and_save(rank, folder, kind):
    """Rank 1's disk is slow, or full; meanwhile both go on with collectives of their own."""
    saver_module.RETRY_AFTER = 0.0
    steps_done, reached, write, saved = threading.Event(), threading.Event(), shards.write, []

    def hindered(path, held, mark):
        if rank == 1 and kind == "slow":
            reached.set()
            assert steps_done.wait(PATIENCE)
        if rank == 1 and kind == "full":
            raise OSError(28, "No space left on device")
        write(path, held, mark)

    shards.write = hindered
    weight = distribute_tensor(torch.arange(4.0), init_device_mesh("cpu", (2,)), [Shard(0)])
    try:
        with Saver() as saver:
            save(saver, folder, 1, {"weight": weight})
            if rank == 1 and kind == "slow":
                assert reached.wait(PATIENCE)
            for _ in range(5):  # steps: were the writer in their way, they would wait for it, and it for them
                total = torch.ones(())
                dist.all_reduce(total)
                weight._local_tensor.add_(total)
                saved.append(checkpoint_folders.steps(folder))
            steps_done.set()
    except OSError as error:
        return str(error)
    return saved


@pytest.mark.slow
def test_two_ranks_go_on_while_one_still_writes(tmp_path):
    assert on_ranks(2, train_and_save, tmp_path, tmp_path / "out", "slow") == [[[]] * 5] * 2
    assert weight_of(checkpoint.newest_valid(tmp_path / "out")) == [0, 1, 2, 3]


@pytest.mark.slow
def test_one_rank_s_full_disk_ends_both(tmp_path):
    said = on_ranks(2, train_and_save, tmp_path, tmp_path / "out", "full")
    assert len(set(said)) == 1 and "checkpoint-1 of" in said[0] and "rank 1: OSError" in said[0]
    assert checkpoint.newest_valid(tmp_path / "out") is None


def save_without_copies(rank, folder, kind):
    """The types and texts of what ends two saves; of the first, rank 1's GPU does not make the copies."""
    saver_module.PATIENCE = timedelta(seconds=PATIENCE)  # of what never comes
    saver_module.RETRY_AFTER = 0.0
    saver, said = Saver(), []

    def broken():
        raise kind("an illegal memory access was encountered")

    if rank == 1:
        saver._copies.wait = broken
    for step in (1, 2):
        save(saver, folder, step, {"weight": torch.ones(3)})
        try:
            saver.wait()
            said.append(None)
        except Exception as error:
            said.append((type(error), str(error)))
        saver._copies.__dict__.pop("wait", None)
    return said


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RuntimeError, OSError])
def test_copies_that_one_rank_cannot_make_end_the_write_on_both(tmp_path, kind):
    """Whatever the error is: the other rank does not wait for what never comes."""
    said = on_ranks(2, save_without_copies, tmp_path, tmp_path / "out", kind)
    assert [first[0] for first, _ in said] == [OSError, kind]
    assert all("illegal memory access" in first[1] for first, _ in said)
    assert f"rank 1: {kind.__name__}" in said[0][0][1]
    assert [second for _, second in said] == [None, None]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["checkpoint-2"]
