"""Training on videos: each is encoded once, when it is first needed, and the run is that on features made before."""

import json
import os
import shutil
import signal
import socket
import time

import pytest
import torch
from online_run import FRAMES, ROWS, VIDEOS, forked, online_flags, start_quickly, write_videos
from safetensors.torch import load_file
from towers import write_tower
from training_run import CHANNELS, SAMPLES, losses

from fastvid import extract, inspection, train, validate
from fastvid.checkpoints import checkpoint
from fastvid.config import TrainConfig
from fastvid.data.video_tokens import VideoRows
from fastvid.dist.processes import started
from fastvid.features.folder import MissingFeatures
from fastvid.features.manifest import NAME, read_manifest
from fastvid.flags import parse
from fastvid.online import encoder
from fastvid.online.folder import OnlineFeatures
from fastvid.training.metrics import read_metrics
from fastvid.video.features import VideoFeatures


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Videos, records, a model and a tower; feats/ as `fastvid extract` makes them, before/ of a run on those."""
    torch.set_num_threads(1)  # as forks of this process have it
    run = write_videos(tmp_path_factory.mktemp("run"))
    extract.extract(
        extract.ExtractConfig(
            str(run / "videos"),
            str(run / "feats"),
            vision_tower=str(run / "tower"),
            num_frames=FRAMES,
            decode_workers=1,
        )
    )
    assert train.main(online_flags(run, run / "before", "--video_folder", str(run / "feats"))) == 0
    return run


LAUNCH = encoder.launch


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    start_quickly(monkeypatch)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def entries(folder):
    """Lines of a manifest, but for times."""
    found = [json.loads(line) for line in (folder / NAME).read_text().splitlines()]
    return sorted(
        ({key: value for key, value in line.items() if key not in ("time", "seconds", "written")} for line in found),
        key=lambda line: line["video"],
    )


def parameters(output):
    return load_file(output / "mm_projector.safetensors")


def copy(run, folder):
    """The run's inputs at a place of its own, without features."""
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("before", "feats", "tower"))
    (folder / "tower").symlink_to(run / "tower")
    return folder


def with_data(argv, path):
    argv[argv.index("--data_path") + 1] = str(path)
    return argv


class Spy:
    """Counts the encoders that are started."""

    def __init__(self, patch):
        self.encoders, launch = [], encoder.launch
        patch.setattr(encoder, "launch", lambda *files: self.encoders.append(launch(*files)) or self.encoders[-1])


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_on_videos_is_that_on_features_made_before(run, tmp_path, workers, monkeypatch, caplog):
    out, spy = tmp_path / "out", Spy(monkeypatch)
    assert train.main(online_flags(run, out, "--dataloader_num_workers", workers)) == 0
    assert losses(out) == losses(run / "before") and len(losses(out)) == SAMPLES // 2
    mine, theirs = parameters(out), parameters(run / "before")
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert files(out / "features") == files(run / "feats") and len(files(run / "feats")) == len(VIDEOS)
    assert entries(out / "features") == entries(run / "feats")  # so each was encoded once
    assert os.listdir(out / "features") == os.listdir(run / "feats")  # no lease is left
    assert len(spy.encoders) == 1 and started(spy.encoders[0].pid) is None
    states = [checkpoint.read_state(each / f"checkpoint-{SAMPLES // 2}") for each in (out, run / "before")]
    for name in ("provenance", "content"):
        assert states[0][name] == states[1][name]
    assert states[0]["provenance"]["decoder"] and "12 are encoded when they are needed" in caplog.text
    caplog.clear()
    again = online_flags(run, tmp_path / "again", "--clip_feat_path", str(out / "features"), "--max_steps", "1")
    assert train.main(again) == 0 and len(spy.encoders) == 1
    assert "12 have one in" in caplog.text and losses(tmp_path / "again")[1] == losses(run / "before")[1]
    config = extract.ExtractConfig(
        str(run / "videos"), str(out / "features"), vision_tower=str(run / "tower"), num_frames=FRAMES, decode_workers=1
    )
    assert extract.extract(config).skipped == len(VIDEOS)


