"""The parser: other trainers' flags, suggestions, all mistakes at once, values as transformers reads them, --help."""

import dataclasses
import re
import shlex

import pytest
from test_config import CLASSES, TRAIN, error_of

from fastvid.config import ConvertConfig, ExtractConfig, TrainConfig
from fastvid.config.fields import words_of
from fastvid.flags import _ALSO_PATHS, _PLACES, parse
from fastvid.flags.foreign import MEANING, SYNONYMS, VALUES


@pytest.mark.parametrize(
    "flag, meant",
    [
        ("--epochs", "--num_train_epochs"),
        ("--batch_size", "--per_device_train_batch_size"),
        ("--lr", "--learning_rate"),
        ("--max_length", "--model_max_length"),
        ("--sed", "--seed"),
        ("--save-step", "--save_steps"),
        ("--frobnicate", None),
        ("--pattern", None),
        ("--layers", None),
        ("--train", None),
    ],
)
def test_a_suggestion_is_near_in_meaning(flag, meant, capsys):
    message = error_of(capsys, TrainConfig, [*TRAIN, flag, "1"])
    assert f"unknown flag {flag}" in message
    assert message.endswith(f"did you mean {meant}?" if meant else "see --help")


def test_an_older_name_is_taken_and_told_once(capsys, caplog, tmp_path):
    settings = tmp_path / "flags.yaml"
    settings.write_text("rows_per_batch: 200\n")
    with caplog.at_level("INFO", "fastvid"):
        assert (
            parse(TrainConfig, [*TRAIN, "--rows-per-batch", "300", "--rows-per-batch", "400"]).tokens_per_batch == 400
        )
        assert caplog.messages == ["--rows-per-batch is called --tokens_per_batch now"]
        assert parse(TrainConfig, [*TRAIN, "--config", str(settings)]).tokens_per_batch == 200
        assert parse(TrainConfig, [*TRAIN, "--config", str(settings), "--tokens_per_batch", "9"]).tokens_per_batch == 9
    message = error_of(capsys, TrainConfig, [*TRAIN, "--rows_per_batch", "3", "--tokens_per_batch", "4"])
    assert message.endswith("--rows_per_batch is the older name of --tokens_per_batch, which is given too")


def test_suggestions_are_flags_of_the_command(capsys):
    fields = {config_class: {field.name for field in dataclasses.fields(config_class)} for config_class in CLASSES}
    known = set().union(*fields.values())
    assert {flag for flags in SYNONYMS.values() for flag in flags} <= known
    assert not set(MEANING) & fields[TrainConfig], "what fastvid has needs no other meaning"
    message = error_of(capsys, ExtractConfig, ["--videos", "v", "--output", "o", "--batch_size", "3"])
    assert all(flag in message for flag in ("--video_dir_path", "--clip_feat_path", "--infer_batch"))
    assert "--output_dir" not in message


def test_remedies_name_flags_that_are_there():
    known = {f"--{field.name}" for field in dataclasses.fields(TrainConfig)}
    named = {flag for meaning in MEANING.values() for flag in re.findall(r"--\w+", meaning.remedy + meaning.note)}
    assert named - known == {"--checkpoint", "--push_to_hub", "--nproc_per_node", "--images"}  # other commands'


def test_all_mistakes_are_told_at_once(capsys):
    message = error_of(
        capsys,
        TrainConfig,
        [
            *TRAIN[2:],
            "--fp16",
            "True",
            "--use_dora",
            "--deepspeed=zero3.json",
            "--epochs",
            "3",
            "--bf16",
            "perhaps",
            "--wat",
            "--double_quant",
            "--do_train",
        ],
    )
    for part in (
        "--fp16 True: use --bf16 True",
        "--use_dora: fastvid has nothing like it",
        "--deepspeed zero3.json: ",
        "--shard",
        "unknown flag --epochs, did you mean --num_train_epochs?",
        "--bf16: perhaps is neither",
        "unknown flag --wat, see",
        "give --model_name_or_path",
    ):
        assert part in message
    assert "--double_quant" not in message and "--do_train" not in message


UPSTREAMS_OWN = """--is_multimodal True --sep_video_conv_front False --video_token_len 0 --frame_aspect_ratio square
    --cache_dir c --remove_unused_columns False --force_fsdp False"""
HARMLESS = """--logging_first_step True --overwrite_output_dir True --dataloader_pin_memory True --ddp_timeout 3600
    --run_name a --report_to tensorboard --save_safetensors True --local_rank=0 --do_train --torch_compile False
    --resume_from_checkpoint True --gradient_checkpointing_kwargs {'use_reentrant':False} --fp16 False --fsdp ''
    --deepspeed none --label_smoothing_factor 0.0 --neftune_noise_alpha None --bits 16 --mm_vision_select_layer -2
    --lora_enable False --group_by_length False --push_to_hub no --train_sampling_strategy random --optim
    adamw_torch_fused --save_total_limit None --tf32 True --auto_find_batch_size False --stage sft
    --freeze_vision_tower True --freeze_vit true --tuner_type full --trust_remote_code True --target_modules all-linear
    --val_size 0 --lora_r 8 --lora_bias none --quant_type nf4"""


