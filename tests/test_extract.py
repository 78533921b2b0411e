"""The extraction job: feature files, manifest, reruns, failures, interrupts."""

import hashlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from clips import draw, endless
from conftest import ROOT
from towers import write_tower

import fastvid
from fastvid import extract as module
from fastvid.config import ExtractConfig
from fastvid.data.features import load_features
from fastvid.extract import Summary, extract, main
from fastvid.video.decode import decode
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.manifest import read_manifest
from fastvid.video.sampling import frame_indices

ROWS = 6 + 4  # frames per video, patches of the tower


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tower and three videos, one in a sub-folder."""
    folder = tmp_path_factory.mktemp("extract")
    write_tower(folder / "tower")
    (folder / "videos" / "sub").mkdir(parents=True)
    for name, frames in (("a.mp4", 12), ("b.c.mkv", 4), ("sub/a.mp4", 9)):
        draw(folder / "videos" / name, frames)
    return folder


@pytest.fixture
def job(made, tmp_path):
    """Makes the configuration of a job on `made`, or on the videos given."""

    def config(videos=made / "videos", **options):
        settings = {"vision_tower": str(made / "tower"), "num_frames": 6, "device": "cpu", **options}
        return ExtractConfig(str(videos), str(tmp_path / "features"), **settings)

    return config


@pytest.fixture
def mixed(made, tmp_path):
    """A folder of three good videos and a broken one."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a", "b", "d"):
        draw(folder / f"{name}.mp4", 5)
    (folder / "c.mp4").write_text("no video")
    return folder


