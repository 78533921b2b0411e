"""The manifest survives crashes and several writers."""

import errno
import json
import os
import threading
import time

import pytest
from forks import FORKS

from fastvid.features import manifest as manifests
from fastvid.features.manifest import Manifest, read_manifest
from fastvid.video.leases import Leases


def test_lines_and_entries(tmp_path):
    assert read_manifest(tmp_path) == {}
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.append("a.mp4", "failed", reason="no", seconds=1.5)
    manifest.append("b/ü.mp4", "ok", frames=7, seconds=2.0, num_frames=4)
    manifest.append("a.mp4", "ok", frames=9)
    lines = [json.loads(line) for line in manifest.path.read_text().splitlines()]  # on the disk before it is closed
    manifest.close()
    assert abs(lines[0].pop("time") - time.time()) < 60
    assert lines[0] == {"video": "a.mp4", "status": "failed", "reason": "no", "frames": None, "seconds": 1.5}
    assert lines[1]["video"] == "b/ü.mp4" and lines[1]["frames"] == 7 and lines[1]["num_frames"] == 4
    assert read_manifest(tmp_path) == {"a.mp4": lines[2], "b/ü.mp4": lines[1]} == manifest.entries


def test_torn_lines(tmp_path):
    whole = b'{"video": "a.mp4", "status": "ok"}\n'
    for torn in (b'{"video": "b.mp4", "sta', b"{", b'"b.mp4"', b'{"status": "ok"}', b"3", b"\0\0\0", b"\xff\xfe"):
        (tmp_path / "manifest.jsonl").write_bytes(whole + torn)
        assert list(read_manifest(tmp_path)) == ["a.mp4"]
        manifest = Manifest(tmp_path)
        manifest.open()
        manifest.append("c.mp4", "ok")
        manifest.close()
        assert list(read_manifest(tmp_path)) == ["a.mp4", "c.mp4"]


def test_a_full_disk_is_told_by_name(tmp_path):
    manifest = Manifest(tmp_path)
    manifest.close()
    manifest._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match=f"No space left on device: '{manifest.path}'"):
        manifest.append("a.mp4", "ok")
    manifest.close()


def _write(folder, writer):
    leases, manifest = Leases(folder), Manifest(folder)
    leases.open()
    manifest.open(leases)
    for i in range(200):
        manifest.append(f"{writer}-{i}", "ok", reason="x" * 50)
    if writer:  # the first one is killed, as far as its files tell
        manifest.close()
        leases.close()


