"""The inspect command: what it prints, line by line."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import GOLDEN, ROOT

from fastvid.config import InspectConfig
from fastvid.data.tokenizer import load_tokenizer
from fastvid.features.file import save_features
from fastvid.flags import parse
from fastvid.inspection import inspect_records, main, render

RECORDED = json.loads((GOLDEN / "tokens.json").read_text())
TRAINING_FLAGS = [
    "--version",
    "v1",
    "--tune_mm_mlp_adapter",
    "True",
    "--bf16",
    "True",
    "--output_dir",
    "nowhere",
    "--num_train_epochs",
    "3",
    "--per_device_train_batch_size",
    "8",
    "--per_device_eval_batch_size",
    "8",
    "--gradient_accumulation_steps",
    "1",
    "--evaluation_strategy",
    "no",
    "--save_strategy",
    "steps",
    "--save_steps",
    "3000",
    "--save_total_limit",
    "3",
    "--learning_rate",
    "2e-5",
    "--weight_decay",
    "0.",
    "--warmup_ratio",
    "0.03",
    "--lr_scheduler_type",
    "cosine",
    "--logging_steps",
    "100",
    "--tf32",
    "True",
    "--model_max_length",
    "2048",
    "--gradient_checkpointing",
    "True",
    "--lazy_preprocess",
    "True",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model's folder with a small tokenizer and a tower's name."""
    from tokenizers import Tokenizer, decoders, models, normalizers, trainers

    folder = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(content=" ", left=1)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=90,
        special_tokens=["<unk>", "<s>", "</s>"],
        show_progress=False,
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyzACSTIUEARN.,:'▁"),
    )
    tokenizer.train_from_iterator(["the cat sat"], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"mm_vision_tower": "openai/clip-vit-large-patch14"}))
    return folder


@pytest.fixture
def data(tmp_path):
    def write(*records, name="data.json"):
        path = tmp_path / name
        path.write_text(json.dumps(records))
        return path

    return write


def record(question, answer, **more):
    return {
        "id": "one",
        "video": "clip.pkl",
        **more,
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }


@pytest.mark.slow
@pytest.mark.parametrize("config", RECORDED["results"])
def test_parity_prints_the_references_ids_and_spans(tiny, data, capsys, config):
    video = {} if "textonly" in config else {"video": "clip.pkl"}
    recorded = RECORDED["results"][config]
    path = data(*({"id": name, **video, "conversations": RECORDED["conversations"][name]} for name in recorded))
    flags = [] if "nose" in config else ["--mm_use_vid_start_end"]
    code = main(
        [
            "--model_name_or_path",
            str(tiny / f"model{config[:3]}"),
            "--data_path",
            str(path),
            *flags,
            *TRAINING_FLAGS,
            "--parity",
            "reference",
            "--json",
        ]
    )
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and len(lines) == len(recorded)
    for text, (name, expected) in zip(lines, recorded.items()):
        line = json.loads(text)
        assert list(line) == ["id", "input_ids", "supervised", "warning"] and line["id"] == name
        if "error" in expected:
            assert line["input_ids"] == [] and line["warning"]
            continue
        ids = [i for run in expected["ids"] for i in ([run[0]] * run[1] if isinstance(run, list) else [run])]
        assert (line["input_ids"], line["supervised"]) == (ids, expected["sup"])
        if expected["warn"]:
            assert expected["warn"] in line["warning"]


@pytest.mark.slow
def test_a_process_prints_one_line_per_record_and_nothing_else(model, data):
    path = data(record("<video>", "the cat"), "no record", record("", "", video="x"), record("<video> \u2028", "sat"))
    command = [
        sys.executable,
        "-m",
        "fastvid.inspection",
        "--model_name_or_path",
        str(model),
        "--data_path",
        str(path),
        *TRAINING_FLAGS,
        "--mm_use_vid_start_end",
        "--json",
    ]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    result = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.rstrip("\n").split("\n")]
    assert [line["warning"] is None for line in lines] == [True, False, False, True]
    assert lines[1]["input_ids"] == [] and lines[2]["input_ids"]
    assert lines[0]["input_ids"].count(load_tokenizer(model, True).tokens.patch) == 356


def test_missing_features_are_shown_with_their_tokens_and_a_warning(model, data, tmp_path):
    (tmp_path / "features").mkdir()
    path = data(record("<video>", "cat"), record("<video>", "cat", video="../data.json"))
    flags = ["--model_name_or_path", str(model), "--data_path", str(path), "--num_video_tokens", "3"]
    bare = list(inspect_records(parse(InspectConfig, flags)))
    lines = list(inspect_records(parse(InspectConfig, [*flags, "--video_folder", str(tmp_path / "features")])))
    assert [line["input_ids"] for line in lines] == [line["input_ids"] for line in bare]
    assert bare[0]["warning"] is None and "clip.pkl" in lines[0]["warning"] and "../data.json" in lines[1]["warning"]