@pytest.mark.slow
def test_some_have_features_and_some_are_videos(run, tmp_path, monkeypatch):
    mixed = copy(run, tmp_path / "mixed")
    for name in ("clip0", "sub/clip7"):
        shutil.copy(run / "feats" / f"{name}.safetensors", mixed / "videos" / name.rpartition("clip")[0])
        (mixed / "videos" / f"{name}.mp4").write_bytes(b"is not looked at")
    made = tmp_path / "made"  # by an extraction that has not come to its end
    (made / "sub").mkdir(parents=True)
    for name in ("clip1", "sub/clip8"):
        shutil.copy(run / "feats" / f"{name}.safetensors", made / name.rpartition("clip")[0])
    argv = online_flags(mixed, tmp_path / "out", "--clip_feat_path", str(made), "--vision_tower", str(run / "tower"))
    assert train.main(argv) == 0
    assert losses(tmp_path / "out") == losses(run / "before")
    expected = files(run / "feats")
    assert files(made) == {
        name: expected[name] for name in expected if name not in ("clip0.safetensors", "sub/clip7.safetensors")
    }
    assert {line["video"] for line in entries(made)} == set(VIDEOS) - {
        "clip0.mp4",
        "sub/clip7.mp4",
        "clip1.mp4",
        "sub/clip8.mp4",
    }


@pytest.mark.slow
def test_a_validation_set_of_videos(run, tmp_path, monkeypatch):
    spy, data = Spy(monkeypatch), tmp_path / "half.json"
    data.write_text(json.dumps(json.loads((run / "train.json").read_text())[:6]))
    for output, folder in (("before", "feats"), ("out", "videos")):
        argv = online_flags(
            run,
            tmp_path / output,
            "--video_folder",
            str(run / folder),
            "--max_steps",
            "2",
            "--eval_data_path",
            str(run / "train.json"),
            "--eval_strategy",
            "steps",
            "--eval_steps",
            "1",
        )
        assert train.main(with_data(argv, data)) == 0
    found, expected = (
        [line["eval_loss"] for line in read_metrics(tmp_path / output / "metrics.jsonl") if "eval_loss" in line]
        for output in ("out", "before")
    )
    assert found == expected and len(found) == 2 and len(spy.encoders) == 1


@pytest.mark.slow
def test_a_short_run_encodes_what_it_needs(run, tmp_path):
    """And is done when it is: another run goes on with what is left."""
    out = tmp_path / "out"
    data = tmp_path / "some.json"
    data.write_text(json.dumps(json.loads((run / "train.json").read_text())[:2]))
    assert train.main(with_data(online_flags(run, out), data)) == 0
    assert set(files(out / "features")) == {"clip0.safetensors", "clip1.safetensors"}


@pytest.mark.slow
def test_a_broken_video_costs_its_sample_once_a_run(run, tmp_path, caplog):
    broken, out = copy(run, tmp_path / "broken"), tmp_path / "out"
    whole = (broken / "videos" / "clip3.mp4").read_bytes()
    (broken / "videos" / "clip3.mp4").write_bytes(b"no video")
    argv = online_flags(broken, out, "--num_train_epochs", "2")
    assert train.main(argv) == 0
    said = [line for line in caplog.text.splitlines() if "skipped sample clip3" in line]
    assert len(said) == 1 and "video 'clip3.mp4' has no features: cannot be opened" in said[0]
    assert read_metrics(out / "metrics.jsonl")[-1]["skipped_samples"] == 2  # once an epoch
    assert read_manifest(out / "features")["clip3.mp4"]["status"] == "failed"
    assert sum(line["video"] == "clip3.mp4" for line in entries(out / "features")) == 1  # tried once in two epochs
    assert (
        validate.main(
            [
                "--data_path",
                str(broken / "train.json"),
                "--video_folder",
                str(broken / "videos"),
                "--clip_feat_path",
                str(out / "features"),
                "--mm_use_vid_start_end",
            ]
        )
        == 1
    )
    with pytest.raises(ValueError, match="1 of 12 samples were skipped, more than --max_skipped 0.01"):
        train.main([*argv, "--resume", "never", "--max_skipped", "0.01"])
    (broken / "videos" / "clip3.mp4").write_bytes(whole)  # another run looks again
    assert train.main(online_flags(broken, tmp_path / "third", "--clip_feat_path", str(out / "features"))) == 0
    assert losses(tmp_path / "third") == losses(run / "before")


