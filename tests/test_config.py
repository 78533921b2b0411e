"""Configuration: the reference's command line, YAML files, mistakes, and what each flag combination trains."""

import dataclasses
import itertools
import json
import math
import re
import shlex

import pytest
from conftest import ROOT

from fastvid import config as configs
from fastvid.config import ChatConfig, ConvertConfig, ExtractConfig, InspectConfig, TrainConfig
from fastvid.config.policy import POLICIES, Trainable
from fastvid.flags import parse

REFERENCE = shlex.split("""
    --model_name_or_path llava --version v1 --data_path train.json --video_folder features --tune_mm_mlp_adapter True
    --mm_use_vid_start_end --bf16 True --output_dir out --num_train_epochs 3 --per_device_train_batch_size 8
    --per_device_eval_batch_size 8 --gradient_accumulation_steps 1 --evaluation_strategy "no" --save_strategy "steps"
    --save_steps 3000 --save_total_limit 3 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.03
    --lr_scheduler_type "cosine" --logging_steps 100 --tf32 True --model_max_length 2048 --gradient_checkpointing True
    --lazy_preprocess True
""")
TRAIN = ["--model_name_or_path", "llava", "--data_path", "train.json", "--output_dir", "out"]
CLASSES = [
    value for value in vars(configs).values() if dataclasses.is_dataclass(value) and value.__name__.endswith("Config")
]


def error_of(capsys, config_class, argv):
    with pytest.raises(SystemExit) as exit:
        parse(config_class, argv)
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_reference_command_line():
    config = parse(TrainConfig, REFERENCE)
    assert config == TrainConfig(
        model_name_or_path="llava",
        data_path=["train.json"],
        version="v1",
        video_folder="features",
        tune_mm_mlp_adapter=True,
        mm_use_vid_start_end=True,
        bf16=True,
        output_dir="out",
        num_train_epochs=3.0,
        per_device_train_batch_size=8,
        per_device_eval_batch_size=8,
        gradient_accumulation_steps=1,
        evaluation_strategy="no",
        save_strategy="steps",
        save_steps=3000,
        save_total_limit=3,
        learning_rate=2e-5,
        weight_decay=0.0,
        warmup_ratio=0.03,
        lr_scheduler_type="cosine",
        logging_steps=100,
        tf32=True,
        model_max_length=2048,
        gradient_checkpointing=True,
        lazy_preprocess=True,
    )
    assert config.trainable == Trainable(projector=True, boundary=True)


def test_launch_script_has_the_reference_flags():
    script = (ROOT / "scripts" / "launch_train.sh").read_text()
    flags = dict(re.findall(r"^  (--\w+) ?(\S*) \\$", script, flags=re.MULTILINE))
    assert list(flags) == [word for word in REFERENCE if word.startswith("--")]
    defaults = dict(re.findall(r"^(\w+)=\$\{\1:-(.*?)\}", script, flags=re.MULTILINE))
    argv = [
        word
        for flag, value in flags.items()
        for word in (flag, re.sub(r"\$(\w+)", lambda match: defaults[match[1]], value.strip('"')))
        if word
    ]
    given, asked = vars(parse(TrainConfig, argv)), vars(parse(TrainConfig, REFERENCE))
    assert {name for name in given if given[name] != asked[name]} == {
        "model_name_or_path",
        "data_path",
        "video_folder",
        "output_dir",
    }


def test_inspect_takes_a_training_command():
    config = parse(InspectConfig, [*REFERENCE, "--json", "--index", "3"])
    assert config.json and config.index == 3 and config.output_dir == "out"


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda config_class: config_class.__name__)
def test_every_flag_has_help(config_class):
    assert len(CLASSES) >= 8
    assert all(field.metadata.get("help") for field in dataclasses.fields(config_class))


def test_lists_take_several_values_and_repetition():
    asked = ["--model_name_or_path", "m", "--question", "a", "b", "--video", "v", "--question", "c"]
    assert parse(ChatConfig, asked).question == ["a", "b", "c"]
    assert parse(TrainConfig, [*TRAIN, "--data_path", "more.json"]).data_path == ["train.json", "more.json"]
    assert parse(TrainConfig, TRAIN).report_to == ["tensorboard"]
    assert parse(TrainConfig, [*TRAIN, "--report_to", "none"]).report_to == ["none"], "a default is replaced"


