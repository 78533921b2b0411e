"""Runs with LoRA: from the command line to PEFT and back, on ranks, resumed, beside matrices in few bits."""

import dataclasses
import json
import shutil

import pytest
import torch
from checkpoint_cases import flip_a_bit
from family_folders import write_model
from model_cases import assert_close, pack
from ranks import on_ranks
from safetensors.torch import load_file, save_file
from test_family_runs import data, run  # noqa: F401
from training_run import config_of, flags, losses, write_run

from fastvid import chat, demo, evaluate, serve, train
from fastvid.checkpoints import checkpoint
from fastvid.config import ExportConfig
from fastvid.config.policy import LORA_TARGETS
from fastvid.dist import parallel
from fastvid.dist.sharding import full_tensor
from fastvid.evaluation import predict
from fastvid.inference.chat import Chat
from fastvid.serving import launch
from fastvid.training import checks, recovery
from fastvid.weights.adapter import adapter_folder, adapter_of, read_adapter
from fastvid.weights.export import export

CPU = torch.device("cpu")
ALONE = parallel.World(0, 1, 0, CPU, False)
LORA = ["--lora_enable", "True", "--lora_r", "4", "--lora_alpha", "8"]
STILL = [*LORA, "--lora_dropout", "0"]
IDS = [5, 9, 33, 2, 70]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("lora"))
    assert train.main(flags(folder, folder / "out", *LORA, "--max_steps", "6", "--save_steps", "4")) == 0
    return folder


def trained_tensors(output, step):
    return checkpoint.read_full(output / f"checkpoint-{step}", "model")


def logits(chat):
    batch = pack([(IDS, range(3, 4))], channels=chat.model_config.mm_hidden_size)
    with torch.no_grad():
        return chat.model.logits(chat.model.hidden(batch))


def peft_logits(base, adapter):
    """Of the `peft` package over transformers' model of a base folder."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).eval()
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama3", "qwen3"])
def test_peft_loads_what_training_leaves_and_training_what_peft_leaves(tmp_path, data, kind):  # noqa: F811
    base, out = write_model(tmp_path / "base", kind), tmp_path / "out"
    assert run(base, data, out, *LORA) == 0
    chat = Chat(model_name_or_path=str(base), projector=str(out), max_new_tokens=4)
    plain = Chat(model_name_or_path=str(base), projector=str(out / "mm_projector.bin"), max_new_tokens=4)
    assert chat.adapter == out
    rows = 100  # tokens that the base model has too
    theirs = peft_logits(base, out)[:, :rows]
    assert_close(logits(chat)[:, :rows], theirs)
    assert plain.adapter == out, "the file's own folder is looked at too"

    exported = {name: tmp_path / name for name in ("peft", "llama")}
    export(ExportConfig(str(out), str(exported["peft"]), "peft"))
    export(ExportConfig(str(out), str(exported["llama"]), merge=True))
    assert_close(peft_logits(base, exported["peft"])[:, :rows], theirs)
    for again in (
        Chat(model_name_or_path=str(exported["llama"])),
        Chat(model_name_or_path=str(base), projector=str(exported["peft"])),
        Chat(model_name_or_path=str(base), projector=str(out / "checkpoint-3")),
        Chat(model_name_or_path=str(base), projector=str(out), adapter=str(exported["peft"])),
    ):
        assert torch.equal(logits(again), logits(chat))

    own = peft_adapter(base, tmp_path / "theirs")
    chat = Chat(model_name_or_path=str(base), projector=str(out), adapter=str(own))
    assert_close(logits(chat)[:, :rows], peft_logits(base, own)[:, :rows])
    config = config_of(base, tmp_path / "next", *STILL, "--lora_targets", "q_proj,v_proj", "--lora_weights", str(own))
    given = {"data_path": [str(data / "train.json")], "video_folder": str(data), "model_name_or_path": str(base)}
    state = train.build(dataclasses.replace(config, **given), ALONE)
    with torch.no_grad():
        started = state.model.logits(state.model.hidden(pack([(IDS, range(3, 4))], channels=10)))
    assert_close(started[:, :rows], peft_logits(base, own)[:, :rows])


def peft_adapter(base, folder):
    """An adapter that the `peft` package made and saved, of q and v alone."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    "more", [(), ("--optim", "adamw_8bit", "--lora_r", "256", "--bf16", "True")], ids=["fp32", "8bit"]
)
def test_a_resumed_run_has_the_same_bits(made, tmp_path, more):
    words = [*LORA, "--max_steps", "4", "--save_steps", "2", *more]
    assert train.main(flags(made, tmp_path / "out", *words)) == 0
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert train.main(flags(made, tmp_path / "again", *words)) == 0
    whole, again = (trained_tensors(tmp_path / name, 4) for name in ("out", "again"))
    assert whole.keys() == again.keys() and sum(".lora." in name for name in whole) == 2 * 2 * 4
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert losses(tmp_path / "again")[4] == losses(tmp_path / "out")[4]
    ours = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("out", "again")]
    assert all(torch.equal(ours[0][name], ours[1][name]) for name in ours[0])


