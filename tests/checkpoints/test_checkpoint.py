"""Checkpoints: exact, whole or absent."""

import json
import os
import re
import resource
import signal
import sys

import pytest
import torch
from checkpoint_cases import assert_same, flip_a_bit, names_in, save_step, tensors_of
from forks import FORKS

from fastvid.checkpoints import checkpoint, shards
from fastvid.checkpoints import folders as checkpoint_folders
from fastvid.checkpoints.host_copies import HostCopies
from fastvid.dist.sharding import LocalShard


def assert_holds(path, step):
    assert path.name == f"checkpoint-{step}"
    assert checkpoint.read_state(path) == {"step": step}
    assert_same(checkpoint.read_full(path, "model"), tensors_of(step))


# What is saved is what is loaded


class Quantizing(torch.Tensor):
    """Stands for the subclasses whose `to` does more than move (bitsandbytes' parameters)."""

    def to(self, *args, **kwargs):
        raise AssertionError("to() of a subclass")


def test_every_kind_of_tensor_comes_back_bit_for_bit(tmp_path):
    base = torch.randn(8, 6)
    tensors = {
        "float32": base,
        "same storage": base,
        "transposed": base.t(),
        "bfloat16": torch.nn.Parameter(base.bfloat16()),
        "subclass": torch.randn(3).as_subclass(Quantizing),
        "uint8": torch.arange(256, dtype=torch.uint8),
        "int64": torch.tensor([2**62 + 1, -1]),
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "float scalar": torch.tensor(0.1),
        "no rows": torch.empty(0, 4),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]).view(torch.int32),
    }
    state = {"step": 7, "loss": 0.1 + 0.2, "tiny": 5e-324, "rng": [1, 2**53 - 1], "name": "ü"}
    path = checkpoint.save(tmp_path / "new" / "folder", 7, groups={"model": tensors, "none": {}}, state=state)

    assert checkpoint.newest_valid(tmp_path / "new" / "folder") == path
    assert checkpoint.read_state(path) == state
    assert_same(checkpoint.read_full(path, "model"), tensors)
    assert checkpoint.read_full(path, "none") == {}
    targets = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    checkpoint.load_into(path, "model", targets)
    assert_same(targets, tensors)


def test_files_are_as_readable_as_their_folder(tmp_path):
    path = save_step(tmp_path, 1)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {path.stat().st_mode & 0o666}


def test_what_changes_after_the_snapshot_is_not_saved(tmp_path):
    tensors = tensors_of(1)
    snapshot = checkpoint.snapshot({"model": tensors}, {"step": 1})
    for tensor in tensors.values():
        tensor.zero_()
    assert_holds(checkpoint.write(tmp_path, 1, snapshot), 1)


def test_a_snapshot_may_use_the_memory_of_one_before(tmp_path):
    copies = HostCopies()
    first, second = (checkpoint.snapshot({"model": tensors_of(i)}, {"step": i}, copies=copies) for i in (1, 2))
    ours, theirs = (snapshot.groups["model"]["weight"].local for snapshot in (first, second))
    assert ours.data_ptr() == theirs.data_ptr()
    assert_holds(checkpoint.write(tmp_path, 2, second), 2)


def test_what_does_not_fit_is_named_and_nothing_is_copied(tmp_path):
    path = save_step(tmp_path, 1)
    untouched = torch.zeros(5)
    with pytest.raises(ValueError, match=r"weight was saved as float32 \[6, 3\], wanted float32 \[3, 6\]"):
        checkpoint.load_into(path, "model", {"bias": untouched, "weight": torch.zeros(3, 6)})
    with pytest.raises(ValueError, match=r"bias was saved as float32 \[5\], wanted bfloat16 \[5\]"):
        checkpoint.load_into(path, "model", {"bias": torch.zeros(5, dtype=torch.bfloat16)})
    with pytest.raises(ValueError, match="extra.0 is missing.* and 2 more"):
        checkpoint.load_into(path, "model", {"bias": untouched} | {f"extra.{i}": torch.zeros(1) for i in range(10)})
    with pytest.raises(ValueError, match="no 'optimizer' tensors"):
        checkpoint.load_into(path, "optimizer", {})
    with pytest.raises(ValueError, match="checksums.json is missing"):
        checkpoint.read_full(tmp_path, "model")
    assert not untouched.any()


