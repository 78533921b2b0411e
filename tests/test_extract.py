"""The extraction job: feature files, manifest, reruns, failures, interrupts."""

import errno
import hashlib
import itertools
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from clips import draw, endless
from conftest import ROOT
from towers import write_tower

import fastvid
from fastvid import extract as module
from fastvid.config import ExtractConfig
from fastvid.dist import processes
from fastvid.extract import extract, main
from fastvid.features.file import load_features, save_features
from fastvid.features.manifest import Manifest, read_manifest
from fastvid.video import extraction
from fastvid.video import features as video_features
from fastvid.video.decode import decode
from fastvid.video.earlier import EarlierFeatures
from fastvid.video.encoder import FeatureEncoder, default_dtype
from fastvid.video.listing import find_videos
from fastvid.video.passes import Features
from fastvid.video.pipeline import Pipeline
from fastvid.video.sampling import frame_indices
from fastvid.video.summary import Summary
from fastvid.video.towers.clip import ClipTower

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


@pytest.mark.slow
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
        assert f"torch.{header['dtype']}" == str(encoder.dtype) and header["fastvid"] == fastvid.__version__
    entries = read_manifest(tmp_path / "features")
    assert {name: (entry["status"], entry["reason"], entry["frames"]) for name, entry in entries.items()} == {
        "a.mp4": ("ok", None, 12),
        "b.c.mkv": ("ok", None, 4),
        "sub/a.mp4": ("ok", None, 9),
    }
    assert all(entry["seconds"] > 0 for entry in entries.values())


@pytest.mark.slow
@pytest.mark.parametrize("format", ["safetensors", "pkl"])
def test_a_rerun_does_what_is_missing(job, tmp_path, format):
    extract(job(format=format))
    features = tmp_path / "features"
    before = _state(features)
    summary = extract(job(format=format))
    assert (summary.extracted, summary.skipped, summary.exit_code) == (0, 3, 0)
    assert _state(features) == before
    (features / f"a.{format}").unlink()
    (features / f".{processes.machine()}-{2**22 + 5}-00000000.tmp").write_text("left by a killed process")
    summary = extract(job(format=format))
    assert (summary.extracted, summary.skipped) == (1, 2)
    assert [name for name, when in _state(features).items() if when != before[name]] in (
        [f"a.{format}", "manifest.jsonl"],
        ["manifest.jsonl", f"a.{format}"],
    )
    assert not list(features.glob(".*"))


@pytest.mark.slow
def test_the_references_format(job, tmp_path):
    extract(job(format="pkl"))
    array = pickle.loads((tmp_path / "features" / "b.c.pkl").read_bytes())
    assert isinstance(array, np.ndarray) and array.dtype == np.float16 and array.shape == (ROWS, 32)
    assert (array[4:6] == 0).all() and (array[:4] != 0).any()


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
    before = _state(tmp_path / "features")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=f"3 feature files of another format .*a.{first} was made with tower_rev"):
            extract(job(format=second, vision_tower=other, overwrite=overwrite))
    assert _state(tmp_path / "features") == before
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
def test_a_bad_video_costs_one_line(job, mixed, tmp_path, capsys):
    flags = [
        "--video_dir_path",
        str(mixed),
        "--clip_feat_path",
        str(tmp_path / "features"),
        "--num_frames",
        "6",
        "--vision_tower",
        job().vision_tower,
        "--device",
        "cpu",
    ]
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


def test_failures_are_counted_by_reason():
    summary = Summary(total=9, max_failures=1)
    for number in range(8):
        summary.fail(
            f"{number}.mp4",
            f"is damaged: {number} of 120 frames decode with errors"
            if number < 5
            else f"decoding took longer than {number} s and its own length"
            if number < 7
            else "odd (x)",
        )
    assert summary.failed() == "5 × is damaged, 2 × decoding took longer than n s and its own length, 1 × odd"
    assert f"failed, by reason: {summary.failed()}" in str(summary)
    twins = Summary(total=2, max_failures=1)
    for name in ("a.mp4", "b.h264"):
        twins.fail(name, f"another one has the same feature file: {name} would be written to x.pkl as well")
    twins.fail("c.mp4", "its stream is mpeg4, of 3 layers")
    assert twins.failed() == "2 × another one has the same feature file, 1 × its stream is mpeg4, of n layers"
    for number in range(10):
        summary.fail("x", f"reason {chr(97 + number)}")
    assert summary.failed().endswith("1 × reason b, 8 × other reasons")