def steps_of(rank, world, folder, output, words):
    """[(loss, gradient norm)] of two steps, and every trained tensor after them; saved by all ranks."""
    state = train.build(config_of(folder, output, *words), parallel.World(rank, world, rank, CPU, world > 1, world))
    found = []
    for batches, _ in state.loader.iterate(0):
        result = train.train_step(state, batches)
        found.append((result.loss.item(), result.gradient_norm.item()))
        if state.step == 2:
            break
    recovery.save(state)
    state.saver.wait()
    return found, {name: full_tensor(p) for name, p in state.optimizer.parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "accumulation, more",
    [
        *((n, ("--shard", shard)) for n in (1, 2) for shard in ("none", "auto", "full")),
        (2, ("--frozen_dtype", "int8")),
        (1, ("--freeze_mm_mlp_adapter", "True", "--optim", "adamw_8bit")),
    ],
)
def test_two_ranks_are_one(made, tmp_path, accumulation, more):
    # The second step has a learning rate.
    words = [*STILL, "--dataloader_num_workers", "0", "--warmup_steps", "1", "--learning_rate", "1e-3"]
    split = ["--per_device_train_batch_size", str(4 // accumulation // 2), "--gradient_accumulation_steps"]
    words += more
    alone = steps_of(0, 1, made, tmp_path / "one", [*words, "--per_device_train_batch_size", "4"])
    found = on_ranks(2, steps_of_rank, tmp_path, made, tmp_path / "two", [*words, *split, str(accumulation)])
    for steps, tensors in found:
        assert steps == [pytest.approx(pair, rel=1e-5) for pair in alone[0]]
        for name, tensor in alone[1].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
    saved = checkpoint.read_full(checkpoint.newest_valid(tmp_path / "two"), "model")
    assert all(torch.equal(saved[name], found[0][1][name]) for name in saved)
    # One process goes on from what two ranks saved.
    state = train.build(config_of(made, tmp_path / "two", *words, "--per_device_train_batch_size", "4"), ALONE)
    recovery.resume(state)
    assert state.step == 2
    assert all(torch.equal(p.detach(), saved[name]) for name, p in state.optimizer.parameters.items())


def steps_of_rank(rank, *arguments):
    return steps_of(rank, 2, *arguments)


@pytest.mark.slow
def test_four_ranks_in_two_groups_are_one(made, tmp_path):
    """--shard hybrid: two copies of the model, each on two ranks, and so the average of the steps."""
    words = [*STILL, "--dataloader_num_workers", "0", "--warmup_steps", "1", "--learning_rate", "1e-3"]
    words += ["--ema_decay", "0.9", "--per_device_train_batch_size"]
    alone = steps_of(0, 1, made, tmp_path / "one", [*words, "4"])
    groups = [*words, "1", "--shard", "hybrid", "--shard_size", "2"]
    for steps, tensors in on_ranks(4, steps_of_four, tmp_path, made, tmp_path / "four", groups):
        assert steps == [pytest.approx(pair, rel=1e-5) for pair in alone[0]]
        for name, tensor in alone[1].items():
            torch.testing.assert_close(tensors[name], tensor, rtol=1e-4, atol=1e-5)
    for group in ("model", "training"):  # the average, and what goes on
        one, four = (checkpoint.read_full(checkpoint.newest_valid(tmp_path / name), group) for name in ("one", "four"))
        assert one.keys() == four.keys()
        for name in one:
            torch.testing.assert_close(four[name], one[name], rtol=1e-4, atol=1e-5)
    state = train.build(config_of(made, tmp_path / "four", *words, "4"), ALONE)
    recovery.resume(state)
    assert state.step == 2
    assert all(torch.equal(value, four[name]) for name, value in state.optimizer.parameters.items())


def steps_of_four(rank, *arguments):
    return steps_of(rank, 4, *arguments)


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["int8", "nf4", "fp8"])
def test_beside_matrices_in_few_bits(made, tmp_path, bits):
    words = [*LORA, "--frozen_dtype", bits, "--bf16", "True", "--max_steps", "3", "--save_strategy", "no"]
    folder = made if bits != "fp8" else write_run(tmp_path / "wide", hidden_size=32, intermediate_size=64)
    assert train.main(flags(folder, tmp_path / "out", *words)) == 0
    assert len(losses(tmp_path / "out")) == 3
    adapter = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for tensor in adapter.values())