# What is refused


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, message",
    [
        ("../run/videos/clip0.mp4", r'has "\.\."; give it relative'),
        ("{run}/videos/clip0.mp4", "it is absolute"),
        ("linked.mp4", "lies there, but is a video; .*Links in that folder were not followed"),
        ("elsewhere/clip0.mp4", "is a link that leads out of"),
        ("clip", "has no features in"),
        ("twin.mp4", r"twin.* would be written to twin\.safetensors as well; rename one of them"),
        ("two", r"means any of two\.a, two\.b in .*; give the whole name"),
    ],
)
def test_names_that_are_refused(run, tmp_path, name, message):
    folder = tmp_path / "videos"
    folder.mkdir()
    for each in ("twin.mp4", "twin.mkv", "two.a.mp4", "two.b.mp4"):
        shutil.copy(run / "videos" / "clip0.mp4", folder / each)
    link = folder / ("elsewhere" if "/" in name else "linked.mp4")
    link.symlink_to(run / "videos" if "/" in name else run / "videos" / "clip0.mp4")
    config = parse(TrainConfig, online_flags(run, tmp_path / "out", "--video_folder", str(folder)))
    features = OnlineFeatures(config)
    with pytest.raises(ValueError, match=message):
        features.resolve(name.format(run=run))
    assert features.unmade == []


@pytest.mark.slow
def test_a_name_means_the_file_that_an_extraction_would_have_written(run, tmp_path):
    features = OnlineFeatures(parse(TrainConfig, online_flags(run, tmp_path / "out")))
    for name in ("clip0.mp4", "clip0.pkl", "clip0", "./clip0.mp4"):
        assert features.resolve(name) == tmp_path / "out" / "features" / "clip0.safetensors"
    assert features.resolve("sub/clip6.mkv") == tmp_path / "out" / "features" / "sub" / "clip6.safetensors"
    assert [video.name for video in features.unmade] == ["clip0.mp4", "sub/clip6.mp4"]
    with pytest.raises(MissingFeatures):
        features.resolve("clip6.mp4")  # of another folder
    features.settle()
    assert features.shape("clip0") == (ROWS, CHANNELS) and VideoRows(features, []).first is None
    with pytest.raises(ValueError, match="they are made when training comes to it"):
        features.load("clip0")
    with pytest.raises(AssertionError):
        features.await_made("clip0")


