"""What training's messages tell a user to do, done: flags of other trainers, runs that lie there already, places."""

import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import flip_a_bit
from conftest import ROOT
from model_cases import model_config
from training_run import HOLD, flags, losses, start, write_run

from fastvid import export, train
from fastvid.checkpoints import checkpoint, saver, shards
from fastvid.config import ExportConfig, TrainConfig
from fastvid.config.policy import Trainable
from fastvid.dist import parallel
from fastvid.dist.sharding import held_part
from fastvid.flags import parse
from fastvid.flags.foreign import MEANING
from fastvid.model.attention import choose_attention
from fastvid.model.config import Precision
from fastvid.model.quantize import check_device
from fastvid.model.recompute import recomputed_layers
from fastvid.model.video_llava import VideoLlava
from fastvid.training import adamw8bit as optim8bit
from fastvid.training import reporters, run_lock

CPU = torch.device("cpu")
FOUR = ("--max_steps", "4", "--save_steps", "2")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's inputs, and lora/, a LoRA adapter."""
    run = write_run(tmp_path_factory.mktemp("run"))
    words = ["--lora_enable", "True", "--lora_r", "4", "--max_steps", "1", "--save_strategy", "no"]
    assert train.main(flags(run, run / "lora", *words)) == 0
    return run


# {a remedy of another trainer's flag: the same as flags of fastvid}. "": the flag is left out, and that is all.
REMEDIES = {
    "use --min_lr_ratio and --decay_steps": (
        "--lr_scheduler_type warmup_stable_decay --min_lr_ratio 0.1 --decay_steps 0.2"
    ),
    "use --question_order video_first": "--question_order video_first",
    "the same command goes on from the newest checkpoint in --output_dir by itself (--resume auto), "
    "leave it out": "--resume auto",
    "use --bf16 True": "--bf16 True",
    "validation computes as training does: --bf16 True": "--bf16 True",
    "leave it out: --shard auto (or full, hybrid) shards a model over ranks": "--shard auto",
    "leave it out: fastvid brings kernels of its own": "",
    "give --per_device_train_batch_size or --tokens_per_batch, "
    "--recompute auto makes a step fit into memory": "--tokens_per_batch 300 --recompute auto",
    "use --per_device_train_batch_size": "--per_device_train_batch_size 3",
    "use --per_device_eval_batch_size": "--per_device_eval_batch_size 3",
    "leave it out: --per_device_train_batch_size is each rank's": "--per_device_train_batch_size 3",
    "fastvid has nothing like it, leave it out": "",
    "use --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay": "--adam_beta1 0.8 --adam_beta2 0.9 "
    "--adam_epsilon 1e-6 --weight_decay 0.1",
    "use --optim adamw_8bit, whose moments are small too": "--optim adamw_8bit",
    "leave it out: --tokens_per_batch N fills batches without padding": "--tokens_per_batch 300",
    "leave it out: a batch goes on over an epoch's end, so none is incomplete": "",
    "leave it out: a resumed run goes on with the samples that come next": "",
    "use --seed, which decides the order of samples too": "--seed 7",
    "fastvid computes on CUDA GPUs and CPUs, leave it out": "",
    "use --lora_enable True, with --lora_r, --lora_alpha and --lora_targets": "--lora_enable True --lora_r 4 "
    "--lora_alpha 8 --lora_targets attention",
    "use --lora_enable True --frozen_dtype nf4": "--lora_enable True --frozen_dtype nf4",
    "use --lora_targets: all, attention, mlp, or names such as q_proj": "--lora_enable True --lora_targets q_proj mlp",
    "use --lora_r": "--lora_enable True --lora_r 4",
    "use --lora_weights FOLDER": "--lora_enable True --lora_weights {run}/lora --lora_r 4",
    "leave it out: biases stay as they are": "",
    "leave it out: the projector and the start and end embeddings are trained beside LoRA": "--lora_enable True",
    "the vision tower is not trained: its features are extracted before training, leave it out": "",
    "use --tune_mm_mlp_adapter True for the projector, everything is trained without it": "--tune_mm_mlp_adapter False",
    "fastvid extract takes layer -2, leave it out": "",
    "fastvid extract takes the patches, leave it out": "",
    "use --mm_use_vid_start_end True": "--mm_use_vid_start_end True",
    "give --video_folder, where features of images lie beside those of videos (fastvid extract --images True)": (
        "--video_folder {run}/feats"
    ),
    "use --frozen_dtype nf4 (4 bits) or int8 (8)": "--frozen_dtype nf4",
    "use --frozen_dtype nf4": "--frozen_dtype nf4",
    "use --frozen_dtype int8": "--frozen_dtype int8",
    "leave it out: the decoder is trained unless --tune_mm_mlp_adapter True "
    "or --freeze_backbone True": "--tune_mm_mlp_adapter False --freeze_backbone True",
    "leave it out: fastvid extract --num_frames decides which frames are seen": "",
    "give the records to validate on to --eval_data_path": "--eval_data_path {run}/train.json",
    "fastvid trains on the answers given (sft), leave it out": "",
    "use --data_weights, which takes a share of each file": "--data_weights 0.5",
    "give --data_path the paths of the files": "--data_path {run}/train.json",
    "leave it out: the template has a system text of its own": "",
}
ELSEWHERE = {  # of the whole command rather than of flags: the tests below
    "leave it out; when the run has ended, fastvid export --push_to_hub True uploads what it trained",  # wants the hub
    "leave it out: metrics.jsonl tells the best eval_loss, and fastvid export --checkpoint OUTPUT_DIR/checkpoint-N "
    "makes its weights",
    "leave it out, and hide the GPUs: CUDA_VISIBLE_DEVICES= fastvid train …",
    "give it to torchrun: torchrun --nproc_per_node N -m fastvid.train …",
    "start ranks with torchrun: torchrun --nproc_per_node N -m fastvid.train …",
}


