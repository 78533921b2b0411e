"""The extraction job: feature files, manifest, formats, ranks, settings."""

import hashlib
import json
import pickle
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import extraction_job
import numpy as np
import pytest
import torch
from clips import draw
from extraction_job import ROWS, written

import fastvid
from fastvid import extract as module
from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.features.file import load_features
from fastvid.features.manifest import read_manifest
from fastvid.video import extraction
from fastvid.video.decode import decode
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.passes import Features
from fastvid.video.pipeline import Pipeline
from fastvid.video.sampling import frame_indices

job, made, mixed = extraction_job.job, extraction_job.made, extraction_job.mixed
pytestmark = pytest.mark.usefixtures("forked")  # decoders too


@pytest.mark.slow
def test_feature_files_and_manifest(job, made, tmp_path):
    summary = extract(job())
    assert (summary.total, summary.extracted, summary.skipped, summary.failures) == (3, 3, 0, [])
    assert summary.exit_code == 0
    files = {"a.safetensors": "a.mp4", "b.c.safetensors": "b.c.mkv", "sub/a.safetensors": "sub/a.mp4"}
    assert set(written(tmp_path / "features")) == {*files, "manifest.jsonl"}
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
        assert f"torch.{header['dtype']}" == str(encoder.dtype) and header["fastvid"] == fastvid.__version__
    entries = read_manifest(tmp_path / "features")
    assert {name: (entry["status"], entry["reason"], entry["frames"]) for name, entry in entries.items()} == {
        "a.mp4": ("ok", None, 12),
        "b.c.mkv": ("ok", None, 4),
        "sub/a.mp4": ("ok", None, 9),
    }
    assert all(entry["seconds"] > 0 for entry in entries.values())


@pytest.mark.slow
def test_the_references_format(job, tmp_path):
    extract(job(format="pkl"))
    array = pickle.loads((tmp_path / "features" / "b.c.pkl").read_bytes())
    assert isinstance(array, np.ndarray) and array.dtype == np.float16 and array.shape == (ROWS, 32)
    assert (array[4:6] == 0).all() and (array[:4] != 0).any()


@pytest.mark.slow
def test_the_manifest_tells_of_each_file(job, tmp_path):
    extract(job())
    entry = read_manifest(tmp_path / "features")["sub/a.mp4"]
    content = (tmp_path / "features" / "sub" / "a.safetensors").read_bytes()
    assert (entry["file"], entry["format"], entry["sha256"]) == (
        "sub/a.safetensors",
        "safetensors",
        hashlib.sha256(content).hexdigest(),
    )
    assert entry["tower"] == job().vision_tower and entry["num_frames"] == 6