@pytest.mark.slow
def test_features_that_overflow_are_a_failure(job, mixed, monkeypatch, tmp_path):
    result = Features.result
    monkeypatch.setattr(Features, "result", lambda self: result(self) / 0)
    summary = extract(job(mixed))
    dtype = str(default_dtype(torch.device("cpu"))).removeprefix("torch.")
    assert len(summary.failures) == 4 and f"not finite in {dtype}" in dict(summary.failures)["a.mp4"]
    assert not list((tmp_path / "features").glob("*.safetensors"))


@pytest.mark.slow
def test_a_hang_costs_one_video(job, mixed):
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    summary = extract(job(mixed, timeout=0.5))
    assert summary.extracted == 3 and "longer than 0.5 s" in dict(summary.failures)["c.mp4"]


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


def _start(job, videos, *flags):
    """The reference's script in a process of its own, on a checkout that is not installed."""
    config = job(videos)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "save_spatio_temporal_clip_features.py"),
        "--video_dir_path",
        config.video_dir_path,
        "--clip_feat_path",
        config.clip_feat_path,
        "--vision_tower",
        config.vision_tower,
        "--num_frames",
        "6",
        "--device",
        "cpu",
        *flags,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


@pytest.mark.slow
def test_ctrl_c_ends_it_after_the_video_in_hand(job, mixed, tmp_path):
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    previous = signal.getsignal(signal.SIGINT)
    threading.Timer(2.0, os.kill, [os.getpid(), signal.SIGINT]).start()
    summary = extract(job(mixed))
    assert summary.exit_code == 130 and summary.failures == []
    assert "c.mp4" not in read_manifest(tmp_path / "features")
    assert signal.getsignal(signal.SIGINT) is previous


@pytest.mark.slow
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_interrupted_and_run_again(job, mixed, tmp_path, number, code):
    """The third video never comes: what was done beside it is kept, the rest is done by the next run."""
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    process = _start(job, mixed)
    for _ in range(1200):
        if {"a.mp4", "b.mp4", "d.mp4"} <= read_manifest(tmp_path / "features").keys() or process.poll() is not None:
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
    assert (summary.total, summary.extracted, summary.skipped) == (3, 0, 3)
    after = _state(tmp_path / "features")
    assert all(after[f"{name}.safetensors"] == before[f"{name}.safetensors"] for name in "abd")
    assert {name: entry["status"] for name, entry in read_manifest(tmp_path / "features").items()} == {
        "a.mp4": "ok",
        "b.mp4": "ok",
        "d.mp4": "ok",
    }


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


@pytest.mark.parametrize("limit, said", [(0.01, True), (0.9, False)])
def test_too_many_failures_name_their_limit(limit, said):
    summary = Summary(total=2, max_failures=limit, failures=[("a.mp4", "cannot be opened")])
    assert summary.exit_code == int(said) and (f"--max_failures {limit:g}" in str(summary)) == said


@pytest.mark.slow
def test_a_slow_video_holds_up_no_other(job, mixed, tmp_path):
    """The others are done by the time that it is given up, whatever their order."""
    endless(mixed / "0.mp4")
    summary = extract(job(mixed, decode_workers=2, timeout=4.0))
    lines = [json.loads(line) for line in (tmp_path / "features" / "manifest.jsonl").read_text().splitlines()]
    assert lines[-1]["video"] == "0.mp4" and summary.extracted == 3
    assert "longer than 4 s" in dict(summary.failures)["0.mp4"]


