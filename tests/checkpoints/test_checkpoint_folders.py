"""Which folders are checkpoints of ours, whole or damaged, and what happens to the others."""

import json
import os
import shutil

import pytest
import torch
from checkpoint_cases import flip_a_bit, names_in, save_step

from fastvid.checkpoints import checkpoint
from fastvid.checkpoints import folders as checkpoint_folders

SHARD = "model-00000-of-00001.safetensors"


def foreign(folder, step):
    """As Hugging Face's Trainer leaves it."""
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    for name in ("trainer_state.json", "model-00001-of-00002.safetensors", "optimizer.pt"):
        (path / name).write_text("{}")
    return path


def save_of_run(folder, step, run):
    return checkpoint.save(
        folder,
        step,
        groups={"model": {"a": torch.ones(3)}, "optimizer": {"b": torch.ones(3)}},
        state={"step": step, "run": run},
    )


# What others wrote


def test_what_others_wrote_is_told_and_never_removed(tmp_path, caplog):
    theirs = [foreign(tmp_path, step) for step in (1, 3000)]
    assert checkpoint.newest_valid(tmp_path) is None
    assert "checkpoint-3000, checkpoint-1 in" in caplog.text and "not written by fastvid" in caplog.text
    for step in (2, 4, 6):
        save_step(tmp_path, step, total_limit=2)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-3000", "checkpoint-4", "checkpoint-6"]
    assert [len(list(path.iterdir())) for path in theirs] == [3, 3]
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-6"


def test_what_others_wrote_does_not_count(tmp_path):
    foreign(tmp_path, 3)
    for step in (2, 4, 5):
        save_step(tmp_path, step, total_limit=3)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-3", "checkpoint-4", "checkpoint-5"]


@pytest.mark.parametrize("kind", ["foreign", "file", "pipe", "dead link", "folder"])
def test_what_is_in_the_way_of_a_save_stays(tmp_path, kind):
    path = tmp_path / "checkpoint-2"
    make = {
        "foreign": lambda: foreign(tmp_path, 2),
        "file": lambda: path.write_text("notes"),
        "pipe": lambda: os.mkfifo(path),
        "dead link": lambda: path.symlink_to(tmp_path / "unmounted"),
        "folder": path.mkdir,
    }[kind]
    make()
    save_step(tmp_path, 2)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-2.aside-1"]
    shutil.rmtree(path)
    make()
    save_step(tmp_path, 2)
    assert names_in(tmp_path) == ["checkpoint-2", "checkpoint-2.aside-1", "checkpoint-2.aside-2"]


# Damage


def test_damaged_ones_alone_are_an_error_that_names_each(tmp_path):
    flip_a_bit(save_step(tmp_path, 5) / SHARD)
    os.unlink(save_step(tmp_path, 10) / "checksums.json")
    with pytest.raises(
        ValueError,
        match=f"checkpoint-10 is damaged: .*checksums.json is missing.*checkpoint-5 is damaged: the sha256 of {SHARD}",
    ):
        checkpoint.newest_valid(tmp_path)


@pytest.mark.parametrize("name", [SHARD, "state.json", "checksums.json"])
@pytest.mark.parametrize("other", ["pipe", "device", "folder", "dead link"])
def test_only_regular_files_are_opened(tmp_path, name, other):
    save_step(tmp_path, 5)
    path = save_step(tmp_path, 10) / name
    path.unlink()
    {
        "pipe": lambda: os.mkfifo(path),
        "device": lambda: path.symlink_to("/dev/zero"),
        "folder": path.mkdir,
        "dead link": lambda: path.symlink_to("nowhere"),
    }[other]()
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-5"
    with pytest.raises(ValueError, match=f"checkpoint-10 is damaged: .*{name}"):
        checkpoint.named(tmp_path / "checkpoint-10")


def test_a_pipe_of_the_right_size_is_not_opened(tmp_path):
    path = save_step(tmp_path, 5)
    checksums = json.loads((path / "checksums.json").read_text())
    checksums["files"]["empty"] = {"bytes": 0, "sha256": ""}
    (path / "checksums.json").write_text(json.dumps(checksums))
    os.mkfifo(path / "empty")
    assert checkpoint_folders.fault(path) == "empty is no regular file"


@pytest.mark.parametrize("kind", ["pipe", "dead link", "empty folder"])
def test_no_checkpoint_in_its_place(tmp_path, kind):
    save_step(tmp_path, 5)
    path = tmp_path / "checkpoint-10"
    {"pipe": lambda: os.mkfifo(path), "dead link": lambda: path.symlink_to("unmounted"), "empty folder": path.mkdir}[
        kind
    ]()
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-5"
    shutil.rmtree(tmp_path / "checkpoint-5")
    if kind != "pipe":  # it may be all that is left of one
        with pytest.raises(ValueError, match="checkpoint-10 is damaged"):
            checkpoint.newest_valid(tmp_path)