@pytest.mark.slow
def test_shared_videos_train_as_videos_apart(made, tmp_path):
    records = json.loads((made / "train.json").read_text())
    for i, record in enumerate(records):
        record["video"] = f"clip{i // 4}.safetensors"
        record["conversations"][0]["value"] = f"<video>\nwhat {'is it ' * (i % 3)}?"
    (tmp_path / "train.json").write_text(json.dumps(records))
    words = [*STILL, "--max_steps", "1", "--per_device_train_batch_size", "12", "--save_strategy", "no"]
    words += ["--warmup_ratio", "0", "--dataloader_num_workers", "0"]
    found = []
    for more in ([], ["--share_video", "True"]):
        config = config_of(made, tmp_path / f"out{len(more)}", *words, *more)
        state = train.build(dataclasses.replace(config, data_path=[str(tmp_path / "train.json")]), ALONE)
        batches, _ = next(state.loader.iterate(0))
        rows = batches[0].num_rows
        found.append((rows, train.train_step(state, batches)))
    (plain_rows, plain), (rows, shared) = found
    assert rows < plain_rows
    assert shared.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert shared.gradient_norm.item() == pytest.approx(plain.gradient_norm.item(), rel=1e-5)


@pytest.mark.slow
def test_new_matrices_are_peft_s_and_depend_on_the_seed_alone(made, tmp_path):
    """A is drawn as nn.Linear's weight, B is zero; of fewer targets each has what it has among all."""
    states = [
        train.build(config_of(made, tmp_path, *LORA, *more), ALONE)
        for more in ([], ["--seed", "7"], ["--lora_targets", "v_proj", "down_proj"])
    ]
    first, other, some = (dict(state.optimizer.parameters) for state in states)
    qkv = "decoder.layers.1.lora.qkv.a.weight"
    assert first[qkv].shape == (12, 24) and some[qkv].shape == (4, 24)
    assert torch.equal(first[qkv][8:], some[qkv]) and not torch.equal(first[qkv], other[qkv])
    drawn = torch.cat([p.detach().flatten() for n, p in first.items() if n.endswith("gate_up.a.weight")]) * 24**0.5
    assert drawn.abs().max() <= 1 and drawn.std().item() == pytest.approx(3**-0.5, rel=0.1)
    assert all(not p.any() for name, p in first.items() if name.endswith(".b.weight"))
    assert not torch.equal(first[qkv][:4], first[qkv][4:8])


@pytest.mark.slow
def test_the_projector_may_have_a_rate_of_its_own(made, tmp_path):
    moved = {}
    for rate in (None, "0", "1e-2"):
        words = [*STILL, "--max_steps", "1", "--warmup_ratio", "0", *(["--mm_projector_lr", rate] if rate else [])]
        state = train.build(config_of(made, tmp_path, *words), ALONE)
        before = {name: p.detach().clone() for name, p in state.optimizer.parameters.items()}
        train.train_step(state, next(state.loader.iterate(0))[0])
        moved[rate] = {name: p.detach() - before[name] for name, p in state.optimizer.parameters.items()}
    assert not any(change.any() for name, change in moved["0"].items() if "projector" in name)
    for name in moved[None]:
        assert torch.equal(moved[None][name], moved["1e-2"][name])  # --learning_rate of these flags is the same
        assert "projector" in name or torch.equal(moved[None][name], moved["0"][name])
        assert "lora" not in name or name.endswith(".a.weight") or moved["0"][name].any()