@pytest.mark.parametrize(
    "flag, near",
    [
        ("--learning_rat", "--learning_rate"),
        ("--tune_mlp_adapter", "--tune_mm_mlp_adapter"),
        ("--learning_rat=1", "--learning_rate"),
        ("--model_name", "--model_name_or_path"),
        ("--fp1", None),
    ],
)
def test_an_unknown_flag_names_the_nearest(flag, near, capsys):
    message = error_of(capsys, TrainConfig, [*TRAIN, flag, "1"])
    name = flag.partition("=")[0]
    assert f"unknown flag {name}" in message
    assert near is None or message.endswith(f"did you mean {near}?")


@pytest.mark.parametrize("config_class", CLASSES, ids=lambda config_class: config_class.__name__)
def test_every_number_states_its_range(config_class):
    """Broken by a new flag that is a number and says nothing of what it may be. Whole ones have a largest anyway."""
    for field in dataclasses.fields(config_class):
        lower, upper = {"at_least", "above"} & set(field.metadata), {"at_most", "below"} & set(field.metadata)
        if re.search(r"\bint\b|\bfloat\b", str(field.type)):
            assert lower and (upper or "int" in str(field.type)), field.name


REQUIRED = {
    TrainConfig: TRAIN,
    ConvertConfig: ["--input_json_file", "a", "--output_json_file", "b"],
    ExtractConfig: ["--video_dir_path", "a", "--clip_feat_path", "b"],
    ChatConfig: TRAIN[:2],
    InspectConfig: TRAIN[:4],
    configs.ExportConfig: ["--checkpoint", "a", "--output", "b"],
    configs.ValidateConfig: TRAIN[2:4],
    configs.DoctorConfig: [],
}
NUMBERS = [
    (config_class, field)
    for config_class in REQUIRED
    for field in dataclasses.fields(config_class)
    if configs.has_range(field)
]


@pytest.mark.parametrize(
    "config_class, field", NUMBERS, ids=lambda value: getattr(value, "name", None) or value.__name__
)
def test_no_number_is_out_of_its_range(config_class, field, capsys):
    """Both ends, from the command line and in Python, and what no number may be."""
    low, above, high, below = (field.metadata.get(name) for name in ("at_least", "above", "at_most", "below"))
    whole = "float" not in str(field.type)
    bad = [low - 1 if low is not None else above, high + 1 if high is not None else below or 2**31, 2**64, -(2**63)]
    bad += [] if whole else [float("nan"), float("inf"), -float("inf")]
    for value in bad:
        message = error_of(capsys, config_class, [*REQUIRED[config_class], f"--{field.name}", str(value)])
        assert f"--{field.name} " in message and "give " in message, message


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": -1}, "--learning_rate -1: give 0 or more"),
        ({"warmup_ratio": 3}, "--warmup_ratio 3: .*at most 1"),
        ({"adam_beta2": 1.0}, "--adam_beta2 1.0: .*less than 1"),
        ({"max_grad_norm": math.nan}, "--max_grad_norm nan"),
        ({"num_train_epochs": 0}, "--num_train_epochs 0: give more than 0"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"seed": 2**63}, "--seed 9223372036854775808"),
        ({"dataloader_num_workers": -1}, "--dataloader_num_workers -1"),
        ({"warmup_steps": -5}, "--warmup_steps -5"),
        ({"save_steps": 1.5}, "--save_steps 1.5: .*whole numbers"),
        ({"save_steps": 0}, "--save_steps 0: give more than 0"),
        ({"weight_decay": "x"}, "--weight_decay x"),
        ({"data_weights": [1, math.inf]}, "--data_weights inf"),
        ({"bf16": True, "per_device_train_batch_size": True}, "--per_device_train_batch_size True"),
    ],
)
def test_numbers_are_checked_in_python_too(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig("m", ["d"], output_dir="o", **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 0},
        {"warmup_ratio": 1},
        {"save_steps": 0.5},
        {"save_steps": 3.0},
        {"seed": 2**63 - 1},
        {"max_grad_norm": 0},
        {"weight_decay": 0.1},
        {"max_steps": -1},
        {"adam_beta1": 0},
        {"save_total_limit": None},
    ],
)
def test_the_ends_of_ranges_are_in_them(settings):
    TrainConfig("m", ["d"], output_dir="o", **settings)


@pytest.mark.parametrize(
    "argv, word",
    [
        (["--learning_rate", "fast"], "--learning_rate"),
        (["--shard", "half"], "--shard"),
        (["--bf16", "perhaps"], "perhaps"),
        (["stray"], "stray"),
    ],
)
def test_a_bad_value_is_named(argv, word, capsys):
    assert word in error_of(capsys, TrainConfig, [*TRAIN, *argv])


