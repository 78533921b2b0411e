"""Extraction when something goes wrong: bad and slow videos, signals, a full disk, a GPU without memory."""

import errno
import json
import os
import signal
import tarfile
import threading

import extraction_job
import numpy as np
import pytest
import torch
from clips import draw, endless
from extraction_job import start, written
from waiting import LONG, meanwhile, wait_until

from fastvid.extract import extract, main
from fastvid.features.file import load_features
from fastvid.features.manifest import Manifest, read_manifest
from fastvid.video import extraction
from fastvid.video import features as video_features
from fastvid.video.decode.worker import DecodeWorker
from fastvid.video.encoder import default_dtype
from fastvid.video.passes import Features
from fastvid.video.pipeline import Pipeline
from fastvid.video.summary import Summary
from fastvid.video.towers.clip import ClipTower

job, made, mixed = extraction_job.job, extraction_job.made, extraction_job.mixed
pytestmark = pytest.mark.usefixtures("forked")  # decoders too


def noted(tmp_path, names):
    """Whether the manifest tells of these videos."""
    return {f"{name}.mp4" for name in names} <= read_manifest(tmp_path / "features").keys()


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
@pytest.mark.parametrize("workers", [1, 2])
def test_a_hang_costs_one_video(job, mixed, monkeypatch, workers):
    """The others have all the time that a busy machine needs."""
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    decode = DecodeWorker.decode_and_hash

    def decoding(self, path, **options):
        given, self.timeout = self.timeout, self.timeout if path.name == "c.mp4" else LONG
        try:
            return decode(self, path, **options)
        finally:
            self.timeout = given

    monkeypatch.setattr(DecodeWorker, "decode_and_hash", decoding)
    summary = extract(job(mixed, timeout=0.5, decode_workers=workers))
    assert summary.extracted == 3 and "longer than 0.5 s" in dict(summary.failures)["c.mp4"]


@pytest.mark.slow
def test_ctrl_c_ends_it_after_the_video_in_hand(job, mixed, tmp_path):
    (mixed / "c.mp4").unlink()
    endless(mixed / "c.mp4")
    previous = signal.getsignal(signal.SIGINT)
    with meanwhile(lambda: noted(tmp_path, "abd"), lambda: os.kill(os.getpid(), signal.SIGINT)):
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
    process = start(job, mixed)
    wait_until(lambda: noted(tmp_path, "abd") or process.poll() is not None)
    process.send_signal(number)
    output, errors = process.communicate(timeout=LONG)
    assert process.returncode == code, errors
    if number != signal.SIGKILL:
        assert f"stopped by {number.name}" in output
    before = written(tmp_path / "features")
    (mixed / "c.mp4").unlink()
    with open(tmp_path / "features" / "manifest.jsonl", "a") as file:
        file.write('{"video": "c.mp4", "sta')  # as a kill in the middle of a line leaves it
    summary = extract(job(mixed))
    assert (summary.total, summary.extracted, summary.skipped) == (3, 0, 3)
    after = written(tmp_path / "features")
    assert all(after[f"{name}.safetensors"] == before[f"{name}.safetensors"] for name in "abd")
    assert {name: entry["status"] for name, entry in read_manifest(tmp_path / "features").items()} == {
        "a.mp4": "ok",
        "b.mp4": "ok",
        "d.mp4": "ok",
    }


@pytest.mark.parametrize("limit, said", [(0.01, True), (0.9, False)])
def test_too_many_failures_name_their_limit(limit, said):
    summary = Summary(total=2, max_failures=limit, failures=[("a.mp4", "cannot be opened")])
    assert summary.exit_code == int(said) and (f"--max_failures {limit:g}" in str(summary)) == said


@pytest.mark.slow
def test_a_slow_video_holds_up_no_other(job, mixed, tmp_path, monkeypatch):
    """The others are done while it is decoded, whatever their order; then comes the signal of its time-out."""
    endless(mixed / "0.mp4")
    decode, slow = DecodeWorker.decode_and_hash, []

    def decoding(self, path, **options):
        if path.name == "0.mp4":
            slow.append(self)
        return decode(self, path, **options)

    monkeypatch.setattr(DecodeWorker, "decode_and_hash", decoding)
    with meanwhile(lambda: noted(tmp_path, "abcd"), lambda: os.kill(slow[0]._process.pid, signal.SIGALRM)):
        summary = extract(job(mixed, decode_workers=2))
    lines = [json.loads(line) for line in (tmp_path / "features" / "manifest.jsonl").read_text().splitlines()]
    assert lines[-1]["video"] == "0.mp4" and summary.extracted == 3
    assert "decoding took longer than" in dict(summary.failures)["0.mp4"]


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
