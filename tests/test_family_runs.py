"""Each family from its folder through training, resuming and exporting to an answer."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from family_folders import CHANNELS, KINDS, write_model
from model_cases import assert_close, pack
from safetensors.torch import load_file
from training_run import flags, losses

from fastvid import train
from fastvid.config import ExportConfig
from fastvid.features.file import save_features
from fastvid.inference.chat import Chat
from fastvid.weights import families
from fastvid.weights.export import export

ROWS = 6
ARCHITECTURES = {family.model_type: family.config.removesuffix("Config") for family in families.FAMILIES}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """train.json and feats/: twelve records about twelve videos."""
    folder = tmp_path_factory.mktemp("data")
    draw = np.random.default_rng(0)
    records = []
    for i in range(12):
        turns = [("human", "What is it?\n<video>" if i % 2 else "<video>\nWhy red?"), ("gpt", f"It plays {i} cards")]
        turns += [("human", "Who?"), ("gpt", "the cat")] * (i % 3 == 0)
        conversation = [{"from": who, "value": text} for who, text in turns]
        records.append({"id": str(i), "video": f"{i}.safetensors", "conversations": conversation})
        features = torch.from_numpy(draw.standard_normal((ROWS, CHANNELS)).astype(np.float32))
        save_features(folder / f"{i}.safetensors", features, {})
    (folder / "train.json").write_text(json.dumps(records))
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder = tmp_path_factory.mktemp("tower")
    sizes = {"hidden_size": CHANNELS, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=28, patch_size=14)).save_pretrained(folder)
    return folder


def run(folder, data, output, *more):
    """Three steps; the exit code."""
    given = {
        "--model_name_or_path": folder,
        "--data_path": data / "train.json",
        "--video_folder": data,
        "--output_dir": output,
    }
    words = flags(folder, output, "--max_steps", "3", "--save_steps", "2", *more)
    return train.main([str(given.get(words[i - 1], word)) for i, word in enumerate(words)])


@pytest.mark.slow
@pytest.mark.parametrize("kind, full", [*zip(KINDS, itertools.cycle([False, True]))])  # smollm2's tied head is trained
def test_from_a_folder_to_an_answer(tmp_path, data, tower, kind, full, caplog):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlavaForConditionalGeneration

    base = write_model(tmp_path / "base", kind)
    more = ["--tune_mm_mlp_adapter", "False"] if full else ["--share_video"]
    with caplog.at_level("INFO", "fastvid"):
        assert run(base, data, tmp_path / "out", *more) == 0
    assert caplog.text.count("prompts: chat_template") == 1
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "state.json").read_text())
    assert state["config"]["version"] == "chat_template"

    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "again" / "checkpoint-2")
    assert run(base, data, tmp_path / "again", *more) == 0
    assert losses(tmp_path / "again")[3] == losses(tmp_path / "out")[3]
    ours, again = (
        load_file(next((tmp_path / name / "checkpoint-3").glob("model-*.safetensors"))) for name in ("out", "again")
    )
    assert ours.keys() == again.keys() and all(torch.equal(ours[name], again[name]) for name in ours)

    exported, model_type = {}, KINDS[kind][0]
    for form in ("llama", "llava"):
        exported[form] = tmp_path / form
        export(ExportConfig(str(tmp_path / "out"), str(exported[form]), form, vision_tower=str(tower)))
    chats = [
        Chat(model_name_or_path=str(exported["llama"]), max_new_tokens=8),
        Chat(model_name_or_path=str(exported["llava"]), max_new_tokens=8),
    ]
    if not full:
        chats.append(Chat(model_name_or_path=str(base), projector=str(tmp_path / "out"), max_new_tokens=8))
    features = torch.randn(ROWS, CHANNELS)
    answers = {chat.ask_features(features, "What is it?", [("Who?", "the cat")]) for chat in chats}
    assert {chat.config.conv_mode for chat in chats} == {"chat_template"} and len(answers) == 1

    theirs, report = AutoModelForCausalLM.from_pretrained(exported["llama"], output_loading_info=True)
    assert type(theirs).__name__ == f"{ARCHITECTURES[model_type]}ForCausalLM"
    assert not report["missing_keys"] and all("mm_projector" in key for key in report["unexpected_keys"])
    llava, report = LlavaForConditionalGeneration.from_pretrained(exported["llava"], output_loading_info=True)
    assert type(llava.model.language_model).__name__ == f"{ARCHITECTURES[model_type]}Model"
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ids = [5, 9, 33, 2, 70]
    with torch.no_grad():
        found = chats[0].model.logits(chats[0].model.hidden(pack([(ids, range(3, 4))], channels=CHANNELS)))
        for each in (theirs, llava):
            assert_close(found, each(input_ids=torch.tensor([ids])).logits[0])
    stops = chats[0].tokenizer.stops
    assert theirs.generation_config.eos_token_id == (stops[0] if len(stops) == 1 else list(stops))
    tokenizer = AutoTokenizer.from_pretrained(exported["llama"])
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    assert tokenizer(text, add_special_tokens=False).input_ids == chats[0].tokenizer.encode(text)[0]


def test_samples_beyond_a_sliding_window_are_refused(tmp_path, data):
    base = write_model(tmp_path / "base", "mistral")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"sliding_window": 200}))
    with pytest.raises(ValueError, match="--model_max_length 512: .*sliding_window.*; give --model_max_length 200"):
        run(base, data, tmp_path / "out", "--dry_run")
    assert run(base, data, tmp_path / "out", "--dry_run", "--model_max_length", "200") == 0


@pytest.mark.slow
def test_a_changed_template_does_not_go_on(tmp_path, data):
    base = write_model(tmp_path / "base", "qwen2")
    assert run(base, data, tmp_path / "out") == 0
    path = base / "tokenizer_config.json"
    path.write_text(path.read_text().replace("Be brief.", "Be long."))
    with pytest.raises(ValueError, match="the chat template in --model_name_or_path .* is not the same"):
        run(base, data, tmp_path / "out", "--num_train_epochs", "4")


@pytest.mark.slow
def test_versions_that_are_not_the_models(tmp_path, data):
    base = write_model(tmp_path / "base", "qwen2")
    with pytest.raises(ValueError, match="--version v1: .*; give --version chat_template, or leave it out"):
        run(base, data, tmp_path / "out", "--dry_run", "--version", "v1")
    for mended in (["--version", "chat_template"], []):
        assert run(base, data, tmp_path / "out", "--dry_run", *mended) == 0
    with pytest.raises(ValueError, match="--parity reference: .*; leave it out"):
        run(base, data, tmp_path / "out", "--dry_run", "--parity", "reference")
    with pytest.raises(ValueError, match="--conv_mode vicuna_v1_1 is not for .*; leave --conv_mode out"):
        Chat(model_name_or_path=str(base), conv_mode="vicuna_v1_1")
    assert Chat(model_name_or_path=str(base)).config.conv_mode == "chat_template"
