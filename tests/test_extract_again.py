"""Extraction into a folder that holds features already: what is kept, and what is made again."""

import itertools
import json
import os
import pickle
import signal
import time
from dataclasses import replace

import extraction_job
import numpy as np
import pytest
from clips import draw
from extraction_job import ROWS, written
from towers import write_tower

from fastvid import extract as module
from fastvid.dist import processes
from fastvid.extract import extract
from fastvid.features.file import load_features, save_features
from fastvid.features.manifest import Manifest, read_manifest
from fastvid.video import extraction
from fastvid.video.earlier import EarlierFeatures
from fastvid.video.listing import find_videos

job, made, mixed = extraction_job.job, extraction_job.made, extraction_job.mixed
pytestmark = pytest.mark.usefixtures("forked")  # decoders too


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "pkl"])
def test_a_rerun_does_what_is_missing(job, tmp_path, format):
    extract(job(format=format))
    features = tmp_path / "features"
    before = written(features)
    summary = extract(job(format=format))
    assert (summary.extracted, summary.skipped, summary.exit_code) == (0, 3, 0)
    assert written(features) == before
    (features / f"a.{format}").unlink()
    (features / f".{processes.machine()}-{2**22 + 5}-00000000.tmp").write_text("left by a killed process")
    summary = extract(job(format=format))
    assert (summary.extracted, summary.skipped) == (1, 2)
    assert [name for name, when in written(features).items() if when != before[name]] in (
        [f"a.{format}", "manifest.jsonl"],
        ["manifest.jsonl", f"a.{format}"],
    )
    assert not list(features.glob(".*"))


@pytest.mark.slow
def test_what_is_there_without_a_manifest_is_noted(job, tmp_path):
    extract(job())
    (tmp_path / "features" / "manifest.jsonl").unlink()
    assert extract(job()).skipped == 3
    assert {entry["status"] for entry in read_manifest(tmp_path / "features").values()} == {"skipped"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, why",
    [
        ("num_frames", "num_frames 6, not 5"),
        ("tower", "tower_revision"),
        ("cut", "extract it again (fastvid extract)"),
        ("source", "source_bytes"),
    ],
)
def test_files_that_do_not_fit_are_made_again(job, made, tmp_path, capfd, change, why):
    videos = tmp_path / "videos"
    videos.mkdir()
    draw(videos / "a.mp4", 8)
    extract(job(videos))
    again, file = {}, tmp_path / "features" / "a.safetensors"
    if change == "num_frames":
        again["num_frames"] = 5
    elif change == "tower":
        again["vision_tower"] = str(write_tower(tmp_path / "other", seed=1))
    elif change == "cut":
        file.write_bytes(file.read_bytes()[:-10])
    else:
        draw(videos / "a.mp4", 9)
    capfd.readouterr()
    if again:
        before = file.read_bytes()
        with pytest.raises(ValueError, match=f"1 feature files of other settings.*{why}.*--overwrite True"):
            extract(job(videos, **again))
        assert file.read_bytes() == before
        again["overwrite"] = True
    summary = extract(job(videos, **again))
    assert (summary.extracted, summary.skipped) == (1, 0)
    message = capfd.readouterr().err
    assert "a.mp4: extracted again" in message and why in message
    assert extract(job(videos, **again)).skipped == 1


@pytest.mark.slow
def test_pickles_of_unknown_origin_are_made_again(job, tmp_path, capfd):
    extract(job(format="pkl"))
    (tmp_path / "features" / "manifest.jsonl").unlink()
    with pytest.raises(ValueError, match="3 feature files of other settings .*tower_revision unknown"):
        extract(job(format="pkl"))
    assert extract(job(format="pkl", overwrite=True)).extracted == 3
    assert "tower_revision unknown" in capfd.readouterr().err


@pytest.mark.slow
def test_features_that_do_not_tell_their_colours_are_pyavs(job, tmp_path):
    """As those are that were made before DALI decoded."""
    extract(job())
    (tmp_path / "features" / "manifest.jsonl").unlink()
    for path in (tmp_path / "features").rglob("*.safetensors"):
        values, header = load_features(path)
        assert header.pop("conversion") == "swscale"
        save_features(path, values, header)
    assert extract(job()).skipped == 3
    with pytest.raises(ValueError, match="3 feature files of other settings .*conversion swscale, not dali"):
        EarlierFeatures(
            job(decoder="dali"), {"conversion": "dali"}, [ROWS, 8], Manifest(tmp_path)
        ).refuse_other_settings(find_videos(job().video_dir_path, tmp_path / "features", ".safetensors")[0])