def test_the_overview_tells_what_lora_is_and_what_it_ends(made, tmp_path, caplog):
    with caplog.at_level("INFO", "fastvid"):
        assert train.main(flags(made, tmp_path, *LORA, "--dry_run", "True")) == 0
    said = next(line for line in caplog.messages if line.startswith("LoRA: "))
    assert said.startswith("LoRA: r 4, alpha 8, dropout 0.05, on q_proj, k_proj, ")
    assert said.endswith("no system prompt is kept and none is frozen")
    # r (I + O) of each target: of 24 channels, 4 heads and 2 of keys of 6 channels, 44 in the feed-forward block.
    count = 2 * 4 * (2 * (24 + 24) + 2 * (24 + 12) + 3 * (24 + 44))
    assert f"LoRA {count:,}; " in caplog.text
    state = train.build(config_of(made, tmp_path, *LORA), ALONE)
    assert not state.loader.prefix and all(not b.frozen_rows for b in state.loader.read(0)[0])
    assert sum(p.numel() for n, p in state.optimizer.parameters.items() if ".lora." in n) == count


@pytest.mark.parametrize(
    "words, said",
    [
        (["--lora_enable", "True", "--parity", "reference"], "leave --parity reference out"),
        (["--lora_weights", "x"], "add --lora_enable True"),
        ([*LORA, "--lora_targets", "lm_head"], "'lm_head' names no matrix"),
        ([*LORA, "--freeze_mm_mlp_adapter", "True", "--mm_projector_lr", "1"], "the projector is frozen"),
    ],
)
def test_flags_that_contradict_each_other(made, tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        checks.checked(config_of(made, tmp_path, *words))


def peft_folder(folder, made, **changes):
    """A copy of the run's adapter with other settings."""
    folder.mkdir()
    settings = json.loads((made / "out" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    shutil.copy(made / "out" / "adapter_model.safetensors", folder)
    return folder


def decoder_of(made):
    from fastvid.weights.model_config import read_model_config

    return read_model_config(made / "model").decoder


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"peft_type": "IA3"}, "of kind IA3 is not computed"),
        ({"use_dora": True}, "use_dora = True is not computed; merge the adapter into its base"),
        ({"bias": "all"}, "bias = all"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa is not computed; merge the"),
        ({"init_lora_weights": "olora"}, "init_lora_weights = olora"),
        ({"alora_invocation_tokens": [5, 9]}, r"alora_invocation_tokens = \[5, 9\] is not computed"),
        ({"use_qalora": True}, "use_qalora = True"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"of_a_later_version": 1}, "of_a_later_version = 1 is not computed"),
        ({"use_rslora": "true"}, "use_rslora = true are no settings of LoRA"),
        ({"r": True}, "are no settings of LoRA"),
        ({"r": "4"}, "are no settings of LoRA"),
        ({"lora_alpha": float("nan")}, "are no settings of LoRA"),
        ({"r": 8}, r"lora_A.weight is \[4, 24\], the model's is \[8, 24\]"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be_read(made, tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        read_adapter(peft_folder(tmp_path / "a", made, **changes), decoder_of(made))


@pytest.mark.parametrize(
    "changes",
    [
        *({"init_lora_weights": drawn} for drawn in (True, False, None, "gaussian", "orthogonal", "eva")),
        {"use_rslora": None, "bias": None, "trainable_token_indices": None, "loftq_config": {}, "use_qalora": False},
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "runtime_config": {"ephemeral_gpu_offload": True}},
        {"auto_mapping": {"unsloth_fixed": True}, "megatron_core": "megatron.core", "qalora_group_size": 16},
        {"task_type": "CAUSAL_LM", "revision": "main", "peft_version": "0.21.2", "layers_to_transform": [0, 1]},
    ],
    ids=str,
)
def test_settings_that_change_nothing(made, tmp_path, changes):
    folder = peft_folder(tmp_path / "a", made, **changes)
    assert read_adapter(folder, decoder_of(made)).lora == read_adapter(made / "out", decoder_of(made)).lora


def test_tensors_that_are_not_the_models(made, tmp_path):
    folder = peft_folder(tmp_path / "a", made)
    held = load_file(folder / "adapter_model.safetensors")
    first = next(name for name in held if "q_proj.lora_A" in name)
    for tensors, said in (
        ({name: x for name, x in held.items() if name != first}, "q_proj.lora_A.weight is missing"),
        (held | {first: held[first] * torch.nan}, "is not finite"),
        (held | {first.replace("q_proj", "gate"): held[first].clone()}, "is of no matrix that has LoRA here"),
        (held | {first.replace("layers.0", "layers.9"): held[first].clone()}, "is unexpected"),
        ({}, "it holds no tensors"),
    ):
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=said):
            read_adapter(folder, decoder_of(made))
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        read_adapter(folder, decoder_of(made))
    for path, said in (
        (made / "model", "holds no LoRA adapter"),
        (made / "x", "holds no"),
        ("https://x/y", "is a URL"),
    ):
        with pytest.raises(ValueError, match=said):
            adapter_folder(path)


def test_an_older_file_of_llava_is_read(made, tmp_path):
    """adapter_model.bin, in the names of llava-hf."""
    folder = peft_folder(tmp_path / "a", made)
    held = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(
        {k.replace("base_model.model.", "base_model.model.language_model."): v for k, v in held.items()},
        folder / "adapter_model.bin",
    )
    ours, theirs = (read_adapter(path, decoder_of(made)) for path in (made / "out", folder))
    assert ours.lora == theirs.lora == dataclasses.replace(ours.lora, rank=4, targets=LORA_TARGETS)
    assert all(torch.equal(ours.tensors[name], theirs.tensors[name]) for name in ours.tensors)


def test_where_an_adapter_lies(made, tmp_path):
    out = made / "out"
    assert adapter_of(out) == adapter_of(out / "mm_projector.bin") == out
    assert adapter_of(out / "checkpoint-6") == out / "checkpoint-6"
    assert adapter_of(made / "model") is None and adapter_of(tmp_path) is None
    shutil.copytree(out / "checkpoint-6", tmp_path / "checkpoint-6")
    assert adapter_of(tmp_path) == tmp_path / "checkpoint-6"
    assert read_adapter(adapter_of(tmp_path), decoder_of(made)).lora == read_adapter(out, decoder_of(made)).lora
    flip_a_bit(next((tmp_path / "checkpoint-6").glob("model-*.safetensors")))
    with pytest.raises(ValueError, match="checkpoint-6"):
        adapter_folder(tmp_path / "checkpoint-6")


@pytest.mark.slow
def test_an_adapter_is_merged_once_wherever_it_lies(made, tmp_path):
    """One that was trained on the merged model is another, even within the first one's folder."""
    out = shutil.copytree(made / "out", tmp_path / "out")
    merged, again, elsewhere = (str(tmp_path / name) for name in ("merged", "again", "elsewhere"))
    export(ExportConfig(str(out), merged, merge=True))
    export(ExportConfig(str(out), elsewhere, "peft"))
    starts = ["--model_name_or_path", merged, "--max_steps", "1", "--save_steps", "1", *LORA]
    assert train.main(flags(made, out / "stage2", *starts)) == 0
    chat = Chat(model_name_or_path=merged, projector=str(out / "stage2"))
    export(ExportConfig(str(out / "stage2"), again, merge=True))
    assert torch.equal(logits(Chat(model_name_or_path=again)), logits(chat))
    for base, adapter in (
        (merged, elsewhere),
        (merged, out / "checkpoint-6"),
        (again, elsewhere),
        (again, out / "stage2"),
    ):
        with pytest.raises(ValueError, match=f"is merged into {base} already"):
            Chat(model_name_or_path=base, projector=str(out / "stage2"), adapter=str(adapter))
    for more in ([], ["--dry_run", "True"]):
        with pytest.raises(ValueError, match=f"elsewhere/adapter_model.safetensors is merged into {merged} already"):
            train.main(flags(made, tmp_path / "next", *starts, "--lora_weights", elsewhere, *more))
    assert Chat(model_name_or_path=merged, projector=str(out / "stage2"), adapter=str(out / "checkpoint-4")).adapter


def test_exports_that_are_refused(made, tmp_path):
    adapter_only = tmp_path / "plain"
    assert train.main(flags(made, adapter_only, "--max_steps", "1", "--save_steps", "1")) == 0
    for settings, said in (
        ({"checkpoint": str(adapter_only), "merge": True}, "--merge True: .* holds no LoRA adapter"),
        ({"checkpoint": str(adapter_only), "format": "peft"}, "--format peft: .* holds no LoRA adapter"),
        ({"checkpoint": str(made / "out"), "merge": True, "format": "projector"}, "give --format llama or llava"),
        ({"checkpoint": str(made / "out"), "format": "peft", "output": str(made)}, "holds something else"),
    ):
        with pytest.raises(ValueError, match=said):
            export(ExportConfig(**{"output": str(tmp_path / "e"), **settings}))


def test_an_adapter_of_other_settings_names_the_flags(made, tmp_path):
    words = ["--lora_enable", "True", "--lora_targets", "q_proj", "--lora_weights", str(made / "out")]
    with pytest.raises(ValueError, match=r"give --lora_r 4 --lora_alpha 8 --lora_targets q_proj k_proj .* down_proj$"):
        train.build(config_of(made, tmp_path, *words), ALONE)


@pytest.mark.slow
def test_a_run_that_starts_from_an_adapter_goes_on_only_with_it(made, tmp_path):
    words = [*LORA, "--max_steps", "2", "--save_steps", "1", "--lora_weights"]
    assert train.main(flags(made, tmp_path / "out", *words, str(made / "out"))) == 0
    shutil.rmtree(tmp_path / "out" / "checkpoint-2")
    with pytest.raises(ValueError, match="the content of --lora_weights .* is not the same"):
        train.main(flags(made, tmp_path / "out", *words, str(made / "out" / "checkpoint-4")))


def test_a_projector_alone_leaves_the_adapter_out_and_says_so(made, tmp_path, caplog):
    words = ["--max_steps", "1", "--pretrain_mm_mlp_adapter", str(made / "out"), "--dry_run", "True"]
    assert train.main(flags(made, tmp_path, *words)) == 0
    assert "holds a LoRA adapter, which is left out: --lora_weights" in caplog.text


def test_predictions_know_the_adapter_that_they_are_of(made):
    """An --output of another adapter's, or of none, is not gone on with."""
    found = [
        predict.fingerprints(
            Chat(model_name_or_path=str(made / "model"), projector=str(made / "out"), adapter=adapter and str(adapter))
        )
        for adapter in (None, made / "out" / "checkpoint-4", made / "out" / "checkpoint-6")
    ]
    assert len({settings.get("adapter") for settings in found}) == 3
    assert len({settings["weights"] for settings in found}) == 1


@pytest.mark.parametrize("command", [chat, evaluate, serve, demo], ids=lambda command: command.__name__)
def test_every_command_that_loads_a_model_hands_on_its_adapter(made, tmp_path, monkeypatch, command):
    class Loaded(Exception):
        pass

    def load(config):
        raise Loaded(config.adapter, config.projector)

    video = ["--video", str(made / "feats" / "clip0.safetensors"), "--question", "what?"]
    words = {
        chat: video,
        evaluate: ["--output", str(tmp_path), "--task", "match", "--annotations", "x", "--video", str(made / "feats")],
        serve: ["--port", "0"],
        demo: ["--port", "0"],
    }[command]
    monkeypatch.setattr(launch if command in (serve, demo) else command, "Chat", load)
    with pytest.raises(Loaded) as loaded:
        command.main([*words, "--model_name_or_path", "model", "--adapter", "theirs", "--projector", "ours"])
    assert loaded.value.args == ("theirs", "ours")
