"""Atomic writing: after whatever happens a name leads to the old file or to the whole new one."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from fastvid.dist import processes
from fastvid.files import (
    atomic_file,
    atomic_folder,
    atomic_path,
    naming,
    read_json_object,
    remove_left_over,
    shown,
    write_json,
    wrong_content,
)


def test_a_written_file_replaces_the_old_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with atomic_file(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as file:
        file.write(b"ne")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_a_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys\nfrom fastvid.files import atomic_file\n"
        "with atomic_file(sys.argv[1]) as file:\n"
        "    file.write(b'ne'); file.flush(); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(path)], cwd=ROOT, check=False).returncode == -9
    assert path.read_bytes() == b"old"


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    steps = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(("sync", os.fstat(fd).st_size)), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda *names: (steps.append("rename"), replace(*names)))
    with atomic_file(tmp_path / "a") as file:
        file.write(b"new")
    assert steps == [("sync", 3), "rename"]


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with atomic_file(tmp_path / "a") as file:
            file.write(b"new")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


def test_the_longest_name_that_a_file_may_have(tmp_path):
    with atomic_file(tmp_path / ("x" * 255)) as file:
        file.write(b"new")
    assert (tmp_path / ("x" * 255)).read_bytes() == b"new"


def test_a_link_stays_and_its_target_is_replaced(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "target").write_bytes(b"old")
    (tmp_path / "link").symlink_to("inner/target")
    with atomic_file(tmp_path / "link") as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "inner" / "target").read_bytes() == b"new"


def test_a_pipe_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with atomic_file(tmp_path / "pipe") as file:
        file.write(b"new")
    assert os.read(reader, 10) == b"new"
    os.close(reader)
    assert (tmp_path / "pipe").is_fifo()


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="absent does not exist; create it"), atomic_file(tmp_path / "absent" / "a"):
        pass


def test_json_objects_are_read_missing_or_named(tmp_path):
    path = tmp_path / "config.json"
    assert read_json_object(path) == {}
    path.write_text('{"a": 1}')
    assert read_json_object(path) == {"a": 1}
    for text in ("[1]", "{", "3"):
        path.write_text(text)
        with pytest.raises(ValueError, match="config.json is no JSON object"):
            read_json_object(path)


@pytest.mark.parametrize(
    "content, said",
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"\x1f\x8b\x08\x00rest", "gunzip"),
        (b"\n<!DOCTYPE html><html>", "web page"),
        (b"", "is empty"),
    ],
)
def test_what_is_not_the_file_is_named(tmp_path, content, said):
    (tmp_path / "a").write_bytes(content)
    assert said in wrong_content(tmp_path / "a")


def test_other_content_is_not_judged(tmp_path):
    (tmp_path / "a").write_bytes(b"[]")
    assert wrong_content(tmp_path / "a") is None


def test_a_pipe_gets_nothing_after_an_error(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    with pytest.raises(ValueError, match="refused"), atomic_file(tmp_path / "pipe") as file:
        file.write(b"[{}")
        file.flush()
        raise ValueError("refused")
    assert os.read(reader, 10) == b""  # its end, not a part
    os.close(reader)


def test_pipes_and_folders_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "pipe" in wrong_content(tmp_path / "pipe")
    assert "folder" in wrong_content(tmp_path)
    assert "No such file" in wrong_content(tmp_path / "absent")


def test_odd_names_are_shown_escaped():
    assert shown("a b.mp4") == "a b.mp4"
    assert shown("a\x1b[31m\n") == r"'a\x1b[31m\n'"


KILLED = """
import os, signal, sys
from fastvid.files import atomic_file
with atomic_file(sys.argv[1]) as file:
    file.write(b"part")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    (tmp_path / "sub").mkdir()
    subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "sub" / "a.safetensors")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    [left] = (tmp_path / "sub").iterdir()
    assert re.fullmatch(r"\.[0-9a-f]{8}-\d+-[0-9a-f]{8}\.tmp", left.name)
    here, me = processes.machine(), os.getpid()
    kept = [f".{here}-{me}-00000000.tmp", f".00000000-{2**22 + 5}-00000000.tmp", ".0123456789abcdef.tmp", ".notes.tmp"]
    for name in [*kept, ".0123456789abcde0.tmp"]:
        (tmp_path / name).write_text("")
    os.utime(tmp_path / ".0123456789abcde0.tmp", (0, 0))  # of years ago, and of a version that named no process
    remove_left_over(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, "sub"])
    assert list((tmp_path / "sub").iterdir()) == []


def test_a_write_that_fails_names_its_file(tmp_path):
    with (
        pytest.raises(OSError, match=r"\[Errno 28\] No space left on device: '.*b.json'"),
        atomic_file(tmp_path / "b.json"),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(OSError, match="^its own words$"), naming("a"):
        raise OSError("its own words")
    with pytest.raises(FileNotFoundError, match="'other'"), naming("a"):
        open("other")


def test_json_that_does_not_fit_is_told_by_name():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write_json(Path("/dev/full"), {})


@pytest.mark.parametrize("fails", [False, True])
def test_a_path_for_libraries_leaves_one_whole_file(tmp_path, fails):
    path = tmp_path / "a"
    path.write_bytes(b"old")
    (tmp_path / ".a.tmp").symlink_to("/dev/zero")  # whatever lies in the way is not opened
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext(), atomic_path(path) as temporary:
        temporary.with_name("another").touch()
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
        if fails:
            raise KeyboardInterrupt
    assert path.read_bytes() == (b"old" if fails else b"new") and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("fails", [False, True])
def test_a_folder_is_replaced_whole(tmp_path, fails):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "old").touch()
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext(), atomic_folder(folder) as temporary:
        (temporary / "new").touch()
        assert os.listdir(folder) == ["old"]
        if fails:
            raise KeyboardInterrupt
    assert os.listdir(folder) == ["old" if fails else "new"] and os.listdir(tmp_path) == ["a"]