def test_every_remedy_for_a_foreign_flag_is_tried():
    assert {meaning.remedy for meaning in MEANING.values()} - {""} == {*REMEDIES, *ELSEWHERE}


@pytest.mark.slow
@pytest.mark.parametrize("remedy", REMEDIES)
def test_a_foreign_flag_is_replaced_as_told(run, tmp_path, remedy, capsys):
    name, meaning = next((name, meaning) for name, meaning in MEANING.items() if meaning.remedy == remedy)
    value = "False" if meaning.inverted else next(x for x in ("True", "5", "x.json") if meaning.refuses([x]))
    with pytest.raises(SystemExit):
        train.main(flags(run, tmp_path / "out", "--dry_run", f"--{name}", value))
    assert remedy in capsys.readouterr().err
    assert train.main(flags(run, tmp_path / "out", "--dry_run", *REMEDIES[remedy].format(run=run).split())) == 0


@pytest.mark.slow
def test_the_best_checkpoint_is_exported(run, tmp_path):
    assert (
        train.main(
            flags(
                run,
                tmp_path / "o",
                *FOUR,
                "--eval_data_path",
                str(run / "train.json"),
                "--eval_strategy",
                "steps",
                "--eval_steps",
                "2",
                "--save_total_limit",
                "9",
            )
        )
        == 0
    )
    lines = map(json.loads, (tmp_path / "o" / "metrics.jsonl").read_text().splitlines())
    best = min((line["eval_loss"], line["step"]) for line in lines if "eval_loss" in line)[1]
    export.export(ExportConfig(str(tmp_path / "o" / f"checkpoint-{best}"), str(tmp_path / "made"), "llama"))
    assert (tmp_path / "made" / "config.json").is_file()


@pytest.mark.slow
def test_ranks_are_started_with_torchrun_and_gpus_hidden(run, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = start(["-m", "fastvid.train"], flags(run, tmp_path, "--dry_run"), ranks=2)
    assert done.returncode == 0 and "on CPU" in done.stderr, done.stderr


# --- runs that lie there already


@pytest.fixture
def begun(run, tmp_path):
    """(flags of a run of six steps that was ended after the fourth, its folder)."""
    argv = flags(run, tmp_path / "o", "--max_steps", "6", "--save_steps", "2", "--save_total_limit", "9")
    assert train.main([*argv, "--max_steps", "4"]) == 0
    return argv, tmp_path / "o"


@pytest.mark.slow
def test_another_run_in_the_folder(begun):
    argv, output = begun
    other = [*argv, "--learning_rate", "2e-2"]
    with pytest.raises(
        ValueError,
        match="belongs to another run: .*Go on with the same flags and files, choose "
        "another --output_dir, or start over in this one with --resume never",
    ):
        train.main(other)
    assert train.main([*other, "--output_dir", str(output.parent / "another")]) == 0
    assert train.main(argv) == 0 and max(losses(output)) == 6
    assert train.main([*other, "--resume", "never"]) == 0
    assert (output / "previous-1" / "checkpoint-6").is_dir()


@pytest.mark.slow
def test_another_number_of_samples_a_step(begun, monkeypatch):
    argv, _output = begun
    read = checkpoint.read_state
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: read(folder) | {"world_size": 2})
    halved = [*argv, "--per_device_train_batch_size", "1"]
    with pytest.raises(
        ValueError,
        match="ranks were 2, are 1: give --per_device_train_batch_size or "
        "--gradient_accumulation_steps that make as many samples a step",
    ):
        train.main(halved)
    assert train.main([*halved, "--gradient_accumulation_steps", "2"]) == 0


