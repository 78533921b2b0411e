"""The benchmark of generation: its model is what chat's is."""

import dataclasses
import sys

import pytest
import torch
from conftest import ROOT

from fastvid.model.attention import SDPA


@pytest.fixture
def generation(monkeypatch):
    """bench/generation.py, which is run from its folder; modules of tests have names of that folder's."""
    monkeypatch.syspath_prepend(ROOT / "bench")
    names = "generation", "harness", "train_presets"
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    import generation

    for name in names:
        del sys.modules[name]
    return generation


def test_attention_is_settled_as_for_chat(generation, monkeypatch):
    asked, settled = [], dataclasses.replace(SDPA, name="best of this machine")

    def settle(*given, **options):
        asked.append((*given, options))
        return settled

    monkeypatch.setattr(generation, "settle_attention", settle)
    model = generation.build(generation.MODELS["tiny"], torch.bfloat16, "cpu")
    assert {layer.attention for layer in model.decoder.layers} == {settled}
    assert asked == [("auto", torch.device("cpu"), torch.bfloat16, 2, 2, 32, {"gradients": False})]
