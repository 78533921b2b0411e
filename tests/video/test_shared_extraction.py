"""Several processes extract into one folder: they share the work, and may die, join and rejoin at any moment.

``FASTVID_KILLS=50`` has as many processes killed as the full check wants; by default it is a few.
"""

import json
import os
import random
import shutil
import signal
import time
from collections import Counter

import pytest
from clips import draw_many, endless
from forks import FORKS
from ranks import leave
from towers import write_tower
from waiting import LONG, wait_until

from fastvid.config import ExtractConfig
from fastvid.dist.processes import started
from fastvid.extract import extract
from fastvid.features.manifest import read_manifest
from fastvid.video.features import VideoFeatures
from fastvid.video.leases import NAME

KILLS = int(os.environ.get("FASTVID_KILLS", 5))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tower, 40 videos of different lengths, and their features as one process makes them."""
    folder = tmp_path_factory.mktemp("shared")
    write_tower(folder / "tower")
    draw_many(folder / "videos", 40)
    extract(_config(folder, folder / "clean"))
    return folder


def _config(made, features, **options):
    return ExtractConfig(
        str(made / "videos"),
        str(features),
        **{"vision_tower": str(made / "tower"), "num_frames": 6, "device": "cpu", "decode_workers": 1, **options},
    )


def _extract(config, rank, world, log, hold, together):
    """A rank; each video that it begins to decode is a line in `log`, and each takes `hold` seconds longer.

    `together`: how many processes wait for each other with their first one.
    """
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world)}
    prepare = VideoFeatures.prepare

    def noted(self, path, **options):
        with open(log / f"{os.getpid()}", "a") as file:
            file.write(f"{path}\n")
        time.sleep(hold)
        wait_until(lambda: len(list(log.glob("[0-9]*"))) >= together)
        return prepare(self, path, **options)

    VideoFeatures.prepare = noted
    summary = extract(config)
    (log / f"summary-{rank}.json").write_text(json.dumps(vars(summary)))
    leave()


def _start(config, rank, world, log, hold=0.0, together=0):
    log.mkdir(exist_ok=True)
    process = FORKS.Process(target=_extract, args=(config, rank, world, log, hold, together))
    process.start()
    return process


def _decoded(log):
    """How often each video was begun."""
    return Counter(line for path in log.glob("[0-9]*") for line in path.read_text().splitlines())


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def _times(folder):
    found = {}
    for path in folder.rglob("*.safetensors"):
        found[path] = path.stat().st_mtime_ns
    return found


def _check(made, features):
    """All is as one process leaves it."""
    assert _files(features) == _files(made / "clean")
    assert {path.name for path in features.iterdir()} == {path.name for path in (made / "clean").iterdir()}
    assert {entry["status"] for entry in read_manifest(features).values()} <= {"ok", "skipped"}
    assert len(read_manifest(features)) == 40


def _join(*processes):
    for process in processes:
        process.join(LONG)
        assert process.exitcode == 0


@pytest.mark.slow
@pytest.mark.parametrize("options", [[{}, {}], [{"shard": "1/2"}, {"shard": "2/2"}]])
def test_two_runs_on_a_folder_share_the_work(made, tmp_path, options):
    log = tmp_path / "log"
    _join(*[_start(_config(made, tmp_path / "features", **each), 0, 1, log, 0.02, together=2) for each in options])
    _check(made, tmp_path / "features")
    assert set(_decoded(log).values()) == {1} and len(list(log.glob("[0-9]*"))) == 2


@pytest.mark.slow
def test_two_runs_that_write_pickles(made, tmp_path):
    """A pickle does not say itself what it is: the other run's manifest does."""
    features, log = tmp_path / "features", tmp_path / "log"
    config = _config(made, features, format="pkl")
    _join(*[_start(config, 0, 1, log, 0.02, together=2) for _ in range(2)])
    summaries = [json.loads(path.read_text()) for path in log.glob("summary-*")]
    assert set(_decoded(log).values()) == {1} and all(each["failures"] == [] for each in summaries)
    assert extract(config).skipped == len(list(features.rglob("*.pkl"))) == 40


@pytest.mark.slow
def test_the_others_finish_the_share_of_a_rank_that_is_killed(made, tmp_path):
    features, log = tmp_path / "features", tmp_path / "log"
    ranks = [_start(_config(made, features), rank, 3, log, 0.05, together=3) for rank in range(3)]
    wait_until(lambda: len(_times(features)) > 4)
    ranks[1].kill()
    ranks[1].join()
    _join(ranks[0], ranks[2])
    _check(made, features)
    summaries = [json.loads((log / f"summary-{rank}.json").read_text()) for rank in (0, 2)]
    assert sum(each["taken_over"] for each in summaries) > 0
    assert all(each["failures"] == [] for each in summaries)


