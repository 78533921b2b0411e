"""Training on what users give: contradicting flags, records and features that cannot be used, the script itself."""

import json
import sys
from pathlib import Path

import pytest
from training_run import config_of, flags, losses, start, write_run

from fastvid import planning, train
from fastvid.metrics import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("options, message", [
    (["--tune_mm_mlp_adapter", "True", "--mm_use_vid_start_end", "False", "--freeze_mm_mlp_adapter"],
     "nothing would be"),
    (["--weight_decay", "0.1", "--parity", "reference"], "set it to 0"),
    (["--eval_strategy", "steps"], "needs --eval_data_path"),
    (["--logging_steps", "0"], "give 1 or more"),
    (["--report_to", "wandb", "none"], "--report_to wandb: known are tensorboard and none"),
    (["--shard_size", "2"], "--shard_size 2 is for --shard hybrid; add that"),
    (["--peak_tflops", "0"], "--peak_tflops 0: give the device's"),
    (["--model_max_length", "40"], "none of 12 samples looked at can be trained on; the first, clip0"),
    (["--data_weights", "1", "2"], "2 numbers for 1"),
])
def test_contradictions_are_refused_before_any_step(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(flags(run, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_an_unknown_reporter_is_refused_before_anything_is_read(run, tmp_path):
    with pytest.raises(ValueError, match="--report_to wandb: known are"):
        planning.checked(config_of(run, tmp_path, "--report_to", "wandb"))


def test_missing_features_stop_or_are_skipped(run, tmp_path, caplog):
    records = json.loads((run / "train.json").read_text())
    records[3]["video"] = "absent.safetensors"
    records[4]["conversations"][0].pop("value")
    data = tmp_path / "train.json"
    data.write_text(json.dumps(records))
    argv = flags(run, tmp_path / "out", "--data_path", str(data), "--max_steps", "1")
    with pytest.raises(ValueError, match="2 records cannot be used.*(?s:.*)record 3.*absent.*(?s:.*)record 4"):
        train.main(argv)
    assert train.main([*argv, "--on_bad_sample", "skip"]) == 0
    assert "2 of 24 records left out" in caplog.text


def test_a_corrupt_feature_file_costs_its_sample(run, tmp_path, caplog):
    feats = tmp_path / "feats"
    feats.mkdir()
    for path in (run / "feats").iterdir():
        (feats / path.name).write_bytes(path.read_bytes())
    (feats / "clip7.safetensors").write_bytes(b"torn")
    assert train.main(flags(run, tmp_path / "out", "--video_folder", str(feats))) == 0
    assert "skipped sample clip7" in caplog.text
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["skipped_samples"] == 3  # once an epoch
    told = start(["-m", "fastvid.train"], flags(run, tmp_path / "again", "--video_folder", str(feats))).stderr
    assert told.count("skipped sample clip7 (") == 1 and "1 of 12 samples skipped" in told.splitlines()[-1]


def test_dry_run_stops_before_the_first_step(run, tmp_path, caplog):
    assert train.main(flags(run, tmp_path / "out", "--dry_run", "--shard", "full")) == 0
    assert "--shard full: there is one process" in caplog.text
    assert "memory per rank" in caplog.text and not (tmp_path / "out").exists()


def test_torchrun_on_the_script(run, tmp_path):
    script = Path(__file__).resolve().parent.parent / "scripts" / "train.py"
    finished = start([str(script)], flags(run, tmp_path, "--max_steps", "2"), ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert sorted(losses(tmp_path)) == [1, 2]
    finished = start([str(script)], flags(run, tmp_path, "--learning_rte", "1"))
    assert finished.returncode == 2 and "did you mean --learning_rate?" in finished.stderr
    assert sys.version_info >= (3, 11)
