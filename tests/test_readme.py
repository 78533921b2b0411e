"""README's Python runs as it stands there, on small things of the names that it uses."""

import json

import pytest
from clips import draw
from conftest import ROOT
from safetensors.torch import load_file
from towers import write_narrow_tower
from training_run import CHANNELS, write_run

SNIPPETS = [part.split("```")[0] for part in (ROOT / "README.md").read_text().split("```python\n")[1:]]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The folder that the snippets run in: llava, clip, videos, train.json, clip.mp4."""
    write_run(tmp_path)
    (tmp_path / "model").rename(tmp_path / "llava")
    write_narrow_tower(tmp_path / "clip", 0, CHANNELS)
    (tmp_path / "videos").mkdir()
    records = json.loads((tmp_path / "train.json").read_text())[:4]
    records = [{**record, "video": f"{number}.mp4"} for number, record in enumerate(records)]
    (tmp_path / "train.json").write_text(json.dumps(records))
    for i in range(4):
        draw(tmp_path / "videos" / f"{i}.mp4", 5)
    draw(tmp_path / "clip.mp4", 5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_what_is_trained_is_what_is_asked(here, capsys):
    names = {}
    exec(SNIPPETS[0], names)
    printed = capsys.readouterr().out
    trained = load_file(here / "out" / "mm_projector.safetensors")["model.mm_projector.0.weight"]
    before = load_file(here / "llava" / "model.safetensors")["model.mm_projector.0.weight"]
    assert (trained != before).any()
    chat = names["fastvid"].Chat(model_name_or_path="llava", projector="out")
    assert (chat.model.projector[0].weight.detach() == trained).all()
    assert printed.endswith(chat.ask("clip.mp4", "What happens?") + "\n")
    chat.close()


@pytest.mark.slow
def test_a_loop_of_ones_own(here, capsys):
    names = {}
    exec(SNIPPETS[0].split("print(")[0].replace("**settings", "**settings, max_steps=1"), names)
    capsys.readouterr()
    exec(SNIPPETS[1], names)
    losses = [float(line.split("(")[1].split(",")[0].rstrip(")")) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 2 and all(0 < loss < 20 for loss in losses)
