"""Who begins with which videos, and with what each goes on."""

import itertools
import os

import pytest

from fastvid.video import dealing
from fastvid.video.dealing import Turns, deal, place
from fastvid.video.listing import Video


def _videos(folder, *sizes):
    """Files of so many MiB, all of them holes."""
    for number, size in enumerate(sizes):
        with open(folder / f"{number}.mp4", "wb") as file:
            file.truncate(size << 20)
    return [Video(folder / f"{number}.mp4", f"{number}.mp4", folder / f"{number}.pkl") for number in range(len(sizes))]


def _names(videos):
    return "".join(video.name[0] for video in videos)


def test_shares_are_of_one_length_and_begin_with_the_longest(tmp_path):
    videos = _videos(tmp_path, 5, 1, 9, 4, 4, 2, 3)
    shares = deal(videos, 2)
    assert [_names(share) for share in shares] == ["245", "0361"]
    assert [_names(share) for share in deal(videos[::-1], 2)] == ["245", "0361"]
    assert [len(share) for share in deal(_videos(tmp_path, *[0] * 8), 3)] == [3, 3, 2]
    assert deal([], 2) == [[], []]


def test_turns(tmp_path, monkeypatch):
    shares = deal(_videos(tmp_path, 6, 5, 4, 3, 2, 1), 3)
    assert [_names(share) for share in shares] == ["05", "14", "23"]
    for rank, order in enumerate(["054132", "143250", "235041"]):
        turns = Turns(shares, rank)
        taken = list(iter(turns.next, None))
        assert _names(video for video, _, _ in taken) == order and not turns.waits
        assert [own for _, own, _ in taken] == [True] * 2 + [False] * 4
    assert _names(video for video, _, _ in iter(Turns(shares, 1, take_over=False).next, None)) == "14"


def test_what_another_has_in_hand_comes_again_after_a_while(tmp_path, monkeypatch):
    clock = itertools.count(10, 0.4)
    monkeypatch.setattr(dealing.time, "monotonic", lambda: next(clock))
    turns = Turns(deal(_videos(tmp_path, 2, 1), 1), 0)
    video, own, first = turns.next()
    assert (own, first) == (True, True)
    turns.defer(video, own)
    assert turns.next()[0].name == "1.mp4"
    assert turns.next() == (video, True, False)
    turns.defer(video, own)
    assert turns.waits and turns.next() is None
    assert next(filter(None, iter(turns.next, "never"))) == (video, True, False)
    assert not turns.waits


@pytest.mark.parametrize("number, pause", [(1, 1.0), (100, 5.0), (1000, 15.0)])
def test_the_more_others_have_the_longer_is_the_pause(tmp_path, monkeypatch, number, pause):
    now = 10.0
    monkeypatch.setattr(dealing.time, "monotonic", lambda: now)
    turns = Turns([[Video(tmp_path / f"{i}", f"{i}", tmp_path / f"{i}.pkl") for i in range(number)]], 0)
    for _ in range(2):  # the second time at once
        for _ in range(number):
            turns.defer(*turns.next()[:2])
    assert turns.waits and not turns.ready and turns.next() is None
    now += pause - 0.1
    assert turns.next() is None
    now += 0.2
    assert len(list(iter(turns.next, None))) == number and not turns.waits


@pytest.mark.parametrize(
    "shard, rank, world, expected",
    [
        (None, None, None, (0, 1)),
        (None, 2, 4, (2, 4)),
        ("1/3", None, None, (0, 3)),
        ("3/3", None, None, (2, 3)),
        ("2/3", 1, 2, (3, 6)),
    ],
)
def test_places(monkeypatch, shard, rank, world, expected):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world)):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, str(value))
    assert place(shard) == expected


@pytest.mark.parametrize("shard", ["0/4", "5/4", "1", "1/0", "-1/4", "a/b", "1/4/2", "", "1.5/4", "/"])
def test_shards_that_cannot_be(shard):
    with pytest.raises(ValueError, match="--shard .* give 1/4 to 4/4 .*SLURM_ARRAY_TASK_ID/4"):
        place(shard)


def test_a_video_that_is_gone_is_dealt_as_well(tmp_path):
    videos = [*_videos(tmp_path, 1), Video(tmp_path / "gone", "gone", tmp_path / "gone.pkl")]
    assert [_names(share) for share in deal(videos, 1)] == ["0g"]
    assert [video.known_size for video in deal(videos, 1)[0]] == [1 << 20, None]


def test_a_known_size_is_asked_for_again_where_it_has_to_be(tmp_path):
    video = deal(_videos(tmp_path, 1), 1)[0][0]
    os.truncate(video.path, 5)
    assert (video.size(), video.size(fresh=True)) == (1 << 20, 5)


def test_shards_as_told_are_all_of_the_work(tmp_path):
    shares = deal(_videos(tmp_path, 3, 2, 4, 1, 5), 4)
    told = [place(f"{task}/4") for task in (1, 2, 3, 4)]
    assert [world for _, world in told] == [4] * 4
    assert sorted("".join(_names(shares[rank]) for rank, _ in told)) == list("01234")


@pytest.mark.parametrize("take_over, before, after", [(True, "01", "32"), (False, "0", "3")])
def test_some_come_before_all(tmp_path, take_over, before, after):
    """Whose share they are in; where that is nobody else's business, only those of the own one."""
    shares = deal(_videos(tmp_path, 4, 3, 2, 1), 2)
    assert [_names(share) for share in shares] == ["03", "12"]
    turns, taken = Turns(shares, 0, take_over, {"0.mp4", "1.mp4"}), []
    while turns.has_first:
        assert turns.ready
        taken.append(turns.next())
    assert _names(video for video, _, _ in taken) == before
    assert [own for _, own, _ in taken] == [True, False][: len(before)]
    assert _names(video for video, _, _ in iter(turns.next, None)) == after and not turns.waits