@pytest.mark.slow
@pytest.mark.parametrize("first, second", [("pkl", "safetensors"), ("safetensors", "pkl")])
def test_an_entry_is_about_the_file_of_one_format_alone(job, tmp_path, first, second):
    """A folder of one tower's features takes no other tower's, in whatever format; of one tower it takes both."""
    extract(job(format=first))
    other = str(write_tower(tmp_path / "other", seed=1))
    before = written(tmp_path / "features")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"3 feature files of another format .*a.{first} was made with tower_rev"):
            extract(job(format=second, vision_tower=other, overwrite=overwrite))
    assert written(tmp_path / "features") == before
    assert extract(job(format=second)).extracted == 3 and extract(job(format=first)).skipped == 3


@pytest.mark.slow
def test_a_pickle_that_the_manifest_does_not_tell_of_is_kept(job, made, tmp_path):
    """One of another tower, put over the folder's own."""
    extract(job(format="pkl"))
    file = tmp_path / "features" / "a.pkl"
    array = pickle.loads(file.read_bytes())
    file.write_bytes(pickle.dumps(array + 1))
    changed = file.read_bytes()
    summary = extract(job(format="pkl", max_failures=1.0))
    assert (summary.skipped, len(summary.failures)) == (2, 1) and file.read_bytes() == changed
    assert "a.pkl is not the file that its manifest entry describes; remove it, or" in summary.failures[0][1]
    assert extract(job(format="pkl", overwrite=True)).extracted == 1
    assert np.array_equal(pickle.loads(file.read_bytes()), array)


@pytest.mark.slow
def test_a_pickle_whose_extraction_was_killed_is_known(job, tmp_path, monkeypatch):
    """Killed after the file and before its last line."""
    append, dead = module.Manifest.append, []

    def killed(self, video, status, **more):
        if status == "ok" or dead:  # a dead process writes no further file
            dead.append(video)
            raise KeyboardInterrupt
        append(self, video, status, **more)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module.Manifest, "append", killed)
        extract(job(format="pkl", decode_workers=1))
    made = [path.relative_to(tmp_path / "features") for path in (tmp_path / "features").rglob("*.pkl")]
    assert 1 <= len(made) < 3  # another may be written while the first's end is heard of
    summary = extract(job(format="pkl"))
    assert (summary.extracted, summary.skipped) == (3 - len(made), len(made))
    entries = read_manifest(tmp_path / "features").values()
    assert sorted(entry["status"] for entry in entries) == sorted(["skipped"] * len(made) + ["ok"] * (3 - len(made)))


@pytest.mark.slow
def test_an_entry_of_an_older_version_is_used_where_one_file_can_be_meant(job, tmp_path):
    extract(job(format="pkl"))
    manifest = tmp_path / "features" / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    manifest.write_text(
        "".join(
            json.dumps(
                {name: value for name, value in line.items() if name not in ("file", "format", "tower", "sha256")}
            )
            + "\n"
            for line in lines
            if line["status"] == "ok"
        )
    )
    assert extract(job(format="pkl")).skipped == 3


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "pkl"])
def test_a_rerun_reads_no_feature_file(job, tmp_path, monkeypatch, format):
    """Nor their headers, where manifest entries match the files."""
    extract(job(format=format))
    features = tmp_path / "features"
    opened = []
    monkeypatch.setattr(
        "builtins.open", lambda path, *a, _open=open, **k: opened.append(str(path)) or _open(path, *a, **k)
    )
    assert extract(job(format=format)).skipped == 3
    assert not [path for path in opened if path.endswith((".safetensors", ".pkl")) and str(features) in path]
    os.utime(features / f"a.{format}")
    assert extract(job(format=format)).skipped == 3
    assert {path for path in opened if path.startswith(str(features)) and path.endswith(format)} <= {
        str(features / f"a.{format}")
    }