@pytest.mark.slow
def test_a_damaged_checkpoint_is_restored(begun):
    argv, output = begun
    shutil.rmtree(output / "checkpoint-2")
    shutil.copytree(output / "checkpoint-4", output.parent / "copy")
    flip_a_bit(next((output / "checkpoint-4").glob("model-*.safetensors")))
    with pytest.raises(ValueError, match="Restore one of them from a copy"):
        train.main(argv)
    shutil.rmtree(output / "checkpoint-4")
    shutil.copytree(output.parent / "copy", output / "checkpoint-4")
    assert train.main(argv) == 0 and max(losses(output)) == 6


@pytest.mark.slow
def test_what_the_run_reads_lies_in_its_output(run, tmp_path):
    shutil.copytree(run / "model", tmp_path / "o" / "model")
    argv = flags(run, tmp_path / "o", *FOUR, "--model_name_or_path", str(tmp_path / "o" / "model"))
    with pytest.raises(ValueError, match="lies in --output_dir .*: choose another --output_dir"):
        train.main(argv)
    assert train.main([*argv, "--output_dir", str(tmp_path / "another")]) == 0


@pytest.mark.slow
def test_an_order_of_samples_that_is_no_more(run, tmp_path, monkeypatch):
    argv = flags(
        run,
        tmp_path / "o",
        "--parity",
        "reference",
        "--gradient_accumulation_steps",
        "5",
        "--max_steps",
        "3",
        "--save_steps",
        "3",
    )
    assert train.main(argv) == 0
    read = checkpoint.read_state
    monkeypatch.setattr(checkpoint, "read_state", lambda folder: read(folder) | {"reference_order": 1})
    again = [*argv, "--max_steps", "4"]
    with pytest.raises(ValueError, match="Start over with --resume never, choose another --output_dir"):
        train.main(again)
    assert train.main([*again, "--output_dir", str(tmp_path / "another")]) == 0
    assert train.main([*again, "--resume", "never"]) == 0


@pytest.mark.slow
def test_too_many_skipped_samples(run, tmp_path):
    records = json.loads((run / "train.json").read_text())
    for record in records[:6]:
        record["conversations"][1]["value"] = "so fast " * 600  # longer than the template is cut to
        record["conversations"][0]["value"] = "why is it " * 600 + "\n<video>"
    (tmp_path / "long.json").write_text(json.dumps(records))
    argv = flags(run, tmp_path / "o", "--data_path", str(tmp_path / "long.json"), "--on_bad_sample", "skip")
    with pytest.raises(
        ValueError, match="more than --max_skipped 0.25 of them; mend what the lines above name, or raise --max_skipped"
    ):
        train.main(argv)
    assert train.main([*argv, "--max_skipped", "0.9"]) == 0
    (tmp_path / "long.json").write_text(json.dumps(records[6:]))
    assert train.main([*argv, "--output_dir", str(tmp_path / "mended")]) == 0


def test_shards_of_other_tensors(tmp_path):
    path = tmp_path / "model-00000-of-00001.safetensors"
    shards.write(path, {"a": held_part(torch.ones(3))[0]})
    with pytest.raises(ValueError, match="Resume with the flags of the run that saved it, or choose another"):
        shards.load([path], {"a": torch.zeros(4)})
    target = torch.zeros(3)
    shards.load([path], {"a": target})
    assert target.tolist() == [1, 1, 1]


# --- places and what is installed


@pytest.mark.slow
def test_a_folder_where_figures_go(run, tmp_path):
    (tmp_path / "o" / "metrics.jsonl").mkdir(parents=True)
    argv = flags(run, tmp_path / "o", *FOUR)
    with pytest.raises(ValueError, match="metrics.jsonl .*; move it away, or choose another --output_dir"):
        train.main(argv)
    assert train.main([*argv, "--output_dir", str(tmp_path / "another")]) == 0
    (tmp_path / "o" / "metrics.jsonl").rename(tmp_path / "aside")
    assert train.main(argv) == 0


