"""A video has one owner at a time, and the dead own nothing."""

import errno
import json
import os
import random
import signal
import time

import pytest
from forks import FORKS

from fastvid.dist import processes
from fastvid.video import leases as module
from fastvid.video.leases import NAME, Leases


@pytest.fixture
def opened(tmp_path):
    """Makes leases that are open in one folder; the first ones' files stay where nobody closes them."""
    made = []

    def make():
        made.append(Leases(tmp_path))
        made[-1].open()
        return made[-1]

    yield make
    for each in made:
        each.close()


def _of_another(monkeypatch, leases):
    """Have what `leases` wrote be another machine's: its process numbers mean nothing here."""
    record = json.loads(leases._own.read_text())
    leases._own.write_text(json.dumps({**record, "machine": "elsewhere"}))


def _die_holding(folder, *names):
    leases = Leases(folder)
    leases.open()
    assert all(leases.take(name) for name in names)
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_one_that_holds(folder, *names):
    process = FORKS.Process(target=_die_holding, args=(folder, *names))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def test_one_has_it_until_it_is_given_back(opened, tmp_path):
    one, other = opened(), opened()
    assert one.take("sub/a.mp4") and not other.take("sub/a.mp4") and other.take("b.mp4")
    one.release("sub/a.mp4")
    assert other.take("sub/a.mp4") and not one.take("sub/a.mp4")
    assert one.owners() == sorted([one.owner, other.owner]) and other.lives(one.owner)
    one.close()
    assert not other.lives(one.owner)
    other.close()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_dead_own_nothing(opened, tmp_path):
    one = opened()
    for _ in range(3):  # the second and the third take it over from the one before
        _kill_one_that_holds(tmp_path, "a.mp4")
    assert one.take("a.mp4") and not opened().take("a.mp4")
    one.release("a.mp4")
    one.close()
    assert opened().take("a.mp4")


@pytest.mark.slow
def test_what_the_dead_left_is_removed(opened, tmp_path):
    one = opened()
    _kill_one_that_holds(tmp_path, "a.mp4", "b.mp4")
    assert len(os.listdir(tmp_path / NAME)) == 1 + 3
    one.close()
    assert list(tmp_path.iterdir()) == []
    _kill_one_that_holds(tmp_path, "a.mp4")
    opened()
    assert len(os.listdir(tmp_path / NAME)) == 1


def test_another_machines_process_lives_while_it_shows_it(opened, tmp_path, monkeypatch):
    far, one = opened(), opened()
    assert far.take("a.mp4")
    _of_another(monkeypatch, far)
    assert not one.take("a.mp4") and one.lives(far.owner)
    late = time.time() - module.SILENCE - 1
    os.utime(far._own, (late, late))
    assert one.take("a.mp4") and not one.lives(far.owner)
    far.release("a.mp4")  # it was only slow, and takes nothing from its heir
    assert not opened().take("a.mp4")


def test_a_process_shows_that_it_lives(opened, monkeypatch):
    monkeypatch.setattr(module, "EVERY", 0.02)
    one = opened()
    os.utime(one._own, (1, 1))
    for _ in range(500):
        if one._own.stat().st_mtime > 1:
            break
        time.sleep(0.01)
    assert time.time() - one._own.stat().st_mtime < 60


def test_one_that_was_taken_for_dead_goes_on(opened):
    one = opened()
    one._own.unlink()
    assert one.take("a.mp4") and one._own.exists()


def test_file_systems_without_links(opened, tmp_path, monkeypatch):
    def none(source, target):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", none)
    one, other = opened(), opened()
    assert one.take("a.mp4") and not other.take("a.mp4")
    one.release("a.mp4")
    assert other.take("a.mp4")
    other.release("a.mp4")
    torn = one._path(module._digest("b.mp4"), 0)  # as a process leaves it that is killed while it writes
    torn.touch()
    assert not one.take("b.mp4")
    os.utime(torn, (1, 1))
    assert one.take("b.mp4") and not other.take("b.mp4")


@pytest.mark.slow
def test_a_lease_that_began_anew_is_seen(opened, tmp_path, monkeypatch):
    """Between the look at a dead one's lease and the next generation, others took it over, gave it back, began anew."""
    slow, quick = opened(), opened()
    _kill_one_that_holds(tmp_path, "a.mp4")
    lives = Leases._lives

    def meanwhile(self, record, path):
        found = lives(self, record, path)
        if self is slow and not found:
            monkeypatch.setattr(Leases, "_lives", lives)
            assert quick.take("a.mp4")
            quick.release("a.mp4")
            assert quick.take("a.mp4")
        return found

    monkeypatch.setattr(Leases, "_lives", meanwhile)
    assert not slow.take("a.mp4")


