"""The quickstart's pieces: clips whose content is known, tokens turned around, and a verdict that can be bad."""

import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
import torch
from conftest import ROOT

from fastvid.config.policy import POLICIES
from fastvid.data.conversation import settled_version
from fastvid.data.tokenizer import load_tokenizer
from fastvid.weights.model_config import read_model_config


@pytest.fixture
def pieces(monkeypatch):
    """The modules of scripts/quickstart, by import."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "quickstart"))
    import draw_clips
    import evaluate
    import report

    yield draw_clips, evaluate, report
    for name in ("draw_clips", "evaluate", "report"):
        sys.modules.pop(name)


def nearest_colour(clips, patch):
    mean = patch.reshape(-1, 3).mean(0)
    return min(clips.COLOURS, key=lambda name: np.abs(mean - clips.COLOURS[name]).sum())


def test_held_out_pairs_are_new_in_both_orders(pieces):
    clips = pieces[0]
    held_out, train = ({frozenset(pair) for pair in pairs} for pairs in (clips.HELD_OUT_PAIRS, clips.TRAIN_PAIRS))
    assert held_out and not held_out & train
    assert {name for pair in train for name in pair} == set(clips.COLOURS), "every colour is learned"
    assert len(clips.HELD_OUT_PAIRS) == 2 * len(held_out), "neither order is the more frequent answer"


@pytest.mark.slow
def test_clips_show_what_they_are_named(pieces, tmp_path):
    clips = pieces[0]
    for seed in range(10):
        rng = np.random.default_rng(seed)
        for family in clips.QUESTIONS:
            clips.write_video(tmp_path / "clip.mp4", clips.draw(family, ("red", "cyan"), rng))
            with av.open(str(tmp_path / "clip.mp4")) as container:
                frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
            assert frames.shape == (clips.FRAMES, clips.SIZE, clips.SIZE, 3)
            if family == "first":
                shown = [nearest_colour(clips, frames[t, 24:40, 24:40]) for t in (0, -1)]
            else:  # one of the two middle rows of patches is covered
                band = max(frames[:, 20:28], frames[:, 36:44], key=lambda rows: np.ptp(rows.mean((0, 1, 3))))
                shown = [nearest_colour(clips, side) for side in (band[:, :, 4:28], band[:, :, 36:60])]
            assert shown == ["red", "cyan"]


@pytest.mark.slow
@pytest.mark.parametrize("family, kind", [("llama", "Llama"), ("llama3", "Llama"), ("qwen3", "Qwen3")])
def test_models_of_each_family_are_read_as_such(pieces, tmp_path, monkeypatch, family, kind):
    records = [{"q": "Which colour comes first?", "a": "red", "video_id": "0"}] * 40
    (tmp_path / "videoinstruct.json").write_text(json.dumps(records))
    import build_models

    try:
        build_models.main([str(tmp_path), "--family", family])
    finally:
        sys.modules.pop("build_models")
    folder = tmp_path / "llava_base"
    tokenizer = load_tokenizer(folder, True)
    config = read_model_config(folder, vocab_size=tokenizer.tokens.vocab_size)
    assert settled_version("auto", tokenizer, POLICIES["none"]) == ("v1" if family == "llama" else "chat_template")
    assert config.decoder.num_kv_heads == (4 if family == "llama" else 2)
    assert config.decoder.tie_word_embeddings == (family == "qwen3")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [f"{kind}ForCausalLM"]
    if family == "llama":
        return
    text, [(start, end)] = tokenizer.template.conversation(["Which colour comes first?", "red"])
    assert text[start:end] == "red" + tokenizer.template.turn_end


def test_an_unknown_family_costs_nothing(tmp_path):
    (tmp_path / "mine").write_text("kept")
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/quickstart.sh")],
        env={**os.environ, "FAMILY": "llama-3", "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and "unknown FAMILY llama-3; choose llama, llama3 or qwen3" in done.stderr
    assert (tmp_path / "mine").read_text() == "kept"


def test_turned_tokens(pieces):
    clips, evaluate, _ = pieces
    grid = evaluate.GRID
    features = torch.arange(clips.FRAMES + grid * grid)[:, None].float()
    backwards, mirrored = evaluate.reverse_time(features), evaluate.mirror(features)
    assert backwards[: clips.FRAMES, 0].tolist() == list(reversed(range(clips.FRAMES)))
    assert torch.equal(backwards[clips.FRAMES :], features[clips.FRAMES :])
    assert torch.equal(mirrored[: clips.FRAMES], features[: clips.FRAMES])
    assert mirrored[clips.FRAMES : clips.FRAMES + grid, 0].tolist() == [19, 18, 17, 16]
    assert mirrored[-grid:, 0].tolist() == [31, 30, 29, 28]


@pytest.mark.parametrize(
    "name, figures, code",
    [
        ("after stage 1", (0.9, 0.1, 0.9, 0.1), 0),
        ("after stage 2", (0.89, 0, 1, 0), 1),
        ("after stage 2", (1, 0, 0.89, 0), 1),
        ("after stage 2", (1, 0.11, 1, 0), 1),
        ("after stage 2", (1, 0, 1, 0.11), 1),
        ("other tower, before stage 2", (0, 1, 0, 1), 0),
    ],
)
def test_verdict(pieces, tmp_path, monkeypatch, capsys, name, figures, code):
    first, left = ({"right": right, "turned": turned} for right, turned in (figures[:2], figures[2:]))
    (tmp_path / "results.jsonl").write_text(json.dumps({"name": name, "first": first, "left": left}) + "\n")
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert pieces[2].main() == code
    assert str(tmp_path / "stage2" / "loss_curve.png") in capsys.readouterr().out