@pytest.mark.slow
def test_bad_combinations_are_refused_before_any_step(run, tmp_path):
    def attempt(*more, without=()):
        argv = online_flags(run, tmp_path / "out", "--dry_run", *more)
        for flag in without:
            argv = [word for word, before in zip(argv, ["", *argv]) if flag not in (word, before)]
        return train.main(argv)

    def other_settings(message, *more):
        with pytest.raises(ValueError, match=message):
            attempt(*more, "--clip_feat_path", str(feats))
        assert attempt(*more, "--clip_feat_path", str(tmp_path / "another")) == 0
        argv = [
            "--video_dir_path",
            str(run / "videos"),
            "--clip_feat_path",
            str(feats),
            "--vision_tower",
            str(run / "tower"),
            "--num_frames",
            str(FRAMES),
            "--decode_workers",
            "1",
            *more,
        ]
        assert extract.main([*argv, "--overwrite", "True"]) == 0
        assert attempt(*more, "--clip_feat_path", str(feats)) == 0

    feats = shutil.copytree(run / "feats", tmp_path / "feats")
    write_tower(tmp_path / "wide", hidden_size=CHANNELS + 2, heads=2)
    write_tower(tmp_path / "other", hidden_size=CHANNELS, heads=2, seed=1)
    with pytest.raises(ValueError, match=f"features of {CHANNELS + 2} channels, and the model takes {CHANNELS}"):
        attempt("--vision_tower", str(tmp_path / "wide"))
    assert attempt() == 0
    with pytest.raises(ValueError, match="no such folder; give the tower's"):
        attempt("--vision_tower", str(tmp_path / "nowhere"))
    other_settings(
        r"other settings.*--clip_feat_path, or .*--overwrite True \(of fastvid extract\)",
        "--vision_tower",
        str(tmp_path / "other"),
    )
    other_settings("made with tower_revision|made with num_frames 4, not 5", "--num_frames", "5")
    with pytest.raises(ValueError, match="is no folder"):
        attempt("--video_folder", str(run / "train.json"))
    bare = copy(run, tmp_path / "bare")
    config = json.loads((bare / "model" / "config.json").read_text())
    config.pop("mm_vision_tower")
    (bare / "model" / "config.json").write_text(json.dumps(config))
    bare_model = ("--model_name_or_path", str(bare / "model"))
    with pytest.raises(ValueError, match="nothing tells which tower makes them: name it with --vision_tower"):
        attempt(*bare_model, without=["--vision_tower"])
    assert attempt(*bare_model) == 0
    config["mm_vision_tower"] = str(run / "tower")
    (bare / "model" / "config.json").write_text(json.dumps(config))
    assert attempt(*bare_model, without=["--vision_tower"]) == 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_tower_that_cannot_be_loaded_ends_the_run(run, tmp_path):
    shutil.copytree(run / "tower", tmp_path / "tower")
    (tmp_path / "tower" / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot load the vision tower"):
        train.main(online_flags(run, tmp_path / "out", "--vision_tower", str(tmp_path / "tower")))


# What others say about it


@pytest.mark.slow
def test_a_dry_run_validate_and_inspect(run, tmp_path, caplog, capsys):
    made = tmp_path / "made"
    made.mkdir()
    shutil.copy(run / "feats" / "clip0.safetensors", made)
    more = ("--clip_feat_path", str(made))
    assert train.main(online_flags(run, tmp_path / "out", "--dry_run", *more)) == 0
    assert (
        f"features: 12 videos of --video_folder have no feature file there; 1 have one in {made}, 11 are encoded "
        f"when they are needed, by {run / 'tower'} (8 × {CHANNELS} each)"
    ) in caplog.text
    assert train.main(online_flags(run, tmp_path / "out", "--dry_run", "--memory", "24GiB", *more)) == 0
    assert "less 6 GiB for the tower that encodes videos" in caplog.text
    argv = ["--data_path", str(run / "train.json"), "--video_folder", str(run / "videos"), "--mm_use_vid_start_end"]
    assert validate.main([*argv, *more]) == 0
    out = capsys.readouterr().out
    assert "usable            1\n" in out and "to be made       11\n" in out and "nothing wrong" in out
    model = ["--model_name_or_path", str(run / "model"), "--vision_tower", str(run / "tower"), "--num_frames", "4"]
    assert validate.main([*argv, *more, *model, "--model_max_length", "12"]) == 1  # their rows count
    assert "samples longer than --model_max_length: 12\n" in capsys.readouterr().out
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match="name the folder that receives them with --clip_feat_path"):
        inspection.main([*argv, *model])
    assert inspection.main([*argv, *more, *model, "--index", "1", "--html", str(page)]) == 0
    assert "warning: video 'clip1.mp4' has no features: they are made when" in capsys.readouterr().out
    assert "There are no features" in page.read_text() and "data:image" in page.read_text()
    assert os.listdir(made) == ["clip0.safetensors"] and not (tmp_path / "out").exists()


# Death, signals, several ranks