def test_bf16_loads_into_fp32(tmp_path):
    """As the norms of older checkpoints do."""
    saved = torch.randn(5).bfloat16()
    path, found = checkpoint.save(tmp_path, 1, groups={"model": {"norm": saved}}, state={}), torch.zeros(5)
    checkpoint.load_into(path, "model", {"norm": found})
    assert torch.equal(found, saved.float())
    with pytest.raises(ValueError, match=r"norm was saved as bfloat16 \[5\], wanted float32 \[6\]"):
        checkpoint.load_into(path, "model", {"norm": torch.zeros(6)})
    with pytest.raises(ValueError, match=r"norm was saved as bfloat16 \[5\], wanted float16 \[5\]"):
        checkpoint.load_into(path, "model", {"norm": torch.zeros(5, dtype=torch.float16)})


def test_a_tensor_with_a_hole_is_incomplete(tmp_path):
    pieces = {"a": LocalShard(torch.ones(2), (5,), 0)}
    path = checkpoint.save(tmp_path, 1, groups={"model": pieces}, state={})
    checkpoint.load_into(path, "model", {"a": LocalShard(torch.zeros(2), (5,), 0)})
    with pytest.raises(ValueError, match="a is incomplete"):
        checkpoint.load_into(path, "model", {"a": LocalShard(torch.zeros(2), (5,), 1)})
    with pytest.raises(ValueError, match="a is incomplete"):
        checkpoint.read_full(path, "model")["a"]


def test_state_that_is_not_json_is_a_defect_not_a_disk_error(tmp_path):
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, groups={}, state={"x": object()})


def cut_short(path):
    os.truncate(path, path.stat().st_size - 1)


@pytest.mark.parametrize("damage", [flip_a_bit, cut_short, os.unlink])
@pytest.mark.parametrize("name", ["model-00000-of-00001.safetensors", "state.json", "checksums.json"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, name, damage, caplog):
    save_step(tmp_path, 5)
    damage(save_step(tmp_path, 10) / name)
    assert_holds(checkpoint.newest_valid(tmp_path), 5)
    [told] = caplog.messages
    assert re.search(f"checkpoint-10 is passed over: .*{name}", told)
    if damage is cut_short and name != "checksums.json":
        assert re.search(r"has \d+ bytes, \d+ were written", told)
    save_step(tmp_path, 10)
    assert_holds(checkpoint.newest_valid(tmp_path), 10)


def test_a_file_damaged_after_the_check_is_named(tmp_path):
    path = save_step(tmp_path, 1)
    cut_short(path / "model-00000-of-00001.safetensors")
    with pytest.raises(ValueError, match="model-00000-of-00001.safetensors: .* Remove this checkpoint"):
        checkpoint.load_into(path, "model", tensors_of(1))


def test_no_name_in_the_checksums_leads_out_of_the_folder(tmp_path):
    path = save_step(tmp_path, 1)
    outside = tmp_path / "model-00009-of-00010.safetensors"
    outside.write_bytes(b"secret")
    checksums = json.loads((path / "checksums.json").read_text())
    checksums["files"][f"../{outside.name}"] = checkpoint_folders.measure(outside)
    (path / "checksums.json").write_text(json.dumps(checksums))
    with pytest.raises(ValueError, match="checkpoint-1 is damaged: .*is missing"):
        checkpoint.newest_valid(tmp_path)
    assert_same(checkpoint.read_full(path, "model"), tensors_of(1))


@pytest.mark.filterwarnings("error")
def test_without_checkpoints_there_is_none(tmp_path):
    assert checkpoint.newest_valid(tmp_path / "missing") is None
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / ".checkpoint-3.tmp").mkdir()
    (tmp_path / "checkpoint-7").write_text("a file")
    assert checkpoint.newest_valid(tmp_path) is None


# Which ones are kept


def test_the_lowest_numbers_go_first(tmp_path):
    (tmp_path / "checkpoint-8-copy").mkdir()
    (tmp_path / ".checkpoint-3.tmp").mkdir()
    for step in (8, 9, 100, 101):
        save_step(tmp_path, step, total_limit=3)
    assert names_in(tmp_path) == ["checkpoint-100", "checkpoint-101", "checkpoint-8-copy", "checkpoint-9"]
    save_step(tmp_path, 102, total_limit=0)
    assert len(names_in(tmp_path)) == 5