def test_retention_neither_counts_nor_removes_damaged_ones(tmp_path):
    flip_a_bit(save_step(tmp_path, 1) / SHARD)
    os.truncate(save_step(tmp_path, 2) / SHARD, 9)
    for step in (3, 4, 5):
        save_step(tmp_path, step, total_limit=2)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-5"]


def test_a_damaged_one_of_the_same_step_is_set_aside(tmp_path, caplog):
    flip_a_bit(save_step(tmp_path, 4) / SHARD)
    save_step(tmp_path, 4, total_limit=1)
    assert names_in(tmp_path) == ["checkpoint-4", "checkpoint-4.aside-1"]
    assert checkpoint_folders.fault(tmp_path / "checkpoint-4") is None
    assert "sha256" in checkpoint_folders.fault(tmp_path / "checkpoint-4.aside-1")
    assert "checkpoint-4.aside-1" in caplog.text


def test_a_link_to_a_checkpoint_is_not_removed(tmp_path):
    save_step(tmp_path / "disk", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "checkpoint-1").symlink_to(tmp_path / "disk" / "checkpoint-1")
    assert checkpoint.newest_valid(tmp_path / "out").name == "checkpoint-1"
    save_step(tmp_path / "out", 2, total_limit=1)
    assert names_in(tmp_path / "out") == ["checkpoint-1", "checkpoint-2"]


# Two runs


@pytest.mark.parametrize("other", [("b", 4), ("a", 2)], ids=["run", "step"])
@pytest.mark.parametrize("name", [SHARD, "optimizer-00000-of-00001.safetensors", "state.json"])
def test_a_checkpoint_of_two_runs_or_steps_is_not_valid(tmp_path, other, name):
    path, second = save_of_run(tmp_path / "a", 4, "a"), save_of_run(tmp_path / "b", other[1], other[0])
    assert checkpoint_folders.fault(path) is None
    shutil.copy(second / name, path / name)
    checksums = json.loads((path / "checksums.json").read_text())
    checksums["files"][name] = checkpoint_folders.measure(path / name)
    (path / "checksums.json").write_text(json.dumps(checksums))
    assert "are of two runs or steps" in checkpoint_folders.fault(path)


def test_an_older_one_has_no_marks(tmp_path):
    path = checkpoint.save(tmp_path, 4, groups={"model": {"a": torch.ones(3)}}, state={"step": 4})
    assert checkpoint_folders.fault(path) is None


# Named ones


def test_a_named_one_is_verified(tmp_path):
    path = save_step(tmp_path, 5)
    assert checkpoint.named(path) == checkpoint.named(tmp_path) == path
    assert checkpoint.named(tmp_path / "missing") is checkpoint.named(path / SHARD) is None
    assert checkpoint.named(foreign(tmp_path / "theirs", 3)) is None
    os.unlink(path / "checksums.json")
    with pytest.raises(ValueError, match="checkpoint-5 is damaged: .*checksums.json is missing.*restore"):
        checkpoint.named(path)
    with pytest.raises(ValueError, match="checkpoint-5 is damaged.*restore one"):
        checkpoint.named(tmp_path)


def test_looking_changes_nothing(tmp_path):
    """A run may be writing there."""
    save_step(tmp_path, 1)
    (tmp_path / ".checkpoint-2.tmp").mkdir()
    save_step(tmp_path, 3).rename(tmp_path / ".checkpoint-3.replaced")
    before = names_in(tmp_path)
    assert checkpoint.newest_valid(tmp_path).name == "checkpoint-1"
    assert names_in(tmp_path) == before
    checkpoint.tidy(tmp_path)
    assert names_in(tmp_path) == ["checkpoint-1", "checkpoint-3"]


@pytest.mark.parametrize("read", [checkpoint_folders.measure, lambda path: checkpoint.read_state(path.parent)])
def test_a_read_that_fails_names_the_file(tmp_path, read):
    path = tmp_path / "state.json"
    path.symlink_to("/proc/self/mem")
    with pytest.raises(OSError, match=f"Input/output error: '{path}'"):
        read(path)


def test_a_tensor_file_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    def fails(path, framework):
        raise OSError("Input/output error (os error 5)")

    save_step(tmp_path, 1)
    monkeypatch.setattr(checkpoint_folders, "safe_open", fails)
    assert checkpoint_folders.fault(tmp_path / "checkpoint-1").startswith(
        "model-00000-of-00001.safetensors cannot be read (Input/"
    )