def _state(folder):
    """When each file below a folder was written."""
    files = [path for path in folder.rglob("*.*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def test_feature_files_and_manifest(job, made, tmp_path):
    summary = extract(job())
    assert (summary.total, summary.extracted, summary.skipped, summary.failures) == (3, 3, 0, [])
    assert summary.exit_code == 0
    files = {"a.safetensors": "a.mp4", "b.c.safetensors": "b.c.mkv", "sub/a.safetensors": "sub/a.mp4"}
    assert set(_state(tmp_path / "features")) == {*files, "manifest.jsonl"}
    encoder = FeatureEncoder(made / "tower", device="cpu", num_temporal=6)
    for file, source in files.items():
        features, header = load_features(tmp_path / "features" / file)
        frames, info = decode(made / "videos" / source, num_frames=6)
        assert features.dtype == torch.float16 and torch.equal(features, encoder.encode(frames))
        content = (made / "videos" / source).read_bytes()
        assert header["tower"] == str(made / "tower") and header["tower_revision"] == encoder.revision
        assert (header["image_size"], header["patch_size"], header["num_frames"]) == (28, 14, 6)
        assert header["total_frames"] == info.frames and header["frame_indices"] == frame_indices(info.frames, 6)
        assert header["source"] == source and header["source_bytes"] == len(content)
        assert header["source_sha256"] == hashlib.sha256(content).hexdigest()
        assert header["video"]["decoder"] == info.decoder and header["video"]["codec"] == "h264"
        assert header["dtype"] == "float32" and header["fastvid"] == fastvid.__version__
    entries = read_manifest(tmp_path / "features")
    assert {name: (entry["status"], entry["reason"], entry["frames"]) for name, entry in entries.items()} == {
        "a.mp4": ("ok", None, 12), "b.c.mkv": ("ok", None, 4), "sub/a.mp4": ("ok", None, 9)}
    assert all(entry["seconds"] > 0 for entry in entries.values())


@pytest.mark.parametrize("format", ["safetensors", "pkl"])
def test_a_rerun_does_what_is_missing(job, tmp_path, format):
    extract(job(format=format))
    features = tmp_path / "features"
    before = _state(features)
    summary = extract(job(format=format))
    assert (summary.extracted, summary.skipped, summary.exit_code) == (0, 3, 0)
    assert _state(features) == before
    (features / f"a.{format}").unlink()
    summary = extract(job(format=format))
    assert (summary.extracted, summary.skipped) == (1, 2)
    assert [name for name, when in _state(features).items() if when != before[name]] in (
        [f"a.{format}", "manifest.jsonl"], ["manifest.jsonl", f"a.{format}"])


def test_the_references_format(job, tmp_path):
    extract(job(format="pkl"))
    array = pickle.loads((tmp_path / "features" / "b.c.pkl").read_bytes())
    assert isinstance(array, np.ndarray) and array.dtype == np.float16 and array.shape == (ROWS, 32)
    assert (array[4:6] == 0).all() and (array[:4] != 0).any()


def test_what_is_there_without_a_manifest_is_noted(job, tmp_path):
    extract(job())
    (tmp_path / "features" / "manifest.jsonl").unlink()
    assert extract(job()).skipped == 3
    assert {entry["status"] for entry in read_manifest(tmp_path / "features").values()} == {"skipped"}


@pytest.mark.parametrize("change, why", [
    ("num_frames", "num_frames 6, not 5"),
    ("tower", "tower_revision"),
    ("cut", "delete it and extract it again"),
    ("source", "source_bytes"),
])
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
    summary = extract(job(videos, **again))
    assert (summary.extracted, summary.skipped) == (1, 0)
    message = capfd.readouterr().err
    assert "a.mp4: extracted again" in message and why in message
    assert extract(job(videos, **again)).skipped == 1


def test_pickles_of_unknown_origin_are_made_again(job, tmp_path, capfd):
    extract(job(format="pkl"))
    (tmp_path / "features" / "manifest.jsonl").unlink()
    assert extract(job(format="pkl")).extracted == 3
    assert "tower_revision unknown" in capfd.readouterr().err


def test_a_bad_video_costs_one_line(job, mixed, tmp_path, capsys):
    flags = ["--video_dir_path", str(mixed), "--clip_feat_path", str(tmp_path / "features"), "--num_frames", "6",
             "--vision_tower", job().vision_tower, "--device", "cpu"]
    assert main(flags) == 1
    output = capsys.readouterr().out
    assert "3 extracted, 0 there already, 1 failed of 4 videos" in output
    assert "c.mp4  cannot be opened as a video" in output
    entry = read_manifest(tmp_path / "features")["c.mp4"]
    assert entry["status"] == "failed" and "cannot be opened" in entry["reason"]
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3
    assert main([*flags, "--max_failures", "0.25"]) == 0
    assert main([*flags, "--max_failures", "0.24"]) == 1
    assert "0 extracted, 3 there already, 1 failed of 4" in capsys.readouterr().out


def test_names_of_failed_videos_stay_on_their_lines():
    summary = Summary(total=2, max_failures=1, failures=[("two\nlines\x1b[31m.mp4", "odd"), ("x" * 250, "long")])
    odd = r"'two\nlines\x1b[31m.mp4'"
    assert str(summary).splitlines()[-2:] == [f"  {odd:<60}  odd", f"  {'x' * 250}  long"]


def test_features_that_overflow_are_a_failure(job, mixed, monkeypatch, tmp_path):
    encode = FeatureEncoder.encode
    monkeypatch.setattr(FeatureEncoder, "encode", lambda self, frames: encode(self, frames) / 0)
    summary = extract(job(mixed))
    assert len(summary.failures) == 4 and "not finite in float32" in dict(summary.failures)["a.mp4"]
    assert not list((tmp_path / "features").glob("*.safetensors"))


def test_a_hang_costs_one_video(job, mixed):
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    summary = extract(job(mixed, timeout=3.0))
    assert summary.extracted == 3 and "longer than 3 s" in dict(summary.failures)["c.mp4"]


def test_ranks_share_the_videos(job, mixed, tmp_path, monkeypatch):
    (mixed / "c.mp4").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, extracted in (("0", 2), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        summary = extract(job(mixed))
        assert (summary.total, summary.extracted) == (extracted, extracted)
    assert {entry["status"] for entry in read_manifest(tmp_path / "features").values()} == {"ok"}
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3


@pytest.mark.parametrize("options, message", [
    ({"max_failures": 1.5}, "max_failures"), ({"timeout": 0.0}, "timeout"), ({"num_frames": 0}, "at least 1"),
    ({"infer_batch": 0}, "at least 1"), ({"vision_tower": "/nowhere"}, "hf download")])
def test_settings_that_cannot_be(job, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract(job(**options))
    assert not (tmp_path / "features").exists()


def test_towers_of_the_two_versions():
    assert module.TOWERS == {"1.1": "openai/clip-vit-large-patch14", "1.5": "openai/clip-vit-large-patch14-336"}


def _start(job, videos, *flags):
    """The reference's script in a process of its own, on a checkout that is not installed."""
    config = job(videos)
    command = [sys.executable, str(ROOT / "scripts" / "save_spatio_temporal_clip_features.py"), "--video_dir_path",
               config.video_dir_path, "--clip_feat_path", config.clip_feat_path, "--vision_tower", config.vision_tower,
               "--num_frames", "6", "--device", "cpu", *flags]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def test_ctrl_c_ends_it_after_the_video_in_hand(job, mixed, tmp_path):
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    previous = signal.getsignal(signal.SIGINT)
    threading.Timer(2.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    summary = extract(job(mixed))
    assert summary.exit_code == 130 and summary.failures == []
    assert "c.mp4" not in read_manifest(tmp_path / "features")
    assert signal.getsignal(signal.SIGINT) is previous


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_and_run_again(job, mixed, tmp_path, number, code):
    """The third video never comes: what was done before is kept, the rest is done by the next run."""
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    process = _start(job, mixed)
    for _ in range(1200):
        if "b.mp4" in read_manifest(tmp_path / "features") or process.poll() is not None:
            break
        time.sleep(0.05)
    process.send_signal(number)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}" in output
    before = _state(tmp_path / "features")
    (mixed / "c.mp4").unlink()
    with open(tmp_path / "features" / "manifest.jsonl", "a") as file:
        file.write('{"video": "c.mp4", "sta')  # as a kill in the middle of a line leaves it
    summary = extract(job(mixed))
    assert (summary.total, summary.extracted, summary.skipped) == (3, 1, 2)
    after = _state(tmp_path / "features")
    assert all(after[name] == before[name] for name in ("a.safetensors", "b.safetensors"))
    assert {name: entry["status"] for name, entry in read_manifest(tmp_path / "features").items()} == {
        "a.mp4": "ok", "b.mp4": "ok", "d.mp4": "ok"}


def test_recordings(shared, tiny, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    for name in ("nasa_13013.mp4", "test_non_zero_start.mp4"):
        (videos / name).symlink_to(shared / "videos" / name)
    recorded = np.load(shared / "golden" / "features_real.npz")
    extract(ExtractConfig(str(videos), str(tmp_path / "features"), vision_tower=str(tiny / "clip224"), device="cpu"))
    for name in ("nasa_13013", "test_non_zero_start"):
        features, header = load_features(tmp_path / "features" / f"{name}.safetensors")
        assert np.abs(features.float().numpy() - recorded[f"224/{name}.pkl"].astype(np.float32)).max() <= 0.004
    assert json.loads(json.dumps(header)) == header


@pytest.mark.parametrize("limit, said", [(0.01, True), (0.9, False)])
def test_too_many_failures_name_their_limit(limit, said):
    summary = Summary(total=2, max_failures=limit, failures=[("a.mp4", "cannot be opened")])
    assert summary.exit_code == int(said) and (f"--max_failures {limit:g}" in str(summary)) == said