@pytest.mark.slow
def test_several_writers(tmp_path):
    writers = [FORKS.Process(target=_write, args=(tmp_path, i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(read_manifest(tmp_path)) == 600
    leases, manifest = Leases(tmp_path), Manifest(tmp_path)
    leases.open()
    manifest.open(leases)
    assert len((tmp_path / "manifest.jsonl").read_bytes().splitlines()) == 600
    manifest.close()
    leases.close()
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.jsonl"]


def _opened(folder):
    leases, manifest = Leases(folder), Manifest(folder)
    leases.open()
    manifest.open(leases)
    return leases, manifest


def test_two_at_a_time_have_a_file_each_and_are_read_as_one(tmp_path):
    (_, one), (other_leases, other) = _opened(tmp_path), _opened(tmp_path)
    assert one.path.name == "manifest.jsonl" and other.path.name == f"manifest-{other_leases.owner}.jsonl"
    other.append("a.mp4", "failed", reason="no")
    one.append("a.mp4", "ok", file="a.safetensors")
    other.append("b.mp4", "failed", reason="no")
    assert one.entries["a.mp4"]["status"] == "ok" and "b.mp4" not in one.entries
    assert one.look_again() and not one.look_again() and one.failed_elsewhere == {"b.mp4"}
    assert {name: entry["status"] for name, entry in read_manifest(tmp_path).items()} == {
        "a.mp4": "ok",
        "b.mp4": "failed",
    }
    one.close()
    other.append("a.mp4", "failed", reason="no, again")
    assert len(list(tmp_path.glob("manifest-*"))) == 1
    other.close()
    assert [path.name for path in tmp_path.glob("manifest*")] == ["manifest.jsonl"]
    assert read_manifest(tmp_path)["a.mp4"]["reason"] == "no, again"


def test_a_common_file_that_was_made_since_is_read(tmp_path):
    """Of two that begin at the same time, one may look for manifests before the other has made its own."""
    early = Manifest(tmp_path)
    (_, first), leases = _opened(tmp_path), Leases(tmp_path)
    leases.open()
    early.open(leases)
    first.append("a.mp4", "writing", file="a.pkl")
    assert early.look_again() and early.files["a.pkl"]["status"] == "writing"


@pytest.mark.parametrize("begins", [False, True])
def test_lines_that_are_moved_while_others_look_are_seen(tmp_path, monkeypatch, begins):
    """The common file is read last: until then the lines may move to it."""
    (_, first), (leases, own), (_, third) = _opened(tmp_path), _opened(tmp_path), _opened(tmp_path)
    own.append("a.mp4", "ok")
    third.look_again()
    own.append("b.mp4", "ok")
    leases.close()  # as if it had died
    monkeypatch.setattr(manifests, "_entries", _after_the_first(manifests._entries, first._gather))
    if begins:
        third = Manifest(tmp_path)
    else:
        third.look_again()
    assert list(third.entries) == ["a.mp4", "b.mp4"]


def _after_the_first(function, action):
    """A function that does `action` once the first of its calls has returned, so between two files."""
    calls = []

    def called(*arguments):
        found = function(*arguments)
        if not calls:
            calls.append(arguments)
            action()
        return found

    return called


def test_a_common_file_that_is_made_between_the_listing_and_the_reading_is_read(tmp_path, monkeypatch):
    (first_leases, _), (own_leases, own) = _opened(tmp_path), _opened(tmp_path)
    own.append("a.mp4", "ok")
    own_leases.close()  # as if both had died, the first before it wrote anything
    first_leases.close()
    (tmp_path / "manifest.jsonl").unlink()
    listed = os.listdir

    def then_gathered(folder):
        names = listed(folder)
        monkeypatch.setattr(os, "listdir", listed)
        _opened(tmp_path)
        return names

    monkeypatch.setattr(os, "listdir", then_gathered)
    assert list(Manifest(tmp_path).entries) == ["a.mp4"] and not list(tmp_path.glob("manifest-*"))


def test_what_failed_before_is_no_news(tmp_path):
    _, one = _opened(tmp_path)
    _, other = _opened(tmp_path)
    other.append("a.mp4", "failed", reason="no")
    _, third = _opened(tmp_path)
    assert third.entries["a.mp4"]["status"] == "failed" and third.failed_elsewhere == set()
    one.close()
    other.close()  # moves its line to the common file
    third.look_again(for_new=True)
    assert third.failed_elsewhere == set()


def test_entries_of_older_versions_are_the_oldest(tmp_path):
    old = {"video": "a.mp4", "status": "failed"}
    (tmp_path / "manifest.jsonl").write_text(json.dumps(old) + "\n")
    (tmp_path / "manifest-gone.jsonl").write_text(json.dumps({"video": "a.mp4", "status": "ok", "time": 1.0}) + "\n")
    assert read_manifest(tmp_path)["a.mp4"]["status"] == "ok"
    _, manifest = _opened(tmp_path)
    assert not list(tmp_path.glob("manifest-*")) and manifest.entries["a.mp4"]["status"] == "ok"
    manifest.close()


@pytest.mark.parametrize("moment", ["before a write", "while it is read"])
def test_one_that_was_taken_for_dead_loses_no_line(tmp_path, monkeypatch, moment):
    """Another process moves its lines and removes its file; it goes on, and so does a third one that reads it."""
    (_, first), (slow_leases, slow), (_, third) = _opened(tmp_path), _opened(tmp_path), _opened(tmp_path)
    slow.append("a.mp4", "ok")
    third.look_again()
    unlink = type(slow.path).unlink

    def late(path, **options):
        if moment == "while it is read" and path.name.startswith("manifest-"):
            slow.append("b.mp4", "ok")
        unlink(path, **options)

    with monkeypatch.context() as patch:
        lives = Leases.lives
        patch.setattr(Leases, "lives", lambda self, owner: owner != slow_leases.owner and lives(self, owner))
        patch.setattr(type(slow.path), "unlink", late)
        first.close()
    if moment == "before a write":
        slow.append("b.mp4", "ok")
    slow.append("c.mp4", "failed", reason="no")
    third.look_again(for_new=True)
    assert third.entries.keys() == {"a.mp4", "b.mp4", "c.mp4"} and third.failed_elsewhere == {"c.mp4"}
    slow.close()
    third.close()
    assert [path.name for path in tmp_path.glob("manifest*")] == ["manifest.jsonl"]
    assert read_manifest(tmp_path).keys() == {"a.mp4", "b.mp4", "c.mp4"}


def test_a_file_that_was_made_anew_is_read_from_its_beginning(tmp_path):
    (_, one), (_, other) = _opened(tmp_path), _opened(tmp_path)
    for number in range(3):
        other.append(f"{number}.mp4", "ok")
    one.look_again()
    other.path.unlink()
    other.append("a.mp4", "ok", reason="x" * 1000)
    assert one.look_again() and "a.mp4" in one.entries


def test_a_stale_handle_is_replaced(tmp_path, monkeypatch):
    (_, one), write = _opened(tmp_path), os.write
    stale = one._file

    def on_a_stale_one(file, content):
        if file == stale:
            raise OSError(errno.ESTALE, "Stale file handle")
        return write(file, content)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", on_a_stale_one)
        patch.setattr(os, "close", lambda file: None)  # its number is not used again meanwhile
        one.append("a.mp4", "failed", reason="no")
    assert read_manifest(tmp_path).keys() == {"a.mp4"}

    def always(file, content):
        raise OSError(errno.ESTALE, "Stale file handle")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Stale file handle"):
        patch.setattr(os, "write", always)
        one.append("a.mp4", "ok")


@pytest.mark.slow
def test_two_never_append_to_one_file(tmp_path, monkeypatch):
    """The holder of the common file is taken for dead, and its lease goes to another process."""
    slow_leases, slow = _opened(tmp_path)
    with monkeypatch.context() as patch:
        lives = Leases._lives
        patch.setattr(
            Leases,
            "_lives",
            lambda self, record, path: (record or {}).get("owner") != slow_leases.owner and lives(self, record, path),
        )
        heir_leases, heir = _opened(tmp_path)
        assert heir.path == slow.path == tmp_path / "manifest.jsonl"
    slow.append("a.mp4", "ok")
    heir.append("b.mp4", "ok")
    assert slow.path.name == f"manifest-{slow_leases.owner}.jsonl" and heir.path.name == "manifest.jsonl"
    assert slow.path.read_text().count("\n") == heir.path.read_text().count("\n") == 1
    slow.close()
    heir.close()
    slow_leases.close()
    heir_leases.close()
    assert read_manifest(tmp_path).keys() == {"a.mp4", "b.mp4"}


@pytest.mark.slow
def test_closing_releases_the_common_file_only_if_it_is_kept(tmp_path, monkeypatch):
    slow_leases, slow = _opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "_lives", lambda self, record, path: (record or {}).get("owner") != slow_leases.owner)
        heir_leases, heir = _opened(tmp_path)
    slow.close()
    assert heir_leases.keeps("manifest.jsonl")
    monkeypatch.setattr(heir, "_gather", lambda: heir_leases.release("manifest.jsonl"))  # it is lost only now
    heir.close()


def test_one_that_ends_as_another_does_leaves_no_file_behind(tmp_path):
    """It waits a moment for the common file, which the other one may not give back before it is gone."""
    (first_leases, first), (second_leases, second) = _opened(tmp_path), _opened(tmp_path)
    second.append("a.mp4", "ok")
    given_back = threading.Timer(0.2, first_leases.release, [first.path.name])
    given_back.start()
    second.close()
    given_back.join()
    assert [path.name for path in tmp_path.glob("manifest*")] == ["manifest.jsonl"]
    assert list(read_manifest(tmp_path)) == ["a.mp4"]
    for leases in (first_leases, second_leases):
        leases.close()


def _line(video, status, when, **more):
    return json.dumps({"video": video, "status": status, **({} if when is None else {"time": when}), **more}) + "\n"


def test_the_newest_entry_wins_wherever_it_stands(tmp_path):
    (tmp_path / "manifest.jsonl").write_text(
        _line("a.mp4", "ok", 3.0, file="a.pkl")
        + _line("a.mp4", "failed", 2.0, file="a.pkl")
        + _line("old.mp4", "failed", None)
        + _line("old.mp4", "ok", None)
        + _line("b.mp4", "failed", 5.0)
        + _line("b.mp4", "ok", 5.0)
    )
    entries = read_manifest(tmp_path)
    assert {name: entry["status"] for name, entry in entries.items()} == {"a.mp4": "ok", "old.mp4": "ok", "b.mp4": "ok"}
    assert Manifest(tmp_path).files["a.pkl"]["time"] == 3.0
    manifest = Manifest(tmp_path)
    (tmp_path / "manifest-late.jsonl").write_text(_line("a.mp4", "failed", 2.5) + _line("b.mp4", "failed", 6.0))
    manifest.look_again(for_new=True)
    assert manifest.entries["a.mp4"]["status"] == "ok" and manifest.failed_elsewhere == {"b.mp4"}


def test_what_is_written_about_a_known_entry_is_newer_than_it(tmp_path):
    """Another machine's clock may be ahead of this one's."""
    ahead = time.time() + 1000
    (tmp_path / "manifest.jsonl").write_text(_line("a.mp4", "failed", ahead))
    manifest = Manifest(tmp_path)
    manifest.open()
    manifest.append("a.mp4", "ok")
    manifest.append("b.mp4", "ok")
    manifest.close()
    entries = read_manifest(tmp_path)
    assert entries["a.mp4"]["status"] == "ok" and ahead < entries["a.mp4"]["time"] < ahead + 1
    assert entries["b.mp4"]["time"] < ahead
