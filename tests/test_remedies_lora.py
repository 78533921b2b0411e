"""What messages about LoRA tell a user to do can be done, and works."""

import json
import re
import shutil

import pytest
from family_folders import write_model
from safetensors.torch import load_file, save_file
from training_run import flags, write_run

from fastvid import chat, export, train
from fastvid.config.policy import Trainable

LORA = "--lora_enable True --lora_r 4 --lora_alpha 8"
ASKED = "--model_name_or_path {made}/model --video {made}/feats/clip0.safetensors --question what --max_new_tokens 2"
ANSWERED = ASKED + " --projector {made}/plain/mm_projector.bin"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """out/: a run with LoRA; plain/: one without; merged/: an export of out/; wide/: another model; alone.bin: a
    projector without its adapter."""
    made = write_run(tmp_path_factory.mktemp("made"))
    for name, words in (("out", LORA.split()), ("plain", [])):
        assert train.main(flags(made, made / name, *words, "--max_steps", "1", "--save_steps", "1")) == 0
    write_model(made / "wide", "llama3")
    shutil.copy(made / "out" / "mm_projector.bin", made / "alone.bin")
    assert export.main(["--checkpoint", str(made / "out"), "--output", str(made / "merged"), "--merge"]) == 0
    bad = shutil.copytree(made / "out", made / "bad", ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = json.loads((bad / "adapter_config.json").read_text())
    (bad / "adapter_config.json").write_text(json.dumps({**settings, "r": 0}))
    return made


@pytest.fixture
def attempt(made, tmp_path):
    def attempt(command, words):
        argv = words.format(made=made, tmp=tmp_path).split()
        if command is train:
            argv = flags(made, tmp_path / "trained", *argv, "--max_steps", "1", "--save_steps", "1")
        return command.main(argv)

    return attempt


# (command, its flags with a mistake, what is said, flags as mended by what it says, one or several ways)
MISTAKES = [
    (
        train,
        LORA + " --lora_targets query",
        "'query' names no matrix of a layer; give all,",
        LORA + " --lora_targets all",
    ),
    (train, LORA + " --parity reference", "leave --parity reference out", LORA),
    (
        train,
        "--lora_weights {made}/out",
        "add --lora_enable True, or leave it out",
        LORA + " --lora_weights {made}/out",
        "",
    ),
    (
        train,
        LORA + " --mm_projector_lr 1e-5 --freeze_mm_mlp_adapter True",
        "leave the flag out, or give --freeze_mm_mlp_adapter False",
        LORA + " --freeze_mm_mlp_adapter True",
        LORA + " --mm_projector_lr 1e-5 --freeze_mm_mlp_adapter False",
    ),
    (
        train,
        "--lora_enable True --lora_weights {made}/out",
        "other settings than this run: give --lora_r 4 --lora_alpha 8",
        "--lora_enable True --lora_weights {made}/out --lora_r 4 --lora_alpha 8",
    ),
    (
        train,
        "--frozen_dtype int8 --tune_mm_mlp_adapter False",
        r"or LoRA \(--lora_enable True\)",
        LORA + " --frozen_dtype int8 --tune_mm_mlp_adapter False",
    ),
    (
        chat,
        ASKED + " --adapter {made}/plain --projector {made}/plain",
        "holds no LoRA adapter: give a folder with adapter_config.json, or",
        ANSWERED + " --adapter {made}/out",
        ANSWERED + " --adapter {made}/out/checkpoint-1",
    ),
    (
        chat,
        ASKED + " --projector {made}/alone.bin",
        "would answer wrongly without it: give the adapter's folder as --adapter",
        ASKED + " --projector {made}/alone.bin --adapter {made}/out",
    ),
    (
        chat,
        ASKED.replace("{made}/model", "{made}/merged") + " --projector {made}/out",
        r"is merged into .*/merged already: leave --adapter and --projector out \(chat,",
        ASKED.replace("{made}/model", "{made}/merged"),
    ),
    (
        train,
        "--model_name_or_path {made}/merged --lora_weights {made}/out " + LORA,
        r"is merged into .*/merged already: .*, or --lora_weights \(train\)",
        "--model_name_or_path {made}/merged " + LORA,
    ),
    (
        chat,
        ANSWERED + " --adapter https://huggingface.co/a/b",
        "is a URL: download the adapter's folder and give its path",
        ANSWERED + " --adapter {made}/out",
    ),
    (
        chat,
        ANSWERED + " --adapter {made}/bad",
        "no settings of LoRA; download it again",
        ANSWERED + " --adapter {made}/out",
    ),
    (
        chat,
        ANSWERED.replace("{made}/model", "{made}/out"),
        "is a LoRA adapter: give the model that it was trained on, and .*/out as --adapter",
        ANSWERED + " --adapter {made}/out",
    ),
    (
        chat,
        ASKED.replace("{made}/model", "{made}/wide") + " --adapter {made}/out",
        "Give the model that it was trained on as --model_name_or_path",
        ANSWERED + " --adapter {made}/out",
    ),
    (
        chat,
        ASKED.replace("{made}/model", "{made}/wide") + " --adapter {made}/out/checkpoint-1",
        "give the folder that training started from as --model_name_or_path",
        ANSWERED + " --adapter {made}/out/checkpoint-1",
    ),
    (
        export,
        "--checkpoint {made}/plain --output {tmp}/e --merge True",
        "holds no LoRA adapter .*; leave the flag out",
        "--checkpoint {made}/plain --output {tmp}/e.bin",
    ),
    (
        export,
        "--checkpoint {made}/out --output {tmp}/e --merge True --format peft",
        "give --format llama or llava",
        "--checkpoint {made}/out --output {tmp}/e --merge True --format llama",
    ),
    (
        export,
        "--checkpoint {made}/out --output {made}/model --format peft",
        "holds something else than an adapter; choose another folder",
        "--checkpoint {made}/out --output {tmp}/e --format peft",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("command, mistake, said, mended", [(*row[:3], row[3:]) for row in MISTAKES])
def test_a_mistake_about_lora_is_mended_as_told(attempt, tmp_path, command, mistake, said, mended):
    with pytest.raises(ValueError, match=said):
        attempt(command, mistake)
    for words in mended:
        assert attempt(command, words) == 0
        shutil.rmtree(tmp_path / "trained", ignore_errors=True)


@pytest.mark.slow
def test_an_adapter_of_another_kind_is_merged_by_peft(made, tmp_path, attempt):
    peft = pytest.importorskip("peft")
    from transformers import LlamaForCausalLM

    base = LlamaForCausalLM.from_pretrained(made / "model", **{"config": llama_config(made / "model")})
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    model.save_pretrained(tmp_path / "dora")
    with pytest.raises(ValueError, match=r"merge .* with PEFT \(merge_and_unload\), and give the folder of that"):
        attempt(chat, ANSWERED + " --adapter {tmp}/dora")
    merged = shutil.copytree(made / "model", tmp_path / "merged")
    held = load_file(merged / "model.safetensors")
    ours = {name: tensor for name, tensor in model.merge_and_unload().state_dict().items() if name in held}
    assert len(ours) > 10
    save_file(held | {name: tensor.contiguous() for name, tensor in ours.items()}, merged / "model.safetensors")
    assert attempt(chat, ANSWERED.replace("{made}/model", "{tmp}/merged")) == 0


def llama_config(folder):
    from transformers import LlamaConfig

    values = json.loads((folder / "config.json").read_text())
    return LlamaConfig(**{key: value for key, value in values.items() if key not in ("model_type", "architectures")})


@pytest.mark.slow
def test_what_is_left_out_is_taken_as_told(attempt, caplog):
    assert attempt(train, "--pretrain_mm_mlp_adapter {made}/out") == 0
    [told] = [line for line in caplog.messages if "is left out" in line]
    (words,) = re.findall(r"(--lora_weights \S+) takes it", told)
    caplog.clear()
    assert attempt(train, f"--pretrain_mm_mlp_adapter {{made}}/out {LORA} {words} --resume never") == 0
    assert attempt(export, "--checkpoint {made}/out --output {tmp}/p.bin") == 0
    assert "--format peft, llama or llava holds it" in caplog.text
    for form in ("peft", "llama"):
        assert attempt(export, f"--checkpoint {{made}}/out --output {{tmp}}/{form} --format {form}") == 0


def test_lora_is_beside_a_frozen_decoder():
    from fastvid.config.policy import Lora

    with pytest.raises(ValueError, match="choose one"):
        Trainable(decoder=True, lora=Lora(1, 1.0))