@pytest.mark.slow
def test_features_without_an_entry_beside_another_ranks_lines(job, tmp_path, monkeypatch):
    """Another rank writes about another video while this one passes over files that the manifest does not name."""
    extract(job())
    features = tmp_path / "features"
    (features / "manifest.jsonl").unlink()
    look_again, made = Manifest.look_again, itertools.count()

    def meanwhile(self, **options):
        with open(features / "manifest-other.jsonl", "a") as file:
            file.write(json.dumps({"video": f"other-{next(made)}.mp4", "status": "ok", "time": time.time()}) + "\n")
        return look_again(self, for_new=True)

    monkeypatch.setattr(Manifest, "look_again", meanwhile)
    summary = extract(job())
    assert (summary.total, summary.skipped, summary.failures) == (3, 3, []) and next(made)
    assert {"a.mp4", "b.c.mkv", "sub/a.mp4"} < read_manifest(features).keys()


@pytest.mark.slow
def test_a_failure_of_a_moment_ago_is_not_tried_again(job, mixed, tmp_path, monkeypatch):
    """Another rank records it, and gives the lease back, just before this one takes it."""
    take, features = module.Leases.take, tmp_path / "features"

    def meanwhile(self, name):
        if name == "c.safetensors":
            with open(features / f"manifest-{other.owner}.jsonl", "a") as file:
                file.write(json.dumps({"video": "c.mp4", "status": "failed", "time": time.time()}) + "\n")
        return take(self, name)

    features.mkdir()
    other = module.Leases(features)
    other.open()
    monkeypatch.setattr(module.Leases, "take", meanwhile)
    summary = extract(job(mixed))
    other.close()
    assert (summary.total, summary.extracted, summary.failures) == (3, 3, [])


@pytest.mark.slow
def test_a_signal_while_finished_videos_are_passed_over(job, mixed, monkeypatch):
    """There may be very many of them."""
    monkeypatch.setattr(extraction, "_SKIPS", 2)
    (mixed / "c.mp4").unlink()
    extract(job(mixed))
    skip, passed = extraction.Extraction._skip, []

    def interrupted(self, video, own, *arguments):
        passed.append(video)
        if len(passed) == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        skip(self, video, own, *arguments)

    monkeypatch.setattr(extraction.Extraction, "_skip", interrupted)
    summary = extract(job(mixed))
    assert summary.interrupted == signal.SIGTERM and summary.skipped == len(passed) == 1


@pytest.mark.slow
def test_results_are_collected_while_finished_videos_are_passed_over(job, made, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "_SKIPS", 1)
    videos = tmp_path / "many"
    videos.mkdir()
    draw(videos / "long.mp4", 30)  # the first one: the rest is there
    for number in range(20):
        draw(videos / f"{number}.mp4", 3)
    extract(job(videos))
    (tmp_path / "features" / "long.safetensors").unlink()
    skip, count, order = extraction.Extraction._skip, extraction.Extraction._count, []

    def slow(self, *arguments):
        time.sleep(0.2)
        order.append("passed over")
        skip(self, *arguments)

    monkeypatch.setattr(extraction.Extraction, "_skip", slow)
    monkeypatch.setattr(extraction.Extraction, "_count", lambda *all: order.append("counted") or count(*all))
    summary = extract(job(videos))
    assert (summary.extracted, summary.skipped) == (1, 20) and order.index("counted") < 20


@pytest.mark.slow
@pytest.mark.parametrize("spelling", ["./features", "features/", "x/..//features", "./x/./../features"])
def test_a_folder_is_the_same_however_it_is_spelt(job, tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    assert extract(job(format="pkl")).extracted == 3
    again = extract(replace(job(format="pkl"), clip_feat_path=spelling))
    assert (again.extracted, again.skipped) == (0, 3)


@pytest.mark.slow
def test_no_video_is_looked_at_twice_at_a_rerun(job, made, monkeypatch):
    extract(job())
    looked_at, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: looked_at.append(str(path)) or stat(path, **options))
    assert extract(job()).skipped == 3
    assert looked_at.count(str(made / "videos" / "sub" / "a.mp4")) == 1