@pytest.mark.slow
def test_one_that_never_came_is_done_without(made, tmp_path):
    """As a task of a Slurm array that still waits for its node."""
    features = tmp_path / "features"
    summary = extract(_config(made, features, shard="2/3"))
    _check(made, features)
    assert summary.extracted == 40 and 0 < summary.taken_over < 40 and "taken over from other ranks" in str(summary)
    late = extract(_config(made, features, shard="1/3"))
    assert late.extracted == 0 and late.total == late.skipped > 10


@pytest.mark.slow
def test_a_share_alone(made, tmp_path):
    """For those who do not see each other's files."""
    totals = [extract(_config(made, tmp_path / f"{i}", shard=f"{i}/3", take_over=False)).extracted for i in (1, 2, 3)]
    assert sum(totals) == 40 and min(totals) >= 10
    assert {file: content for i in (1, 2, 3) for file, content in _files(tmp_path / f"{i}").items()} == _files(
        made / "clean"
    )


@pytest.mark.slow
def test_a_failure_costs_one_try(made, tmp_path):
    """Whoever comes to a video that another process gave up passes over it."""
    videos, log = tmp_path / "videos", tmp_path / "log"
    shutil.copytree(made / "videos" / "sub", videos)
    endless(videos / "0.mp4")
    (videos / "z.mp4").write_text("no video")
    config = ExtractConfig(
        str(videos),
        str(tmp_path / "features"),
        vision_tower=str(made / "tower"),
        num_frames=6,
        device="cpu",
        decode_workers=1,
        timeout=6.0,
    )
    processes = [_start(config, rank, 2, log) for rank in range(2)]
    for process in processes:
        process.join(LONG)
    assert set(_decoded(log).values()) == {1}
    summaries = [json.loads((log / f"summary-{rank}.json").read_text()) for rank in range(2)]
    assert sorted(name for each in summaries for name, _ in each["failures"]) == ["0.mp4", "z.mp4"]
    assert sum(each["total"] for each in summaries) == 22 and sum(each["extracted"] for each in summaries) == 20
    assert not (tmp_path / "features" / NAME).exists()


@pytest.mark.slow
def test_killed_at_random_moments(made, tmp_path):
    """Four ranks, of which one after the other is killed and comes again; the worst that a kill costs is counted."""
    chance, kills, rounds, worst = random.Random(), 0, 0, 0
    while kills < KILLS:
        rounds += 1
        features, log = tmp_path / f"features-{rounds}", tmp_path / f"log-{rounds}"
        config, before, killed = _config(made, features), {}, 0
        ranks = [_start(config, rank, 4, log, hold=0.03) for rank in range(4)]
        wait_until(lambda: log.exists() and any(log.iterdir()))
        while kills < KILLS and len(_times(features)) < 40:
            time.sleep(chance.random() / 3)
            rank = chance.randrange(4)
            if chance.random() < 0.7:  # most of them at work, some while they start
                wait_until(lambda: (log / f"{ranks[rank].pid}").exists() or ranks[rank].exitcode is not None)
                time.sleep(chance.random() / 3)
            if ranks[rank].exitcode is None:
                ranks[rank].kill()
                ranks[rank].join()
                kills, killed = kills + 1, killed + 1
                now = _times(features)
                assert all(now[path] == when for path, when in before.items()), "a finished video was made again"
                before = now
                ranks[rank] = _start(config, rank, 4, log, hold=0.03)
        _join(*ranks)
        _check(made, features)
        assert all(_times(features)[path] == when for path, when in before.items())
        again = sum(_decoded(log).values()) - 40
        worst = max(worst, again / max(killed, 1))
        assert again <= killed  # the one that its one worker had at hand
        assert not any(started(int(path.name)) for path in log.glob("[0-9]*"))
    print(f"{kills} kills in {rounds} rounds; at most {worst:.2f} videos again for each kill of a round")


@pytest.mark.slow
def test_a_signal_gives_back_what_was_not_begun(made, tmp_path):
    features, log = tmp_path / "features", tmp_path / "log"
    rank = _start(_config(made, features), 0, 2, log, hold=0.05)
    wait_until(lambda: len(_times(features)) > 2)
    os.kill(rank.pid, signal.SIGTERM)
    _join(rank)
    assert json.loads((log / "summary-0.json").read_text())["interrupted"] == signal.SIGTERM
    assert 2 < len(_times(features)) < 40 and not (features / NAME).exists()
    there = len(_times(features))
    assert extract(_config(made, features)).skipped == there
    _check(made, features)