@pytest.mark.slow
def test_damaged_videos_are_taken_where_the_user_says_so(job, tmp_path):
    videos = tmp_path / "damaged"
    videos.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (20, 48, 64, 3), np.uint8)
    path = draw(videos / "a.avi", codec="mpeg4", pictures=noise)
    content = bytearray(path.read_bytes())
    at = len(content) // 2
    content[at : at + 60] = bytes(byte ^ 0xFF for byte in content[at : at + 60])
    path.write_bytes(content)
    summary = extract(job(videos))
    assert summary.extracted == 0 and "--allow_damaged True takes it" in dict(summary.failures)["a.avi"]
    summary = extract(job(videos, allow_damaged=True))
    assert summary.extracted == summary.damaged == 1 and "1 of them are damaged" in str(summary)
    header = load_features(tmp_path / "features" / "a.safetensors")[1]
    assert header["video"]["damaged"] > 0 and header["video"]["conversion"] == "swscale"


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_costs_its_own_videos(job, tmp_path):
    videos = tmp_path / "two"
    for name in ("a.mp4", "sub/b.mp4"):
        (videos / name).parent.mkdir(parents=True, exist_ok=True)
        draw(videos / name)
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / "sub").write_text("in the way")
    summary = extract(job(videos))
    assert summary.extracted == 1 and "cannot be written" in dict(summary.failures)["sub/b.mp4"]


@pytest.mark.slow
def test_a_full_disk_ends_it(job, mixed, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device", "features/a.safetensors")

    monkeypatch.setattr(video_features, "atomic_file", full)
    with pytest.raises(OSError, match="No space left on device"):
        extract(job(mixed))


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


@pytest.mark.slow
def test_no_video_is_looked_at_twice_at_a_rerun(job, made, monkeypatch):
    extract(job())
    looked_at, stat = [], os.stat
    monkeypatch.setattr(os, "stat", lambda path, **options: looked_at.append(str(path)) or stat(path, **options))
    assert extract(job()).skipped == 3
    assert looked_at.count(str(made / "videos" / "sub" / "a.mp4")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("broken", [video_features.VideoFeatures, Manifest])
def test_leases_are_given_back_whatever_closing_raises(job, tmp_path, monkeypatch, broken):
    close = broken.close

    def closed(self):
        close(self)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(broken, "close", closed)
    with pytest.raises(OSError, match="Input/output error"):
        extract(job())
    assert sorted(os.listdir(tmp_path / "features")) == ["a.safetensors", "b.c.safetensors", "manifest.jsonl", "sub"]


@pytest.mark.slow
def test_a_gpu_without_memory_costs_a_video(job, monkeypatch):
    states, tried = ClipTower.states, []

    def full(self, patches_BPK):
        tried.append(len(patches_BPK))
        if len(patches_BPK) > 2:
            raise torch.OutOfMemoryError("no room")
        return states(self, patches_BPK)

    monkeypatch.setattr(ClipTower, "states", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: tried.append("emptied"))
    summary = extract(job(max_failures=1.0))
    assert len(summary.failures) == 3 and all("smaller --infer_batch" in reason for _, reason in summary.failures)
    assert tried[:3] == [6, "emptied", 6]
    assert extract(job(infer_batch=2)).extracted == 3


@pytest.mark.slow
@pytest.mark.parametrize("shard", [False, True])
def test_a_gpu_decoder_that_hangs_ends_the_process(job, tmp_path, monkeypatch, capfd, shard):
    """Its thread cannot be ended alone. The manifest says which video it was, by its name in a tar shard."""

    def ended(code):
        raise SystemExit(code)

    begun, hangs, prepare = [], threading.Event(), Pipeline.prepare

    def late(self, path, *, name, **options):
        if path.suffix == ".mkv":
            begun.append(name)
            hangs.wait(60)
        return prepare(self, path, name=name)

    monkeypatch.setattr(Pipeline, "prepare", late)
    settings = {}
    if shard:
        settings["videos"] = tmp_path / "shard.tar"
        with tarfile.open(tmp_path / "shard.tar", "w") as archive:
            archive.add(job().video_dir_path, "in")
    config, name = job(decode_workers=2, **settings), "shard/in/b.c.mkv" if shard else "b.c.mkv"
    monkeypatch.setattr(Pipeline, "overdue", lambda self: list(begun))
    monkeypatch.setattr(Pipeline, "kill", lambda self: hangs.set())  # the test's own thread
    monkeypatch.setattr(extraction.os, "_exit", ended)
    with pytest.raises(SystemExit) as end:
        extract(config)
    assert end.value.code == 1
    entry = read_manifest(tmp_path / "features")[name]
    assert capfd.readouterr().err.count(f"ends with this process: {name}\n") == 1
    assert entry["status"] == "failed" and "--decoder pyav" in entry["reason"]
    monkeypatch.undo()
    assert extract(job(decoder="pyav", **settings)).failures == []
