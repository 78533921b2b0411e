"""Training on what users give: contradicting flags, records and features that cannot be used, the script itself."""

import json
import math
import shutil
import sys

import pytest
from conftest import ROOT
from training_run import config_of, flags, losses, start, write_run

from fastvid import train
from fastvid.dist import parallel
from fastvid.training import checks, planning
from fastvid.training.metrics import read_metrics


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--tune_mm_mlp_adapter", "True", "--mm_use_vid_start_end", "False", "--freeze_mm_mlp_adapter"],
            "nothing would be",
        ),
        (["--weight_decay", "0.1", "--parity", "reference"], "set it to 0"),
        (["--eval_strategy", "steps"], "needs --eval_data_path"),
        (
            ["--eval_strategy", "steps", "--evaluation_strategy", "no"],
            "older name of --eval_strategy steps, and differs",
        ),
        (["--report_to", "neptune"], "--report_to neptune: known are tensorboard"),
        (["--memory", "24"], "--memory 24: give a device's free memory, such as 24GiB"),
        (["--shard_size", "2"], "--shard_size 2 is for --shard hybrid; add that"),
        (["--min_lr_ratio", "0.1"], "--min_lr_ratio 0.1 is for schedules that end there; add --lr_scheduler_type"),
        (["--model_max_length", "40"], "none of 12 samples looked at can be trained on; the first, clip0"),
        (["--data_weights", "1", "2"], "2 numbers for 1"),
    ],
)
def test_contradictions_are_refused_before_any_step(run, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train.main(flags(run, tmp_path / "out", *options))
    assert not (tmp_path / "out").exists()


def test_an_unknown_reporter_is_refused_before_anything_is_read(run, tmp_path):
    with pytest.raises(ValueError, match="--report_to neptune: known are"):
        checks.checked(config_of(run, tmp_path, "--report_to", "neptune"))


@pytest.mark.slow
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


@pytest.mark.slow
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
    assert "operations of a step" in caplog.text and f"those of {run / 'model'} fit the model" in caplog.text


def test_a_dry_run_wants_no_weights(run, tmp_path, caplog):
    model = tmp_path / "model"
    shutil.copytree(run / "model", model, ignore=shutil.ignore_patterns("*.safetensors", "*.bin", "*index*"))
    argv = flags(run, tmp_path / "out", "--dry_run", "--model_name_or_path", str(model))
    assert train.main([*argv, "--memory", "3 GB"]) == 0
    assert f"{model} holds none yet" in caplog.text and "dry run: steps that would follow: 18" in caplog.text
    assert f"{0.92 * 3e9 / 2**30:.1f} GiB (92% of 2.8 GiB that --memory names)" in caplog.text
    caplog.clear()
    assert train.main([*argv, "--memory", "1.5GiB"]) == 0 and "more than there is" not in caplog.text
    assert train.main([*argv, "--memory", "0.02GiB"]) == 0 and "more than there is" in caplog.text


@pytest.mark.parametrize(
    "options, of_cpu",
    [(["--dry_run"], True), (["--dry_run", "--memory", "24GiB"], False), (["--memory", "24GiB"], True)],
)
def test_a_dry_run_with_memory_plans_for_a_gpu(run, tmp_path, monkeypatch, options, of_cpu):
    found, estimate = [], planning.memory.estimate
    monkeypatch.setattr(planning.memory, "estimate", lambda *a, **k: found.append(k["on_cpu"]) or estimate(*a, **k))
    train.prepare(config_of(run, tmp_path / "out", "--attn_implementation", "sdpa", *options), parallel.start())
    assert set(found) == {of_cpu}


def test_a_dry_run_refuses_weights_that_do_not_fit(run, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(run / "model", model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "intermediate_size": config["intermediate_size"] + 4}))
    with pytest.raises(ValueError, match="gate_proj"):
        train.main(flags(run, tmp_path / "out", "--dry_run", "--model_name_or_path", str(model)))


