"""The object that makes features of a video, in this process and in others, and Ray's actors that use it."""

import ast
import errno
import importlib.util
import os
import pickle
import runpy
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from clips import draw_many
from conftest import ROOT
from forks import FORKS
from towers import write_tower

from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.features.file import load_features
from fastvid.features.manifest import read_manifest
from fastvid.video import features as video_features
from fastvid.video.decode import DecodeError
from fastvid.video.features import VideoFeatures
from fastvid.video.listing import find_videos

pytestmark = pytest.mark.usefixtures("forked")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A tower, five videos, one that is none, and their features as `extract` makes them."""
    folder = tmp_path_factory.mktemp("made")
    write_tower(folder / "tower")
    draw_many(folder / "videos", 5)
    (folder / "videos" / "bad.mp4").write_text("no video")
    extract(_config(folder, folder / "clean"))
    return folder


def _config(made, features):
    return ExtractConfig(
        str(made / "videos"),
        str(features),
        vision_tower=str(made / "tower"),
        num_frames=6,
        device="cpu",
        decode_workers=2,
    )


def _files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def _header_of(features, path):
    try:
        return features(path)[1]
    finally:
        features.close()


@pytest.mark.slow
def test_features_and_header_or_the_error(made, tmp_path):
    features = VideoFeatures(_config(made, tmp_path))
    found, header = features(made / "videos" / "sub" / "1.mp4", "sub/1.mp4")
    expected, its_header = load_features(made / "clean" / "sub" / "1.safetensors")
    assert found.equal(expected) and header == its_header
    assert features(made / "videos" / "0.mp4")[1]["source"] == "0.mp4"
    error = features(made / "videos" / "bad.mp4")
    assert isinstance(error, DecodeError) and "cannot be opened" in error.reason
    assert "cannot be read" in features(made / "videos" / "gone.mp4").reason
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, DecodeError) and (again.path, again.reason) == (error.path, error.reason)
    with ThreadPoolExecutor(4) as threads:  # more than there are decoders
        several = list(threads.map(features, [made / "videos" / f"{number}.mp4" for number in (0, 2, 4)] * 3))
    assert all(each[0].equal(several[i % 3][0]) for i, each in enumerate(several))
    features.close()
    assert features(made / "videos" / "0.mp4")[0].equal(several[0][0])  # opens again
    features.close()


@pytest.mark.slow
def test_an_output_that_cannot_be_written_is_a_failure_of_its_own(made, tmp_path, monkeypatch):
    (tmp_path / "sub").write_text("in the way")
    features = VideoFeatures(_config(made, tmp_path))
    videos, _ = find_videos(made / "videos", tmp_path, ".safetensors")
    entries = {video.name: features.extract(video) for video in videos}
    assert Counter(entry["status"] for entry in entries.values()) == {"ok": 3, "failed": 3}
    assert entries["sub/1.mp4"]["reason"].startswith("its features cannot be written (")

    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "features/0.safetensors")

    monkeypatch.setattr(video_features, "atomic_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        features.extract(videos[0])
    features.close()


@pytest.mark.slow
def test_it_travels_to_other_processes(made, tmp_path):
    features = VideoFeatures(_config(made, tmp_path))
    path = made / "videos" / "0.mp4"
    assert len(pickle.dumps(features)) < 2000 and features.pipeline is None
    here = features(path)[1]
    assert len(pickle.dumps(features)) < 2000  # only the settings, also of one that is open
    context = FORKS
    with context.Pool(1) as pool:
        assert pool.apply(_header_of, (features, path)) == here
    features.close()


def ray_starts():
    """Whether a Ray of one processor comes up here: some sandboxes let none."""
    try:
        return (
            subprocess.run(
                [sys.executable, "-c", "import ray; ray.init(num_cpus=1, include_dashboard=False)"],
                capture_output=True,
                timeout=90,
            ).returncode
            == 0
        )
    except subprocess.TimeoutExpired:
        return False


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: pip install -e '.[ray]'")
def test_two_actors_of_ray_make_the_files_of_one_process(made, tmp_path):
    if not ray_starts():
        pytest.skip("Ray does not start on this machine")
    command = [
        sys.executable,
        str(ROOT / "scripts" / "extract_ray.py"),
        "--actors",
        "2",
        "--video_dir_path",
        str(made / "videos"),
        "--clip_feat_path",
        str(tmp_path / "features"),
        "--vision_tower",
        str(made / "tower"),
        "--num_frames",
        "6",
        "--device",
        "cpu",
        "--decode_workers",
        "2",
    ]
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "5 extracted, 0 there already, 1 failed" in done.stdout, done.stderr
    assert _files(tmp_path / "features") == _files(made / "clean")
    entries, clean = read_manifest(tmp_path / "features"), read_manifest(made / "clean")
    for entry in (*entries.values(), *clean.values()):
        assert entry.pop("seconds") >= 0 and entry.pop("time") > 0
        entry.pop("written", None)
    assert entries == clean
    assert sorted(os.listdir(tmp_path / "features")) == sorted(os.listdir(made / "clean"))
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "0 extracted, 5 there already, 1 failed" in done.stdout, done.stderr


def test_the_script_gives_the_folder_back_after_an_error(made, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        assert (tmp_path / "features" / "manifest.jsonl").exists()
        raise RuntimeError("no cluster")

    ray = SimpleNamespace(init=lambda **options: None, cluster_resources=dict, data=SimpleNamespace(from_items=broken))
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(sys, "path", sys.path[:])
    script = runpy.run_path(str(ROOT / "scripts" / "extract_ray.py"))
    with pytest.raises(RuntimeError, match="no cluster"):
        script["main"](
            [
                "--video_dir_path",
                str(made / "videos"),
                "--clip_feat_path",
                str(tmp_path / "features"),
                "--vision_tower",
                str(made / "tower"),
                "--num_frames",
                "6",
            ]
        )
    assert os.listdir(tmp_path / "features") == ["manifest.jsonl"]


def test_the_script_is_short():
    tree = ast.parse((ROOT / "scripts" / "extract_ray.py").read_text())
    assert sum(isinstance(node, ast.stmt) for node in ast.walk(tree)) <= 52