def on_first_wait(patch, act):
    """Have encoders take a minute for each video, and call `act(encoder)` when features are waited for, be it in a
    forked reader."""
    wait = encoder.Encoder.wait
    patch.setattr(VideoFeatures, "extract", lambda self, video: time.sleep(60))

    def acted(self, number, stopped=lambda: False):
        act(self)
        wait(self, number, stopped)

    patch.setattr(encoder.Encoder, "wait", acted)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_an_encoder_that_dies_ends_the_run_and_the_same_command_goes_on(run, tmp_path, monkeypatch, workers):
    argv = online_flags(run, tmp_path / "out", "--dataloader_num_workers", workers)
    with monkeypatch.context() as patch:
        on_first_wait(patch, lambda self: os.kill(self.pid, signal.SIGKILL))
        with pytest.raises(ChildProcessError, match="process that encodes videos has died .*the same command again"):
            train.main(argv)
    spy = Spy(monkeypatch)
    if workers == "2":  # the other remedy
        made = tmp_path / "out" / "features"
        assert (
            extract.main(
                [
                    "--video_dir_path",
                    str(run / "videos"),
                    "--clip_feat_path",
                    str(made),
                    "--vision_tower",
                    str(run / "tower"),
                    "--num_frames",
                    str(FRAMES),
                ]
            )
            == 0
        )
    assert train.main(argv) == 0 and len(spy.encoders) == (workers == "0")
    assert losses(tmp_path / "out") == losses(run / "before")
    assert files(tmp_path / "out" / "features") == files(run / "feats")


@pytest.mark.slow
def test_an_encoder_that_hangs_ends_the_run(run, tmp_path, monkeypatch):
    on_first_wait(monkeypatch, lambda self: setattr(self, "patience", 0.3))
    monkeypatch.setattr(encoder, "_GRACE", 0.1)
    with pytest.raises(ChildProcessError, match="has not finished one for 0.3 s"):
        train.main(online_flags(run, tmp_path / "out"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_signal_while_a_video_is_waited_for_stops_the_run(run, tmp_path, monkeypatch, workers):
    begun, trainer, spy = [], os.getpid(), Spy(monkeypatch)

    def stop(self):
        if not begun:
            begun.append(True)
            os.kill(trainer, signal.SIGTERM)

    on_first_wait(monkeypatch, stop)
    monkeypatch.setattr(encoder, "_GRACE", 0.1)
    assert train.main(online_flags(run, tmp_path / "out", "--dataloader_num_workers", workers)) == 128 + 15
    assert (tmp_path / "out" / "checkpoint-0").exists() and started(spy.encoders[0].pid) is None


@pytest.mark.slow
def test_a_full_disk_ends_the_run(run, tmp_path):
    (tmp_path / "features").mkdir()
    (tmp_path / "features" / ".leases").write_text("in the way")
    with pytest.raises(OSError, match=r"exists.*\.leases|Not a directory"):
        train.main(online_flags(run, tmp_path / "out", "--clip_feat_path", str(tmp_path / "features")))


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(run, tmp_path, monkeypatch):
    """The encoder of a killed trainer ends as well; what it has made stays, what it had leased is free."""
    out, made = tmp_path / "out", tmp_path / "out" / "features"
    argv = online_flags(run, out)
    with monkeypatch.context() as patch:
        patch.setattr(encoder, "launch", LAUNCH)
        trainer = forked(train.main, argv)
    end = time.monotonic() + 120
    while not files(made):
        assert trainer.is_alive() and time.monotonic() < end
        time.sleep(0.002)
    (owner,) = made.glob(".leases/*.owner")
    pid = json.loads(owner.read_text())["pid"]
    trainer.kill()
    trainer.join()
    while started(pid) is not None:
        assert time.monotonic() < end
        time.sleep(0.01)
    before = files(made)
    assert train.main(argv) == 0
    assert files(made) == files(run / "feats") and before.items() <= files(made).items()
    assert losses(out) == losses(run / "before")
    assert not list(made.rglob("*.tmp")) and sorted(os.listdir(made)) == sorted(os.listdir(run / "feats"))


@pytest.mark.slow
def test_two_ranks_encode_each_video_once(run, tmp_path):
    argv = online_flags(run, tmp_path, "--per_device_train_batch_size", "1")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        forked(
            train.main,
            argv,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE="2",
            LOCAL_WORLD_SIZE="2",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
        for rank in range(2)
    ]
    for rank in ranks:
        rank.join(120)
        assert rank.exitcode == 0
    assert files(tmp_path / "features") == files(run / "feats")
    assert [line["status"] for line in entries(tmp_path / "features")] == ["ok"] * len(VIDEOS)
    assert losses(tmp_path) == pytest.approx(losses(run / "before"), rel=1e-5)
    assert sorted(os.listdir(tmp_path / "features")) == sorted(os.listdir(run / "feats"))