def test_missing_flags_are_named(capsys):
    message = error_of(capsys, ConvertConfig, ["--input_json_file", "x"])
    assert "--output_json_file" in message and "--input_json_file" not in message


def test_yaml_below_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model_name_or_path: llava\noutput_dir: out\ndata_path: [a.json, b.json]\nlearning_rate: 1.0e-3\n"
        "max_steps: -1\nbf16: true\nlazy_preprocess: false\nsave_total_limit: null\nseed: 7\n"
    )
    config = parse(TrainConfig, ["--config", str(file), "--seed", "8"])
    assert (config.data_path, config.learning_rate, config.seed) == (["a.json", "b.json"], 1e-3, 8)
    assert (config.bf16, config.lazy_preprocess, config.save_total_limit, config.max_steps) == (True, False, None, -1)
    config = parse(TrainConfig, [f"--config={file}", "--data_path", "c.json"])
    assert config.data_path == ["c.json"], "given on the command line, a list replaces the file's"


@pytest.mark.parametrize(
    "text, words",
    [
        ("learning_rat: 1", ["--learning_rat", "--learning_rate"]),
        ("- a", ["run.yaml", "list"]),
        ("a: [", ["run.yaml"]),
        (None, ["run.yaml", "No such file"]),
    ],
)
def test_yaml_mistakes(tmp_path, text, words, capsys):
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    message = error_of(capsys, TrainConfig, [*TRAIN, "--config", str(file)])
    assert all(word in message for word in words)


def test_configurations_do_not_change():
    config = parse(ExtractConfig, ["--video_dir_path", "v", "--clip_feat_path", "f"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.llava = "1.1"


def test_parity_sets_every_policy():
    assert set(POLICIES) == {"none", "reference"}
    assert not any(dataclasses.astuple(parse(TrainConfig, TRAIN).policy))
    assert all(dataclasses.astuple(parse(TrainConfig, [*TRAIN, "--parity", "reference"]).policy))


@pytest.mark.parametrize(
    "flags, parts",
    [
        ("tune_mm_mlp_adapter mm_use_vid_start_end", Trainable(projector=True, boundary=True)),
        ("tune_mm_mlp_adapter", Trainable(projector=True)),
        ("tune_mm_mlp_adapter mm_use_vid_start_end freeze_mm_mlp_adapter", Trainable(boundary=True)),
        ("freeze_backbone", Trainable(embed=True, head=True)),
        ("", Trainable(projector=True, embed=True, head=True, decoder=True)),
        ("freeze_mm_mlp_adapter mm_use_vid_start_end", Trainable(embed=True, head=True, decoder=True)),
    ],
)
def test_what_is_trained(flags, parts):
    assert TrainConfig("m", ["d"], output_dir="o", **dict.fromkeys(flags.split(), True)).trainable == parts


def test_what_code_asks_about_parts():
    for part in ("projector", "boundary", "embed", "decoder", "head"):
        alone = Trainable(**{part: True})
        assert list(alone) == [part] and alone
        assert alone.adapter_only == (part in ("projector", "boundary"))
        assert alone.text_is_constant == (part in ("projector", "boundary", "head"))
    assert not Trainable() and not Trainable(projector=True, head=True).adapter_only


def test_what_the_reference_trains(golden):
    """The reference's table. Its boundary rows are the embedding table, everything else of which is detached."""
    table = json.loads((golden / "model.json").read_text())["trainable"]
    names = ("tune_mm_mlp_adapter", "freeze_backbone", "freeze_mm_mlp_adapter")
    for values in itertools.product([True, False], repeat=3):
        for start_end in (True, False):
            flags = dict(zip(names, values))
            key = " ".join([f"336 se={start_end}", *(f"{name}={value}" for name, value in flags.items())])
            recorded = table[key]["names"]
            config = TrainConfig(
                "m", ["d"], output_dir="o", mm_use_vid_start_end=start_end, parity="reference", **flags
            )
            found = {
                part
                for part, word in (
                    ("projector", "mm_projector"),
                    ("embed", "embed_tokens"),
                    ("head", "lm_head"),
                    ("decoder", "layers"),
                )
                if word in str(recorded)
            }
            if "all" in recorded:
                found = {"projector", "embed", "head", "decoder"}
            elif table[key]["orig_embeds_params"]:
                found = found - {"embed"} | {"boundary"}
            assert set(config.trainable) == found, key