@pytest.mark.parametrize(
    "options, told",
    [
        (
            [],
            [
                "data: 12 samples in 1 file, 12 an epoch; 6 steps an epoch, 2 samples each; 3 epochs, 18 steps",
                "trained: projector ",
                ", start and end embeddings ",
                "computing: fp32 on CPU, ",
                "attention sdpa",
            ],
        ),
        (
            [
                "--gradient_accumulation_steps",
                "3",
                "--max_steps",
                "4",
                "--tune_mm_mlp_adapter",
                "False",
                "--bf16",
                "True",
            ],
            [
                "2 steps an epoch, 2 samples x 3 micro-batches each; 2 epochs, 4 steps",
                "decoder ",
                "(100.00%)",
                "computing: bf16",
            ],
        ),
        (["--tokens_per_batch", "300"], ["12 an epoch; ", "300 tokens each"]),
        (["--parity", "reference"], ["6 steps an epoch, 2 samples each; 3 epochs, 18 steps"]),
    ],
)
def test_a_run_tells_what_it_consists_of(run, tmp_path, caplog, options, told):
    config = config_of(run, tmp_path / "out", *options)
    found = train.prepare(config, parallel.start())
    assert all(word in caplog.text for word in told), caplog.text
    state_dict = train.build(config, parallel.start()).model.named_parameters()
    number = sum(parameter.numel() for _, parameter in state_dict if parameter.requires_grad)
    assert f"; {number:,} of " in caplog.text and found.config.logging_steps == 1


@pytest.mark.parametrize(
    "flag, value, expected",
    [("logging_steps", "0.1", 2), ("save_steps", "0.5", 9), ("eval_steps", "0.01", 1), ("save_steps", "7", 7)],
)
def test_below_one_steps_are_a_share_of_all(run, tmp_path, flag, value, expected):
    config = config_of(run, tmp_path / "out", f"--{flag}", value)
    assert getattr(planning.with_whole_steps(config, 18), flag) == expected


@pytest.mark.parametrize(
    "options, expected",
    [
        (["--warmup_steps", "0.25", "--warmup_ratio", "0"], 5),
        (["--warmup_steps", "4"], 4),
        (["--warmup_steps", "0"], 2),
        (["--warmup_steps", "1"], 1),
    ],
)
def test_a_warm_up_is_steps_or_a_share(run, tmp_path, options, expected):
    assert planning.warmup_steps(config_of(run, tmp_path / "out", *options), 18) == expected


@pytest.mark.slow
def test_a_run_of_shares(run, tmp_path):
    argv = flags(run, tmp_path, "--logging_steps", "0.34", "--save_steps", "0.5", "--warmup_steps", "0.5")
    assert train.main(argv) == 0
    assert sorted(losses(tmp_path)) == [7, 14, 18] and (tmp_path / "checkpoint-9").is_dir()
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert rates[7] == pytest.approx(1e-2 * 6 / 9)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule, options, share",
    [("warmup_stable_decay", ["--decay_steps", "0.5"], 8 / 9), ("cosine_with_min_lr", [], 15 / 16)],
)
def test_a_schedule_that_ends_above_zero(run, tmp_path, schedule, options, share):
    """The last of 18 steps, of which two warm up, is a step before the end of what falls."""
    argv = flags(run, tmp_path, "--logging_steps", "1", "--lr_scheduler_type", schedule, "--min_lr_ratio", "0.2")
    assert train.main([*argv, *options]) == 0
    rates = {line["step"]: line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl")}
    assert rates[18] == pytest.approx(1e-2 * (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi * share))))


@pytest.mark.slow
@pytest.mark.parametrize("options, steps", [([], [6, 12, 18]), (["--eval_strategy", "no"], [])])
def test_a_validation_set_alone_is_used_after_each_epoch(run, tmp_path, options, steps):
    argv = flags(run, tmp_path, "--eval_data_path", str(run / "train.json"), *options)
    assert train.main(argv) == 0
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in line] == steps


@pytest.mark.slow
def test_torchrun_on_the_script(run, tmp_path):
    script = ROOT / "scripts" / "train.py"
    finished = start([str(script)], flags(run, tmp_path, "--max_steps", "2"), ranks=2)
    assert finished.returncode == 0, finished.stderr
    assert sorted(losses(tmp_path)) == [1, 2]
    finished = start([str(script)], flags(run, tmp_path, "--learning_rte", "1"))
    assert finished.returncode == 2 and "did you mean --learning_rate?" in finished.stderr
    assert sys.version_info >= (3, 11)