@pytest.mark.parametrize(
    "more, expected", [([], None), (["--parity", "reference"], "[3, 4]"), (["--num_video_tokens", "3"], "[3, 4]")]
)
def test_features_that_training_could_not_use_are_a_warning(model, data, tmp_path, more, expected):
    folder = tmp_path / "features"
    folder.mkdir()
    for name, rows, channels in (("good", 3, 4), ("short", 2, 4), ("wide", 3, 5)):
        save_features(folder / f"{name}.safetensors", torch.ones(rows, channels), {})
    (folder / "evil.pkl").write_bytes(b"cposix\nsystem\n(S'touch " + bytes(tmp_path / "ran") + b"'\ntR.")
    path = data(*(record("<video>", "cat", video=name) for name in ("good", "short", "evil", "evil", "wide")))
    lines = inspect_records(
        parse(
            InspectConfig,
            ["--model_name_or_path", str(model), "--data_path", str(path), "--video_folder", str(folder), *more],
        )
    )
    lines = list(lines)
    patch = load_tokenizer(model, False).tokens.patch
    assert [line["input_ids"].count(patch) for line in lines] == [3, 3 if expected else 2, 3, 3, 3]
    warnings = [line["warning"] for line in lines]
    assert warnings[0] is None
    if expected is None:
        assert warnings[1] is None
    else:
        assert f"short.safetensors: features are [2, 4], expected {expected}" in warnings[1]
    assert "names posix.system" in warnings[2] and warnings[3] == warnings[2]
    assert f"wide.safetensors: features are [3, 5], expected {expected or '[any number, 4]'}" in warnings[4]
    assert not (tmp_path / "ran").exists()


def test_a_guessed_number_of_rows_is_said(model, data, caplog):
    flags = ["--model_name_or_path", str(model), "--data_path", str(data(record("<video>", "cat")))]
    list(inspect_records(parse(InspectConfig, flags)))
    assert "356 rows each, a guess" in caplog.text and "--video_folder" in caplog.text
    caplog.clear()
    list(inspect_records(parse(InspectConfig, [*flags, "--num_video_tokens", "3"])))
    assert not caplog.text


def test_values_that_are_not_finite_are_a_warning(model, data, tmp_path):
    save_features(tmp_path / "clip.safetensors", torch.full((3, 4), float("nan")), {})
    flags = [
        "--model_name_or_path",
        str(model),
        "--data_path",
        str(data(record("<video>", "cat"))),
        "--video_folder",
        str(tmp_path),
    ]
    (line,) = inspect_records(parse(InspectConfig, flags))
    assert "clip.safetensors holds NaN or infinity" in line["warning"] and line["input_ids"]


def test_records_without_an_id_are_named_by_their_number(model, data):
    path = data(*({key: value for key, value in record("<video>", "cat").items() if key != "id"} for _ in range(3)))
    flags = ["--model_name_or_path", str(model), "--data_path", str(path), "--index", "2"]
    assert [line["id"] for line in inspect_records(parse(InspectConfig, flags))] == ["2"]


def test_index_counts_over_all_files(model, data):
    paths = [str(data(record("<video>", "a", id=name), name=f"{name}.json")) for name in ("first", "second")]
    flags = ["--model_name_or_path", str(model), "--data_path", *paths, "--index"]
    assert [line["id"] for line in inspect_records(parse(InspectConfig, [*flags, "1"]))] == ["second"]
    with pytest.raises(ValueError, match="records 0 to 1"):
        list(inspect_records(parse(InspectConfig, [*flags, "2"])))


def test_text_shows_the_whole_conversation_with_placeholders_collapsed(model, data, capsys):
    path = data(record("<video>\nthe cat", "sat. the cat"), record("<video>", ""))
    main(["--model_name_or_path", str(model), "--data_path", str(path), "--mm_use_vid_start_end"])
    out = capsys.readouterr().out
    assert "\033" not in out
    assert "USER:<vid_start><vid_patch>×356<vid_end>the cat ASSISTANT: sat. the cat</s>" in out
    summaries = [line for line in out.splitlines() if line.startswith("── one: ")]
    assert len(summaries) == 2 and "0 supervised" in summaries[1] and "warning: no supervised token" in out


def test_colour_marks_what_is_supervised_and_only_that(model, data):
    path = data(record("<video>\nthe cat", "sat on it"))
    flags = ["--model_name_or_path", str(model), "--data_path", str(path), "--mm_use_vid_start_end"]
    (line,) = inspect_records(parse(InspectConfig, flags))
    text = render(line, load_tokenizer(model, True), colour=True)
    assert text.count("\033[32m") == 2
    assert "ASSISTANT:\033[32m sat on it\033[0m\033[32m</s>\033[0m" in text


@pytest.mark.parametrize(
    ("terminal", "no_color", "coloured"), [(True, "", True), (True, "1", False), (False, "", False)]
)
def test_colour_is_for_terminals_without_no_color(model, data, capsys, monkeypatch, terminal, no_color, coloured):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("NO_COLOR", no_color)
    main(["--model_name_or_path", str(model), "--data_path", str(data(record("<video>", "cat")))])
    assert ("\033[32m" in capsys.readouterr().out) is coloured
