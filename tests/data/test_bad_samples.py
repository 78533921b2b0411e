"""Samples that cannot be trained on: the same for training, validation and inspection; named, counted, and limited."""

import json

import numpy as np
import pytest
import torch
from training_run import CHANNELS, ROWS, SAMPLES, config_of, flags, overflowing, write_run

from fastvid import train, validate
from fastvid.config import InspectConfig, TrainConfig, ValidateConfig
from fastvid.data.dataset import SampleSet
from fastvid.data.tokenizer import load_tokenizer
from fastvid.dist import parallel
from fastvid.features.file import save_features
from fastvid.features.folder import FeatureFolder
from fastvid.flags import parse
from fastvid.inspection import inspect_records
from fastvid.training.metrics import read_metrics

WORLD = parallel.World(0, 1, 0, torch.device("cpu"), False)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture
def feats(run, tmp_path):
    """A copy of the run's features, to be damaged."""
    folder = tmp_path / "feats"
    folder.mkdir()
    for path in (run / "feats").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def turns(*texts, names=("human", "gpt")):
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


GOOD, ASK = {"video": "clip1.pkl", "conversations": turns("<video>\nwhat", "the cat")}, "<video>\nwhat"
# record: whether it can be trained on, without and with --parity reference
TABLE = [
    (GOOD, True, True),
    ({"conversations": turns("what", "the cat")}, True, True),
    ({**GOOD, "id": 3, "system": "x"}, True, True),
    ({"video": ["clip2.mp4"], "conversations": turns("<image> what", "cat", names=("USER", "assistant"))}, True, True),
    (
        {"messages": [{"role": "user", "content": ASK}, {"role": "assistant", "content": "cat"}], "videos": ["clip2"]},
        True,
        True,
    ),
    ({**GOOD, "conversations": turns(ASK)}, False, True),  # the reference masks the sample, and keeps it
    ({**GOOD, "conversations": turns(ASK, "")}, False, True),
    ({**GOOD, "conversations": turns("what", "the cat")}, False, False),
    ({**GOOD, "conversations": turns(ASK + "<video>", "the cat")}, False, False),
    ({**GOOD, "conversations": turns(ASK, "<vid_end>")}, False, False),
    ({**GOOD, "conversations": [*turns(ASK), *turns("what", "cat")]}, False, False),
    ({**GOOD, "conversations": turns("cat", ASK, names=("gpt", "human"))}, False, True),
    ({**GOOD, "conversations": turns(ASK, "what", "cat", names=("gpt", "human"))}, False, False),
    ({"image": "a.jpg", "conversations": turns("<image> what", "the cat")}, False, False),
    ({"conversations": turns("<audio> what", "the cat")}, False, False),
    ({**GOOD, "video": "absent.pkl"}, False, False),
    ({**GOOD, "video": "../clip1.pkl"}, False, False),
    ({"video": "clip1.pkl", "QA": [{"q": "what", "a": None}]}, False, False),
    ("no record", False, False),
]


@pytest.mark.slow
@pytest.mark.parametrize("parity", ["none", "reference"])
def test_training_validation_and_inspection_refuse_the_same_records(run, tmp_path, parity):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([record for record, *_ in TABLE]))
    config = config_of(run, "unused", "--parity", parity, "--on_bad_sample", "skip")
    samples = SampleSet(
        [path], load_tokenizer(config.model_name_or_path, True), FeatureFolder(config.video_folder), config
    )
    assert not any(samples.encode(index).refused for index in range(len(samples)))
    inspected = list(
        inspect_records(
            parse(
                InspectConfig,
                [
                    "--model_name_or_path",
                    str(run / "model"),
                    "--data_path",
                    str(path),
                    "--mm_use_vid_start_end",
                    "--parity",
                    parity,
                    "--video_folder",
                    str(run / "feats"),
                ],
            )
        )
    )
    for number, (record, *fine) in enumerate(TABLE):
        alone = tmp_path / "alone.json"
        alone.write_text(json.dumps([record]))
        report = validate.validate(
            ValidateConfig([str(alone)], video_folder=str(run / "feats"), parity=parity, mm_use_vid_start_end=True)
        )
        expected = fine[parity == "reference"]
        assert (not report.problems) == expected, record
        assert (number in samples.records._numbers) == expected, record
        if not expected:
            ((example,),) = report.examples.values()
            assert inspected[number]["warning"].split("; ")[-1] in example


@pytest.mark.slow
def test_validation_with_a_tokenizer_finds_the_samples_that_are_cut(run, tmp_path, capsys):
    state = train.build(config_of(run, "unused"), WORLD)
    samples = [state.loader.samples.encode(index) for index in range(SAMPLES)]
    longest = max(len(sample.token_ids) for sample in samples)
    argv = [
        "--data_path",
        str(run / "train.json"),
        "--video_folder",
        str(run / "feats"),
        "--model_name_or_path",
        str(run / "model"),
        "--mm_use_vid_start_end",
    ]
    assert validate.main(argv) == 0 and "cut to" not in capsys.readouterr().out
    assert validate.main([*argv, "--model_max_length", str(longest - 1)]) == 0
    cut = sum(len(sample.token_ids) == longest for sample in samples)
    assert f"{cut} record{'s' * (cut > 1)}: cut to its first {longest - 1} tokens" in capsys.readouterr().out
    earliest = sorted(sample.supervised[0][0] for sample in samples)
    assert validate.main([*argv, "--model_max_length", str(earliest[3])]) == 1
    refused = sum(start >= earliest[3] for start in earliest)
    assert f"samples longer than --model_max_length: {refused}\n" in capsys.readouterr().out
    assert validate.main([*argv, "--model_max_length", str(earliest[3]), "--quick"]) == 0
    (tmp_path / "empty").mkdir()
    assert validate.main([*argv, "--model_name_or_path", str(tmp_path / "empty")]) == 1
    assert "no tokenizer: 1\n" in capsys.readouterr().out