@pytest.mark.slow
def test_a_link_whose_reply_was_lost_is_held(opened, monkeypatch):
    """A network file system makes the link, repeats the request, and says that the link exists."""
    one, link = opened(), os.link

    def again(source, target):
        link(source, target)
        link(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", again)
        assert one.take("a.mp4")
    assert one.keeps("a.mp4") and not one.take("a.mp4") and not opened().take("a.mp4")
    one.release("a.mp4")
    assert opened().take("a.mp4")


def test_a_lease_that_was_lost_can_be_had_again(opened, monkeypatch):
    """The heir of one that was only slow gives back nothing, and dies."""
    slow, heir = opened(), opened()
    assert slow.take("a.mp4") and slow.keeps("a.mp4") and not slow.keeps("b.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "_lives", lambda self, record, path: record["owner"] != slow.owner)
        assert heir.take("a.mp4")
    assert not slow.keeps("a.mp4") and not slow.take("a.mp4")
    heir._own.unlink()
    assert slow.take("a.mp4") and slow.keeps("a.mp4") and not heir.keeps("a.mp4")


def test_a_late_release_costs_no_other_its_lease(opened, monkeypatch):
    slow, heir, third = opened(), opened(), opened()
    assert slow.take("a.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(Leases, "_lives", lambda self, record, path: record["owner"] != slow.owner)
        assert heir.take("a.mp4")
    heir.release("a.mp4")
    assert third.take("a.mp4")
    slow.release("a.mp4")
    assert third.keeps("a.mp4") and not heir.take("a.mp4")


def test_an_owner_is_never_seen_without_its_record(opened, tmp_path, monkeypatch):
    one, other, replace, seen = opened(), opened(), os.replace, []

    def looked_at(source, target):
        seen.append(module._record(one._own)["owner"])
        replace(source, target)
        seen.append(module._record(one._own)["owner"])

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", looked_at)
        one._write_own()
    assert seen == [one.owner, one.owner]
    one._own.write_text("")  # a file system may show it so for a while
    assert other.lives(one.owner)
    opened()
    assert one._own.exists()
    os.utime(one._own, (1, 1))
    assert not other.lives(one.owner) and not other.lives("nobody")


def test_closing_that_fails_leaves_no_living_owner(opened, monkeypatch):
    one, other = opened(), opened()
    assert one.take("a.mp4")

    def broken(self, name):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="Input/output"):
        patch.setattr(Leases, "release", broken)
        one.close()
    assert not other.lives(one.owner) and other.take("a.mp4")


def _fight(folder, seed):
    """Take and give back; a file says who works under the lease, and nobody else may be found there alive."""
    chance, leases = random.Random(seed), Leases(folder)
    leases.open()
    end = time.monotonic() + 20
    while time.monotonic() < end:
        name = f"{chance.randrange(3)}"
        if leases.take(name):
            work = folder / f"work-{name}"
            try:
                before = json.loads(work.read_text() or "null")
            except FileNotFoundError:
                before = None
            if before and before[0] != os.getpid() and processes.started(before[0]) == before[1]:
                (folder / "fault").write_text(f"{before} lives")
            work.write_text(json.dumps([os.getpid(), processes.started(os.getpid())]))
            time.sleep(chance.random() / 500)
            work.unlink(missing_ok=True)
            leases.release(name)


@pytest.mark.slow
def test_never_two_live_owners(tmp_path):
    chance, fighters = random.Random(0), []
    end = time.monotonic() + 6
    while time.monotonic() < end:
        while len(fighters) < 4:
            fighters.append(FORKS.Process(target=_fight, args=(tmp_path, chance.random())))
            fighters[-1].start()
        time.sleep(0.2)
        victim = fighters.pop(chance.randrange(4))
        victim.kill()
        victim.join()
    for fighter in fighters:
        fighter.kill()
        fighter.join()
    assert not (tmp_path / "fault").exists()
    last = Leases(tmp_path)
    last.open()
    last.close()
    assert not (tmp_path / NAME).exists()
