"""A small model, features of videos, and benchmarks about them."""

import json

import torch
from training_run import CHANNELS, ROWS, write_run

from fastvid.features.file import save_features


def write_evaluation(folder):
    """Write model/, feats/ and two benchmarks: vcg/ with seven samples about four videos, of which one is missing, and
    mc.json with six."""
    write_run(folder, max_position_embeddings=400)
    for name in ("sub/star_1_5", "a/same", "b/same"):
        path = folder / "feats" / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        generator = torch.Generator().manual_seed(len(name))
        save_features(path, torch.randn(ROWS, CHANNELS, generator=generator).half(), {})
    vcg = folder / "vcg"
    vcg.mkdir()
    generic = [
        {"video_name": f"clip{clip}", "Q": text, "A": "a cat"}
        for clip, text in ((0, "what does the cat see?"), (1, "why?"), (0, "red house"), (99, "today?"), (2, "so fast"))
    ]
    (vcg / "generic_qa.json").write_text(json.dumps(generic))
    paired = [{"video_name": f"clip{clip}", "Q1": "what?", "Q2": "see why?", "A": "a house"} for clip in (1, 2)]
    (vcg / "consistency_qa.json").write_text(json.dumps(paired))
    options = ["a cat", "red house near a cat", "why"]
    choices = [
        {"video": f"clip{i}.mp4", "question": "what is it?", "candidates": options, "answer": options[i % 3]}
        for i in range(4)
    ]
    choices += [
        {"video": "star.mp4", "question": "when?", "candidates": options, "answer": "why", "start": 1, "end": 5.0},
        {"video": "same.mp4", "question": "which?", "candidates": options, "answer": "why"},
    ]
    (folder / "mc.json").write_text(json.dumps(choices))
    return folder


def settings(run, output, task="vcg"):
    """Flags of `fastvid evaluate` by name, for the first stage."""
    return {
        "output": str(output),
        "task": task,
        "annotations": str(run / ("mc.json" if task == "mc" else task)),
        "video": str(run / "feats"),
        "model_name_or_path": str(run / "model"),
        "max_new_tokens": 9,
        "device": "cpu",
        "at_once": 3,
        "kv_cache_gib": 0.01,
    }


def flags(settings):
    """The same as a command line."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]