def test_what_changes_nothing_is_accepted_in_one_line(caplog):
    with caplog.at_level("INFO"):
        config = parse(TrainConfig, [*TRAIN, *shlex.split(UPSTREAMS_OWN), *shlex.split(HARMLESS)])
    [line] = caplog.messages
    assert line.startswith("accepted, and change nothing here: --is_multimodal, --sep_video_conv_front, ")
    assert all(flag in line for flag in ("--local_rank", "--overwrite_output_dir (--resume never", "--push_to_hub"))
    assert not any(flag in line for flag in ("--ddp_timeout", "--tf32", "--run_name", "--optim,"))
    assert (config.ddp_timeout, config.run_name, config.save_total_limit) == (3600, "a", None)


def test_ranks_but_the_first_keep_silent_about_it(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with caplog.at_level("INFO"):
        parse(TrainConfig, [*TRAIN, "--do_train"])
    assert caplog.messages == []


@pytest.mark.parametrize(
    "flags, remedy",
    [
        ("--fp16 True", "--bf16 True"),
        ("--deepspeed zero2.json", "--shard"),
        ("--fsdp full_shard auto_wrap", "--shard"),
        ("--use_qlora True", "--lora_enable True --frozen_dtype nf4"),
        ("--lora_bias all", "biases stay"),
        ("--quant_type fp4", "--frozen_dtype nf4"),
        ("--target_modules q_proj,v_proj", "--lora_targets"),
        ("--modules_to_save lm_head", "trained beside LoRA"),
        ("--bits 4", "--frozen_dtype nf4"),
        ("--bits 8", "int8"),
        ("--resume_from_checkpoint out/checkpoint-5", "--resume auto"),
        ("--torch_compile True", "leave it out"),
        ("--push_to_hub True", "fastvid export --push_to_hub True"),
        ("--auto_find_batch_size True", "--tokens_per_batch"),
        ("--label_smoothing_factor 0.1", "leave it out"),
        ("--group_by_length True", "--tokens_per_batch"),
        ("--sep_video_conv_front True", "--question_order video_first"),
        ("--data_seed 0", "--seed"),
        ("--mm_vision_select_layer 0", "-2"),
        ("--mm_use_im_start_end", "--mm_use_vid_start_end"),
        ("--no_cuda True", "CUDA_VISIBLE_DEVICES="),
        ("--dataloader_drop_last True", "leave it out"),
        ("--per_gpu_train_batch_size 4", "--per_device_train_batch_size"),
        ("--freeze_vision_tower False", "vision tower is not trained"),
        ("--freeze_vit false", "tower is not trained"),
        ("--train_type lora", "--lora_enable True"),
        ("--frames_upbound 32", "--num_frames"),
        ("--stage dpo", "sft"),
        ("--val_size 0.1", "--eval_data_path"),
        ("--max_samples 1000", "--data_weights"),
        ("--mm_spatial_pool_stride 2", "leave it out"),
        ("--dataset_dir data", "--data_path"),
        ("--load_best_model_at_end True", "fastvid export"),
        ("--adafactor True", "--optim adamw_8bit"),
    ],
)
def test_what_would_change_the_result_is_refused_with_a_remedy(flags, remedy, capsys):
    message = error_of(capsys, TrainConfig, [*TRAIN, *flags.split()])
    assert f"error: {flags}: " in message and remedy in message


@pytest.mark.slow
def test_every_flag_of_the_trainers_is_known():
    """transformers' own of this environment, and those that older versions and the reference had beside them."""
    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainConfig)} | set(MEANING)
    assert {field.name for field in dataclasses.fields(TrainingArguments)} <= known
    older = """adafactor bf16_full_eval dispatch_batches evaluation_strategy fp16_backend fp16_opt_level
        fsdp_min_num_params fsdp_transformer_layer_cls_to_wrap gradient_checkpointing group_by_length
        half_precision_backend include_inputs_for_metrics include_tokens_per_second jit_mode_eval logging_dir
        mp_parameters no_cuda overwrite_output_dir past_index per_gpu_eval_batch_size per_gpu_train_batch_size
        push_to_hub_model_id push_to_hub_organization push_to_hub_token ray_scope save_safetensors sharded_ddp
        split_batches torchdynamo tpu_metrics_debug tpu_num_cores use_ipex use_legacy_prediction_loop use_mps_device
        warmup_ratio xpu_backend"""
    assert set(older.split()) <= known
    reference = """model_name_or_path version freeze_backbone tune_mm_mlp_adapter pretrain_mm_mlp_adapter
        mm_use_vid_start_end data_path lazy_preprocess is_multimodal sep_video_conv_front video_token_len video_folder
        frame_aspect_ratio cache_dir optim remove_unused_columns freeze_mm_mlp_adapter force_fsdp model_max_length"""
    assert set(reference.split()) <= known