@pytest.mark.slow
def test_what_has_no_effect_or_is_left_out_costs_a_line(job, made, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    draw(videos / "short.mp4", 4), draw(videos / "long.mp4", 8)
    for name in ("a.jpg", "b.JPG", "notes.txt", ".hidden.txt"):
        (videos / name).touch()
    summary = str(extract(job(videos, llava="1.1")))
    assert "1 of them have fewer frames than --num_frames" in summary
    assert "3 files are no videos by their endings and were left out (2 .jpg, 1 .txt)" in summary
    assert "--llava 1.1 has no effect beside --vision_tower" in summary
    for file in (tmp_path / "features").iterdir():
        file.unlink()
    quiet = str(extract(job(made / "videos", num_frames=4)))
    assert "left out" not in quiet and "no effect" not in quiet and "fewer frames" not in quiet


@pytest.mark.slow
def test_a_failure_names_what_is_no_video(job, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    draw(videos / "a.mp4", 4)
    (videos / "b.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    (videos / "c.mp4").write_bytes(b"\x89PNG\r\n\x1a\n")
    failures = dict(extract(job(videos)).failures)
    assert "git-lfs pointer" in failures["b.mp4"] and "is an image" in failures["c.mp4"]


@pytest.mark.slow
def test_a_tower_is_named_by_its_whole_path(job, made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    extract(job(vision_tower="tower"))
    assert load_features(tmp_path / "features" / "a.safetensors")[1]["tower"] == str(made / "tower")


@pytest.mark.slow
def test_ranks_share_the_videos(job, mixed, tmp_path, monkeypatch):
    (mixed / "c.mp4").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, extracted in (("0", 2), ("1", 1)):
        monkeypatch.setenv("RANK", rank)
        summary = extract(job(mixed, take_over=False))
        assert (summary.total, summary.extracted) == (extracted, extracted)
    assert {entry["status"] for entry in read_manifest(tmp_path / "features").values()} == {"ok"}
    assert len(list((tmp_path / "features").glob("*.safetensors"))) == 3


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_failures": 1.5}, "max_failures"),
        ({"timeout": 0.0}, "timeout"),
        ({"num_frames": 0}, "--num_frames 0"),
        ({"infer_batch": 0}, "--infer_batch 0"),
        ({"decode_workers": -1}, "--decode_workers -1"),
        ({"vision_tower": "/nowhere"}, "hf download"),
    ],
)
def test_settings_that_cannot_be(job, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        extract(job(**options))
    assert not (tmp_path / "features").exists()


def test_towers_of_the_two_versions():
    assert module.TOWERS == {"1.1": "openai/clip-vit-large-patch14", "1.5": "openai/clip-vit-large-patch14-336"}


@pytest.mark.slow
def test_recordings(golden, tiny, tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    recorded = np.load(golden / "features_real.npz")
    names = [name.removeprefix("224/").removesuffix(".pkl") for name in recorded if name.startswith("224/")]
    assert len(names) > 1
    for name in names:
        shutil.copy(golden / "videos" / f"{name}.mp4", videos)
    extract(
        ExtractConfig(
            str(videos), str(tmp_path / "features"), vision_tower=str(tiny / "clip224"), device="cpu", dtype="float32"
        )
    )
    for name in names:
        features, header = load_features(tmp_path / "features" / f"{name}.safetensors")
        assert np.abs(features.float().numpy() - recorded[f"224/{name}.pkl"].astype(np.float32)).max() <= 0.004
    assert json.loads(json.dumps(header)) == header


@pytest.mark.slow
def test_parity_takes_the_references_pixels_and_precision(job, tmp_path):
    for flags, told in (({"decoder": "dali"}, "--decoder dali"), ({"dtype": "bfloat16"}, "--dtype bfloat16")):
        with pytest.raises(ValueError, match=told):
            extract(job(parity="reference", **flags))
    assert not (tmp_path / "features").exists()
    summary = extract(job(parity="reference", decoder="pyav"))
    assert summary.extracted == 3
    _, header = load_features(tmp_path / "features" / "a.safetensors")
    assert (header["dtype"], header["conversion"]) == ("float32", "swscale")
    assert extract(job(parity="reference", dtype="float32")).skipped == 3


@pytest.mark.slow
def test_frames_wait_for_a_full_pass_only_so_long(job, made, tmp_path, monkeypatch):
    """Whole passes of other videos never take them along, and there is always one that is still decoded."""
    monkeypatch.setattr(extraction, "_FILL", 0.2)
    videos = tmp_path / "many"
    videos.mkdir()
    draw(videos / "first.mp4", 40)  # of which five frames are taken
    draw(videos / "long.mp4", 30)  # is decoded until a dozen are written
    for number in range(20):
        draw(videos / f"{number}.mp4", 6)  # two passes of three frames
    written, write, prepare = [], extraction.Extraction._write, Pipeline.prepare

    def slow(self, path, **options):
        prepared, until = prepare(self, path, **options), time.monotonic() + 30
        while path.name == "long.mp4" and len(written) < 12 and time.monotonic() < until:
            time.sleep(0.02)
        if path.name == "first.mp4":
            return replace(prepared, frames=prepared.frames[:5])
        time.sleep(0.1)
        return prepared

    monkeypatch.setattr(Pipeline, "prepare", slow)
    monkeypatch.setattr(
        extraction.Extraction,
        "_write",
        lambda self, video, *rest: written.append(video.name) or write(self, video, *rest),
    )
    assert extract(job(videos, infer_batch=3, decode_workers=3)).extracted == 22
    assert written.index("first.mp4") < written.index("long.mp4")


@pytest.mark.parametrize("last_first", [False, True])
def test_what_came_out_of_the_tower_waits_no_more(monkeypatch, last_first):
    """Whichever of the tower's results is looked at first."""
    own, at_hand, results = extraction.Extraction.__new__(extraction.Extraction), extraction._AtHand(), []
    own._writers, own._finish = ThreadPoolExecutor(1), lambda *_: None
    for name, came in (("a", []), ("b", "ab")):
        video = type("Video", (), {"name": name})()
        at_hand.in_tower[name] = video
        results.append(Future())
        results[-1].set_result([Features((at_hand.in_tower[each], None), 0.0) for each in came])
        at_hand.computing[results[-1]] = name
    done = type("Done", (), {"done": results[::-1] if last_first else results})
    monkeypatch.setattr(extraction, "wait", lambda *_: done)
    own._collect(at_hand, 0, (), None, None)
    own._writers.shutdown()
    assert not (at_hand.waiting or at_hand.in_tower or at_hand.computing) and len(at_hand.writing) == 2