def test_all_records_at_fault_end_a_run_whatever_the_flag(run, tmp_path):
    path = tmp_path / "data.json"
    path.write_text(json.dumps([{**GOOD, "conversations": turns(ASK)}] * 2))
    for rule in ("error", "skip"):
        config = parse(
            TrainConfig,
            ["--model_name_or_path", "m", "--data_path", str(path), "--output_dir", "o", "--on_bad_sample", rule],
        )
        with pytest.raises(ValueError, match=r"none of 2 records can be used .*(?s:.)*data\.json: record 0 .from 0."):
            SampleSet([path], None, None, config)


@pytest.mark.slow
def test_remarks_on_records_are_told_once_with_their_number(run, tmp_path, caplog):
    records = json.loads((run / "train.json").read_text())
    for record in records[3:5]:
        record["system"] = "Answer in French."
    records[5]["conversations"][1]["value"] = "the</s>cat"
    (tmp_path / "train.json").write_text(json.dumps(records))
    state = train.build(config_of(run, "unused", "--data_path", str(tmp_path / "train.json")), WORLD)
    list(state.loader.iterate())
    said = [line for line in caplog.text.splitlines() if "'system' is not used" in line]
    assert len(said) == 1 and "2 records: field" in said[0] and "record 3 (from 0)" in said[0]
    assert caplog.text.count('the text holds "</s>"') == 1  # by the record alone, and not again by its sample


@pytest.mark.slow
def test_features_that_are_not_finite_cost_their_sample_with_file_and_remedy(run, feats, tmp_path, caplog, capsys):
    bad = torch.ones(ROWS, CHANNELS)
    bad[2, 0] = float("nan")
    save_features(feats / "clip7.safetensors", bad, {})
    assert train.main(flags(run, tmp_path / "out", "--video_folder", str(feats))) == 0
    said = [line for line in caplog.text.splitlines() if "skipped sample" in line]
    assert len(said) == 1  # of three epochs
    assert "train.json: record 7 (from 0)" in said[0] and "clip7.safetensors holds NaN or infinity" in said[0]
    assert "fastvid extract" in said[0]
    assert read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]["skipped_samples"] == 3
    assert capsys.readouterr().err.splitlines()[-1].endswith("1 of 12 samples skipped")


@pytest.mark.slow
@pytest.mark.parametrize(("damaged", "limit", "ends"), [(4, "0.25", True), (3, "0.25", False), (4, "0.5", False)])
def test_too_many_skipped_samples_end_the_run_and_keep_its_work(run, feats, tmp_path, damaged, limit, ends):
    for i in range(damaged):
        (feats / f"clip{i + 1}.safetensors").write_bytes(b"torn")
    argv = flags(
        run,
        tmp_path / "out",
        "--video_folder",
        str(feats),
        "--max_skipped",
        limit,
        "--num_train_epochs",
        "1",
        "--save_strategy",
        "no",
        "--dataloader_num_workers",
        "0",
    )
    if ends:
        with pytest.raises(ValueError, match=rf"4 of {SAMPLES} samples were skipped, more than --max_skipped 0\.25"):
            train.main(argv)
        assert (tmp_path / "out" / "checkpoint-6").is_dir()
        assert train.main([*argv, "--max_skipped", "0.5"]) == 0  # the remedy
    else:
        assert train.main(argv) == 0


@pytest.mark.slow
def test_a_run_of_too_many_skipped_samples_keeps_no_step_after_one_that_is_not_finite(run, feats, tmp_path, capsys):
    for i in range(SAMPLES):
        path = feats / f"clip{i}.safetensors"
        if i < 4:
            path.write_bytes(b"torn")
        else:
            save_features(path, overflowing(run).repeat(ROWS, 1), {})
    assert (
        train.main(
            flags(
                run,
                tmp_path / "out",
                "--video_folder",
                str(feats),
                "--logging_steps",
                "100",
                "--save_strategy",
                "no",
                "--dataloader_num_workers",
                "0",
            )
        )
        == 1
    )
    assert "is not finite; " in capsys.readouterr().err
    kept = list((tmp_path / "out").glob("checkpoint-*"))
    assert len(kept) == 1 and kept[0].name < "checkpoint-6"


@pytest.mark.slow
def test_cut_samples_and_rounded_features_are_told_once_and_counted_at_the_end(run, feats, tmp_path, caplog, capsys):
    (feats / "clip0.safetensors").unlink()
    np.save(feats / "clip0.npy", np.ones((ROWS, CHANNELS)))
    state = train.build(config_of(run, "unused"), WORLD)
    lengths = sorted(len(state.loader.samples.encode(index).token_ids) for index in range(SAMPLES))
    assert (
        train.main(
            flags(run, tmp_path / "out", "--video_folder", str(feats), "--model_max_length", str(lengths[-1] - 1))
        )
        == 0
    )
    told = [line for line in caplog.text.splitlines() if "said once" in line]
    assert sum("float64: rounded" in line for line in told) == 1
    assert sum(f"cut to its first {lengths[-1] - 1} tokens" in line for line in told) == 1
    err = capsys.readouterr().err
    assert f"1 of {SAMPLES} samples: its features are float64" in err
    assert f"{lengths.count(lengths[-1])} of {SAMPLES} samples: cut to its first" in err