def test_the_new_one_stays_whatever_its_number(tmp_path):
    for step in (100, 200, 300):
        save_step(tmp_path, step)
    save_step(tmp_path, 150, total_limit=2)
    assert names_in(tmp_path) == ["checkpoint-100", "checkpoint-150"]
    save_step(tmp_path, 150, total_limit=1)
    assert names_in(tmp_path) == ["checkpoint-150"]
    assert_holds(checkpoint.newest_valid(tmp_path), 150)


# Death and full disks


def files_under(folder):
    return {path.stat().st_ino: path for path in folder.rglob("*") if path.is_file()}


def save_and_die(folder, step, fatal):
    """Save; be killed before the `fatal`-th change of the file system, with unsynced bytes lost as by a power cut."""
    calls, safe, fsync = 0, set(files_under(folder)), os.fsync

    def deadly(function):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == fatal:
                for inode, path in files_under(folder).items():
                    if inode not in safe:
                        os.truncate(path, path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            if function is fsync:
                safe.add(os.fstat(args[0]).st_ino)
            return function(*args, **kwargs)

        return call

    for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
        setattr(os, name, deadly(getattr(os, name)))
    shards.save_file = deadly(shards.save_file)
    save_step(folder, step, total_limit=2)


@pytest.mark.slow
@pytest.mark.parametrize("step, before", [(30, (10, 20)), (1, (1,))])
def test_killed_at_any_point_nothing_is_lost(tmp_path, step, before):
    for fatal in range(1, 100):
        folder = tmp_path / str(fatal)
        for earlier in before:
            save_step(folder, earlier)
        child = FORKS.Process(target=save_and_die, args=(folder, step, fatal))
        child.start()
        child.join(60)
        assert child.exitcode in (0, -signal.SIGKILL)
        checkpoint.tidy(folder)
        assert not [name for name in names_in(folder) if name.startswith(".")]
        newest = checkpoint.newest_valid(folder)
        assert newest is not None, f"killed before call {fatal}"
        assert newest.name in (f"checkpoint-{before[-1]}", f"checkpoint-{step}")
        assert all(checkpoint_folders.fault(path) is None for path in folder.glob("checkpoint-*"))
        assert_holds(newest, int(newest.name.removeprefix("checkpoint-")))
        save_step(folder, step, total_limit=2)
        kept = sorted({*before, step})[-2:]
        assert names_in(folder) == [f"checkpoint-{kept_step}" for kept_step in kept]
        assert_holds(checkpoint.newest_valid(folder), step)
        if child.exitcode == 0:
            break
    assert fatal > 10 and child.exitcode == 0


def test_a_save_after_a_broken_replacement_puts_the_old_one_back(tmp_path):
    save_step(tmp_path, 1).rename(tmp_path / ".checkpoint-1.replaced")
    save_step(tmp_path, 2)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2"]
    assert_holds(tmp_path / "checkpoint-1", 1)


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    rename = os.rename

    def failing(source, target):
        if source.name.endswith(".tmp"):
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="No space left"):
        save_step(tmp_path, 1)
    assert names_in(tmp_path) == ["checkpoint-1"]
    assert_holds(tmp_path / "checkpoint-1", 1)


def test_everything_is_synced_before_the_name_and_the_name_after(tmp_path, monkeypatch):
    calls, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "rename", lambda *paths: (calls.append("rename"), rename(*paths)))
    path = save_step(tmp_path, 1)
    temporary = tmp_path / ".checkpoint-1.tmp"
    assert {os.path.basename(call) for call in calls[:3]} == set(names_in(path))
    assert calls[3:] == [str(temporary), "rename", str(tmp_path)]


def save_with_little_room(folder, room):
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    try:
        checkpoint.save(folder, 2, groups={"model": tensors_of(2)}, state={"long": "x" * 1000})
    except OSError as error:
        sys.exit(0 if "File too large" in str(error) else 2)
    sys.exit(1)


@pytest.mark.slow
@pytest.mark.parametrize("room", [10, 700])
def test_a_full_disk_is_an_error_that_leaves_nothing_behind(tmp_path, room):
    assert (save_step(tmp_path, 1) / "model-00000-of-00001.safetensors").stat().st_size < 700
    child = FORKS.Process(target=save_with_little_room, args=(tmp_path, room))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    assert names_in(tmp_path) == ["checkpoint-1"]
    assert_holds(checkpoint.newest_valid(tmp_path), 1)
