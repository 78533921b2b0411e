"""Training on videos with two vision towers: each makes its features, and the run is that on features made before."""

import shutil

import pytest
import torch
from online_run import FRAMES, ROWS, VIDEOS, online_flags, start_quickly, write_videos
from safetensors.torch import load_file
from towers import write_tower
from training_run import CHANNELS, SAMPLES, SECOND_CHANNELS, losses

from fastvid import extract, train, validate
from fastvid.dist.processes import started
from fastvid.features.file import load_features
from fastvid.online import encoder
from fastvid.provenance import of_weights


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """What `write_videos` writes, and tower_2/; feats/ and feats_2/ as extracted, before/ of a run on them."""
    torch.set_num_threads(1)  # as forks of this process have it
    run = write_videos(tmp_path_factory.mktemp("run"))
    write_tower(run / "tower_2", hidden_size=SECOND_CHANNELS, heads=2, image_size=42, seed=1)
    for which in ("", "_2"):
        made = extract.ExtractConfig(
            str(run / "videos"),
            str(run / f"feats{which}"),
            vision_tower=str(run / f"tower{which}"),
            num_frames=FRAMES,
            decode_workers=1,
        )
        assert extract.extract(made).extracted == len(VIDEOS)
    feats = "--video_folder", str(run / "feats"), "--video_folder_2", str(run / "feats_2")
    assert train.main(online_flags(run, run / "before", *feats)) == 0
    return run


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    start_quickly(monkeypatch)


def both(run, output, *more):
    second = "--video_folder_2", str(run / "videos"), "--vision_tower_2", str(run / "tower_2")
    return online_flags(run, output, *second, *more)


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.safetensors")}


def assert_same_run(out, before):
    assert losses(out) == losses(before) and len(losses(out)) == SAMPLES // 2
    mine, theirs = (load_file(folder / "mm_projector.safetensors") for folder in (out, before))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_run_on_videos_is_that_on_both_towers_features(run, tmp_path, workers, monkeypatch, caplog):
    out, encoders, launch = tmp_path / "out", [], encoder.launch
    monkeypatch.setattr(encoder, "launch", lambda *given: encoders.append(launch(*given)) or encoders[-1])
    assert train.main(both(run, out, "--dataloader_num_workers", workers)) == 0
    assert_same_run(out, run / "before")
    for which in ("", "_2"):
        assert files(out / f"features{which}") == files(run / f"feats{which}")
        assert f"{len(VIDEOS)} videos of --video_folder{which} have no feature file there" in caplog.text
    assert len(encoders) == 2 and not any(started(each.pid) for each in encoders)
    told, before = of_weights(out / "checkpoint-6"), of_weights(run / "before" / "checkpoint-6")
    assert told == before and told.second is not None and told.second.tower == str(run / "tower_2")
    # What was made is used again, and the second tower is that of the weights.
    caplog.clear()
    start = "--pretrain_mm_mlp_adapter", str(out), "--clip_feat_path", str(out / "features"), "--max_steps", "1"
    again = both(run, tmp_path / "again", *start)
    at = again.index("--vision_tower_2")
    assert train.main(again[:at] + again[at + 2 :]) == 0 and len(encoders) == 2
    assert caplog.text.count(f"{len(VIDEOS)} have one in") == 2


@pytest.mark.slow
@pytest.mark.parametrize("there", [("", "_2"), ("_2", "")])
def test_features_of_one_tower_may_be_there(run, tmp_path, there):
    made, to_make = there
    given = f"--video_folder{made}", str(run / f"feats{made}")
    assert train.main(both(run, tmp_path / "out", *given)) == 0
    assert_same_run(tmp_path / "out", run / "before")
    assert files(tmp_path / "out" / f"features{to_make}") == files(run / f"feats{to_make}")
    assert not (tmp_path / "out" / f"features{made}").exists()


@pytest.mark.slow
def test_a_second_tower_makes_what_it_made_for_the_weights(run, tmp_path, caplog):
    """Of other frames and another pooling than the first one's."""
    grid = extract.ExtractConfig(
        str(run / "videos"),
        str(tmp_path / "grids"),
        vision_tower=str(run / "tower_2"),
        num_frames=2,
        pooling="grid:2x2x2",
        decode_workers=1,
    )
    extract.extract(grid)
    feats = "--video_folder", str(run / "feats"), "--video_folder_2", str(tmp_path / "grids")
    assert train.main(online_flags(run, tmp_path / "first", *feats)) == 0
    start = "--pretrain_mm_mlp_adapter", str(tmp_path / "first"), "--video_folder", str(run / "feats")
    more = "--num_frames", str(FRAMES), "--pooling", "temporal+spatial", "--max_steps", "1"
    assert train.main(both(run, tmp_path / "out", *start, *more)) == 0
    assert files(tmp_path / "out" / "features_2").items() <= files(tmp_path / "grids").items()
    assert files(tmp_path / "out" / "features_2")
    assert f"--num_frames {FRAMES} and --pooling temporal+spatial of the first tower alone: " in caplog.text


@pytest.mark.slow
def test_what_training_would_make_is_checked_before(run, tmp_path, capsys):
    out, words = tmp_path / "out", both(run, tmp_path / "out", "--dry_run", "True")
    assert train.main(words) == 0 and not (out / "features_2").exists()
    at = words.index("--vision_tower_2")
    with pytest.raises(
        ValueError, match="--vision_tower_2 .* in --video_folder_2; give that folder, or leave the flag out"
    ):
        train.main([*online_flags(run, out, "--dry_run", "True"), *words[at : at + 2]])
    assert train.main(online_flags(run, out, "--dry_run", "True")) == 0
    with pytest.raises(
        ValueError, match=r"videos in --video_folder_2 \S+ have no features, .*: name it with --vision_tower_2"
    ):
        train.main(words[:at] + words[at + 2 :])
    start = "--pretrain_mm_mlp_adapter", str(run / "before")
    with pytest.raises(ValueError, match=rf"{CHANNELS} channels, and the model takes {SECOND_CHANNELS}; .*_tower_2"):
        train.main([*words, *start, "--vision_tower_2", str(run / "tower")])
    assert train.main([*words, *start]) == 0
    both_in_one = shutil.copytree(run / "feats", tmp_path / "both")
    with pytest.raises(ValueError, match=r"both/\S+ would be the features of both towers; give the second one's"):
        train.main([*words, "--video_folder", str(both_in_one), "--video_folder_2", str(both_in_one)])
    assert train.main([*words, "--video_folder", str(both_in_one)]) == 0
    checked = ["--data_path", str(run / "train.json"), "--model_name_or_path", str(run / "model")]
    checked += ["--num_frames", str(FRAMES), "--mm_use_vid_start_end", "--vision_tower_2", str(run / "tower_2")]
    checked += ["--video_folder", str(run / "feats"), "--video_folder_2", str(run / "videos")]
    assert validate.main(checked) == 0
    told = capsys.readouterr().out
    assert f"{len(VIDEOS)} videos have no features yet; training makes them" in told
    rows = FRAMES + 9
    assert load_features(run / "feats_2" / "clip0.safetensors")[0].shape == (rows, SECOND_CHANNELS)
    assert validate.main([*checked, "--num_video_tokens", "1"]) == 1
    assert f"has {ROWS} and {rows} rows instead of 1; leave" in capsys.readouterr().out