def test_values_of_other_trainers_are_read(tmp_path):
    kinds = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    for name, values in VALUES.items():
        for theirs, ours in values.items():
            read = getattr(parse(TrainConfig, [*TRAIN, f"--{name}", theirs]), name)
            assert read == ([ours] if kinds[name] == list[str] else ours)
    settings = tmp_path / "run.yaml"
    settings.write_text("report_to: []\neval_data_path: []\noptim: adamw_bnb_8bit\n")
    read = parse(TrainConfig, [*TRAIN, "--config", str(settings)])
    assert (read.report_to, read.eval_data_path, read.optim) == (["none"], [], "adamw_8bit")


@pytest.mark.parametrize("word", ["-seed", "\u2014-seed", "\u2013seed"])
def test_a_flag_of_another_dash_is_told(word, capsys):
    message = error_of(capsys, TrainConfig, [*TRAIN, word, "3"])
    assert f"unexpected argument {word}, 3; a flag begins with two hyphens (--)" in message


def test_values_are_read_as_transformers_reads_them():
    """The parser against HfArgumentParser on the same dataclass and words."""
    from transformers import HfArgumentParser

    # It knows no numbers that are whole or not, nor a word beside them.
    fields = [
        field for field in dataclasses.fields(TrainConfig) if field.type != int | float and not words_of(field.type)
    ]
    same = dataclasses.make_dataclass(
        "Same",
        [
            (
                field.name,
                field.type,
                dataclasses.field(default=field.default, default_factory=field.default_factory, kw_only=True),
            )
            for field in fields
        ],
    )
    lines = [
        "--bf16",
        "--bf16 yes",
        "--bf16=0",
        "--tf32 FALSE",
        "--learning-rate 2e-5",
        "--weight_decay 0.",
        "--data_weights 1 .5",
        "--report_to a b",
        "--lr_scheduler_type linear",
        "--shard_size 3",
        "--max_steps -1",
        "--seed 1 --seed 2",
        "--lazy_preprocess true",
        "--version=",
        "--num_train_epochs 3",
        "--run_name a=b",
    ]
    for line in lines:
        [theirs] = HfArgumentParser(same).parse_args_into_dataclasses([*TRAIN, *line.split()])
        ours = parse(TrainConfig, [*TRAIN, *line.split()])
        assert {field.name: getattr(ours, field.name) for field in fields} == vars(theirs), line


@pytest.mark.parametrize("flag", ["--output_dir", "--data_path", "--video_folder", "--pretrain_mm_mlp_adapter"])
def test_an_empty_path_is_refused(flag, capsys):
    assert f"{flag}: is empty, as of a variable that is not set" in error_of(capsys, TrainConfig, [*TRAIN, flag, ""])


def test_flags_of_places_are_there():
    assert _PLACES | _ALSO_PATHS <= {
        field.name for config_class in CLASSES for field in dataclasses.fields(config_class)
    }


def test_places_to_write_are_looked_at_first(tmp_path, capsys):
    file = tmp_path / "file"
    file.write_text("x")
    assert "--output_dir s3://b/x is a URL; name a place" in error_of(
        capsys, TrainConfig, [*TRAIN[:4], "--output_dir", "s3://b/x"]
    )
    for place in (file, file / "below"):
        message = error_of(capsys, TrainConfig, [*TRAIN[:4], "--output_dir", str(place)])
        assert f"--output_dir {place}: {file} is a file, not a folder" in message
    message = error_of(capsys, ExtractConfig, ["--video_dir_path", "v", "--clip_feat_path", str(file)])
    assert "--clip_feat_path" in message and "is a file" in message
    message = error_of(capsys, ConvertConfig, ["--input_json_file", "x", "--output_json_file", str(tmp_path)])
    assert "--output_json_file" in message and "is a folder" in message


def test_a_path_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("data_path: [~/a.json, b~.json]\nlora_weights: ~/l\nrun_name: ~/x\n")
    config = parse(TrainConfig, [*TRAIN[:2], "--output_dir=~/out", "--config", "~/run.yaml"])
    assert config.output_dir == f"{tmp_path}/out" and config.data_path == [f"{tmp_path}/a.json", "b~.json"]
    assert config.lora_weights == f"{tmp_path}/l" and config.run_name == "~/x"


def test_help_is_short_and_in_groups(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as exit:
        parse(TrainConfig, ["--help"])
    text = capsys.readouterr().out
    assert exit.value.code == 0 and max(map(len, text.splitlines())) <= 120
    flags = re.findall(r"^  --(\S+)", text, flags=re.MULTILINE)
    assert sorted(flags) == sorted([*(field.name for field in dataclasses.fields(TrainConfig)), "config"])
    groups = re.findall(r"^(\w.*):$", text, flags=re.MULTILINE)
    assert groups[0] == "required" and len(groups) >= 6
    assert flags[:3] == ["model_name_or_path", "data_path", "output_dir"] and "None" not in text
    assert "stderr" in text and "Default: 5e-05." in text