@pytest.mark.slow
def test_a_pipe_where_the_lock_goes(run, tmp_path):
    (tmp_path / "o").mkdir()
    os.mkfifo(tmp_path / "o" / run_lock.NAME)
    with pytest.raises(ValueError, match="is no regular file, and no lock of a run: remove it"):
        train.main(flags(run, tmp_path / "o", *FOUR))
    (tmp_path / "o" / run_lock.NAME).unlink()
    assert train.main(flags(run, tmp_path / "o", *FOUR)) == 0


@pytest.mark.slow
def test_a_folder_that_another_run_writes_to(run, tmp_path, monkeypatch, forked):
    argv = flags(run, tmp_path / "o", *FOUR)
    monkeypatch.setattr(run_lock, "PATIENCE", 0.1)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "o")], stdout=subprocess.PIPE, env=environment
    ) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="Give this one another --output_dir, or end that one first"):
            train.main(argv)
        assert train.main([*argv, "--output_dir", str(tmp_path / "another")]) == 0
        other.terminate()
    assert train.main(argv) == 0


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_reporter_that_is_not_installed(run, tmp_path, monkeypatch, name):
    monkeypatch.setattr(reporters, "_installed", lambda package: False)
    argv = flags(run, tmp_path, "--dry_run")
    with pytest.raises(ValueError, match=f"pip install {name}, or choose --report_to none"):
        train.main([*argv, "--report_to", name])
    assert train.main([*argv, "--report_to", "none"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake, said, mended",
    [
        ("--attn_implementation flash", "choose auto or sdpa", "--attn_implementation sdpa"),
        ("--attn_implementation flash", "choose auto or sdpa", "--attn_implementation auto"),
        ("--frozen_dtype fp8 --bf16 True", "choose another --frozen_dtype", "--frozen_dtype int8 --bf16 True"),
    ],
)
def test_what_this_machine_or_model_cannot(run, tmp_path, mistake, said, mended):
    argv = flags(run, tmp_path, *FOUR)
    with pytest.raises(ValueError, match=said):
        train.main([*argv, *mistake.split()])
    assert train.main([*argv, *mended.split()]) == 0


@pytest.mark.slow
def test_without_bitsandbytes(run, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    argv = flags(run, tmp_path, *FOUR)
    with pytest.raises(ValueError, match="pip install 'bitsandbytes>=0.50', or choose int8"):
        train.main([*argv, "--frozen_dtype", "nf4"])
    assert train.main([*argv, "--frozen_dtype", "int8"]) == 0
    with pytest.raises(ValueError, match="pip install bitsandbytes, or choose --optim adamw_8bit"):
        optim8bit._Paging()  # which a run takes on a GPU alone
    assert train.main([*argv, "--optim", "adamw_8bit", "--output_dir", str(tmp_path / "8bit")]) == 0


def test_memory_that_does_not_suffice(run, tmp_path, caplog):
    """Everything that is suggested is a command that can be had."""
    argv = flags(run, tmp_path, "--dry_run", "--tune_mm_mlp_adapter", "False", "--memory", "0.05GiB")
    assert train.main(argv) == 0
    (suggested,) = re.findall("a step takes more than there is: try (.*)", caplog.text)
    assert "smaller batches" in suggested
    found = re.findall(r"(--\w+) ([\w.]+)", suggested)
    assert len(found) >= 3
    for flag, value in found:
        assert train.main([*argv, "--bf16", "True", flag, value]) == 0


def test_groups_of_ranks():
    world = parallel.World(0, 6, 0, torch.device("cpu"), False)
    with pytest.raises(
        ValueError, match="give a --shard_size of 2 or more that divides the number of ranks, or --shard full"
    ):
        parallel.ranks_of_a_copy("hybrid", world, 4)
    assert parallel.ranks_of_a_copy("hybrid", world, 3) == 3
    parallel.ranks_of_a_copy("full", world, None)


def test_a_flag_that_was_nearly_right(run, tmp_path, capsys):
    argv = flags(run, tmp_path, "--dry_run")
    with pytest.raises(SystemExit):
        train.main([*argv, "--lr", "1e-3", "--learning_rat", "1e-3"])
    near = re.findall("did you mean (--\\w+)", capsys.readouterr().err)
    assert near == ["--learning_rate"] * 2
    assert train.main([*argv, near[0], "1e-3"]) == 0


def test_flags_that_are_missing(run, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--learning_rate", "1e-3"])
    named = re.findall(r"--\w+", capsys.readouterr().err.split("give ")[-1])
    values = {"--model_name_or_path": run / "model", "--data_path": run / "train.json", "--output_dir": tmp_path}
    assert set(named) == set(values)
    parse(TrainConfig, [word for flag in named for word in (flag, str(values[flag]))])


@pytest.mark.slow
def test_a_disk_that_is_full(run, tmp_path, monkeypatch):
    """Space is freed by a lower limit, and by a user; the same command goes on."""
    monkeypatch.setattr(saver, "RETRY_AFTER", 0.0)
    argv = flags(run, tmp_path, "--max_steps", "8", "--save_steps", "4")
    with monkeypatch.context() as patch:
        write = shards.write

        def full(path, *given):
            if "checkpoint-8." in str(path):
                raise OSError(28, "No space left on device")
            write(path, *given)

        patch.setattr(shards, "write", full)
        with pytest.raises(
            OSError,
            match=r"free some \(a lower --save_total_limit keeps fewer\), then give the same "
            "command again: it goes on from the last checkpoint",
        ):
            train.main(argv)
    assert train.main([*argv, "--save_total_limit", "1"]) == 0
    assert max(losses(tmp_path)) == 8 and [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-8"]


@pytest.mark.slow
def test_a_run_that_is_done(run, tmp_path, capsys):
    argv = flags(run, tmp_path, *FOUR)
    assert train.main(argv) == train.main(argv) == 0
    assert "give more --max_steps or --num_train_epochs to go on, or --resume never to start over" in (
        capsys.readouterr().err
    )
    assert train.main([*argv, "--max_steps", "5"]) == 0 and max(losses(tmp_path)) == 5
    assert train.main([*argv, "--resume", "never"]) == 0 and max(losses(tmp_path)) == 4
    for epochs, steps in (("1", 6), ("2", 12)):
        assert train.main(flags(run, tmp_path / "by epochs", "--num_train_epochs", epochs)) == 0
        assert max(losses(tmp_path / "by epochs")) == steps


@pytest.mark.slow
def test_weights_and_biases_without_an_account(run, tmp_path, monkeypatch):
    def init(**options):
        if os.environ.get("WANDB_MODE") != "offline":
            raise RuntimeError("api_key not configured")
        return SimpleNamespace(
            id="abc", define_metric=lambda *a, **k: None, log=lambda values: None, finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    monkeypatch.setattr(reporters, "_installed", lambda package: True)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    argv = flags(run, tmp_path, *FOUR)
    with pytest.raises(ValueError, match="mend that, or set WANDB_MODE=offline, or choose --report_to none"):
        train.main([*argv, "--report_to", "wandb"])
    assert train.main([*argv, "--report_to", "none"]) == 0
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert train.main([*argv, "--report_to", "wandb", "--output_dir", str(tmp_path / "offline")]) == 0


def model(trainable, projector_type="linear"):
    return VideoLlava(model_config(projector_type), trainable=trainable, precision=Precision())


@pytest.mark.parametrize(
    "call, said, mended",
    [
        (
            lambda: choose_attention("fast", CPU, torch.float32, 64),
            "choose one of auto, ",
            lambda: choose_attention("auto", CPU, torch.float32, 64),
        ),
        (
            lambda: recomputed_layers("some", 4),
            "choose one of none, selective, full, or how many of the first layers, 0 to 4",
            lambda: [recomputed_layers(x, 4) for x in ("none", "full", 0, 4)],
        ),
        (
            lambda: Trainable(boundary=True, embed=True),
            "choose one",
            lambda: [Trainable(boundary=True), Trainable(embed=True)],
        ),
        (
            lambda: model(Trainable(projector=True), "mlp9x"),
            "choose linear or mlp2x_gelu",
            lambda: [model(Trainable(projector=True), kind) for kind in ("linear", "mlp2x_gelu")],
        ),
    ],
    ids=["attention", "recompute", "trained parts", "projector"],
)
def test_what_the_library_is_asked_for(call, said, mended):
    with pytest.raises(ValueError, match=said):
        call()
    mended()


def test_a_gpu_without_fp8(monkeypatch):
    """A pretended one; the first remedy is the flag left out."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(ValueError, match=r"Tesla T4 \(compute capability 7.5\) .*choose auto, int8 or nf4"):
        check_device("fp8", torch.device("cuda"))
    for frozen_dtype in ("int8", "nf4"):
        check_device(frozen_dtype, torch.device("cuda"))
