"""Folders that transformers' own models of each family write: every tensor is found, and the model is the same."""

import pytest
import torch
from family_folders import KINDS
from model_cases import ADAPTER, FAMILIES, FULL, assert_close, family_config, llama_of, pack, random_model
from weight_folders import VideoTokens, load

from fastvid.data.tokenizer import LLAMA_TYPES
from fastvid.training.memory import parameter_counts
from fastvid.weights import families

TOKENS = VideoTokens(patch=97, start=98, end=99, vocab_size=100)


def written(folder, family, **changes):
    """(transformers' model, the folder that it wrote)."""
    theirs = llama_of(random_model(family_config(family, **changes), FULL))
    for parameter in theirs.parameters():
        parameter.data.copy_(torch.randn_like(parameter) * 0.2)
    theirs.save_pretrained(folder)
    return theirs


def test_every_family_is_compared():
    """Here, and with a tokenizer and a template of its own; LLaMA's words are those that the tokenizer knows."""
    known = {family.model_type: family for family in families.FAMILIES}
    assert {"llama", *FAMILIES} == known.keys() == {kind[0] for kind in KINDS.values()}
    assert set(LLAMA_TYPES) == {"llama", *known["llama"].other_types}


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_of_transformers(tmp_path, family, frozen):
    theirs = written(tmp_path / "m", family)
    trainable = ADAPTER if frozen else FULL
    model = load(tmp_path / "m", tokens=TOKENS, trainable=trainable, mm_hidden_size=12)
    ids = torch.tensor([5, 9, 33, 2, 70])
    batch = batch_of(ids)
    with torch.no_grad():
        assert_close(model.logits(model.hidden(batch)), theirs(input_ids=ids[None]).logits[0])
    found = parameter_counts(model.config, trainable)
    for part in ("embed", "decoder"):
        assert found[part] == sum(p.numel() for p in getattr(model, part).parameters())


def batch_of(ids):

    return pack([(ids.tolist(), range(len(ids) - 2, len(ids) - 1))])


@pytest.mark.parametrize("family, tensor", [("qwen2", "k_proj.bias"), ("qwen3", "q_norm.weight")])
def test_a_missing_tensor_is_named(tmp_path, family, tensor):
    theirs = written(tmp_path / "m", family)
    state = theirs.state_dict()
    del state[f"model.layers.1.self_attn.{tensor}"]
    theirs.save_pretrained(tmp_path / "m", state_dict=state)
    with pytest.raises(ValueError, match=f"model.layers.1.self_attn.{tensor} is missing"):
        load(tmp_path / "m", tokens=TOKENS)


@pytest.mark.parametrize("family, other", [("qwen2", "mistral"), ("qwen3", "qwen2")])
def test_another_familys_tensors_are_unexpected(tmp_path, family, other):
    written(tmp_path / "m", family)
    path = tmp_path / "m" / "config.json"
    path.write_text(path.read_text().replace(f'"{family}"', f'"{other}"'))
    with pytest.raises(ValueError, match="does not fit its config.json: .*(bias|q_norm.weight)"):
        load(tmp_path / "m", tokens=TOKENS)
