"""The embed command: rows as the model reads them, files that tell what they are, and what a second run does."""

import json
import os

import pytest
import torch
from chat_models import CHANNELS, HIDDEN, model_maker, projector_state
from clips import draw
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fastvid.embed import main
from fastvid.features.file import save_features
from fastvid.inference.chat import Chat

ROWS = 7


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return model_maker(tmp_path_factory.mktemp("models"))("model")


@pytest.fixture
def folder(tmp_path):
    """Features, and videos in a sub-folder: a.safetensors, a.mp4 (not taken), in/clip.mp4."""
    folder = tmp_path / "videos"
    (folder / "in").mkdir(parents=True)
    features = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(3)).half()
    save_features(folder / "a.safetensors", features, {"tower": "of a", "num_frames": 3})
    draw(folder / "a.mp4", 4)
    draw(folder / "in" / "clip.mp4", 9)
    return folder


def flags(model, video, output, *more):
    known = ["--model_name_or_path", model, "--video", video, "--output", output, "--device", "cpu"]
    return [*map(str, known), "--num_frames", "3", *map(str, more)]


def header_of(path):
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["header"])


@pytest.mark.slow
def test_rows_are_those_that_the_model_reads(model, folder, tmp_path, capsys):
    output = tmp_path / "rows"
    assert main(flags(model, folder, output)) == 0
    assert "2 made, 0 there already, 0 failed of 2" in capsys.readouterr().out
    files = {path.relative_to(output).as_posix(): path for path in output.rglob("*") if path.is_file()}
    assert sorted(files) == ["a.safetensors", "in/clip.safetensors"]
    chat = Chat(model_name_or_path=str(model), device="cpu", num_frames=3)
    for name, video in (("a.safetensors", "a.safetensors"), ("in/clip.safetensors", "in/clip.mp4")):
        rows = load_file(files[name])
        assert list(rows) == ["embeddings"]
        assert rows["embeddings"].dtype == torch.float32
        with torch.no_grad():
            wanted = chat.model.projector(chat.features(folder / video).float())
        assert rows["embeddings"].shape == (ROWS, HIDDEN)
        assert torch.equal(rows["embeddings"], wanted)
        assert torch.equal(chat.embeddings(folder / video), wanted)
    chat.close()
    told = header_of(files["a.safetensors"])
    assert told["source"] == "a.safetensors" and told["features"]["tower"] == "of a"
    assert told["projector"].startswith("sha256:") and told["num_frames"] == 3 and told["dtype"] == "float32"
    assert header_of(files["in/clip.safetensors"])["tower_revision"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(told), "folders of this machine are nobody's business"


@pytest.mark.slow
def test_a_second_run_makes_what_is_missing_or_has_changed(model, folder, tmp_path, capsys):
    output = tmp_path / "rows"
    assert main(flags(model, folder, output)) == 0
    before = (output / "in" / "clip.safetensors").stat()
    (output / "a.safetensors").unlink()
    assert main(flags(model, folder, output)) == 0
    assert "1 made, 1 there already" in capsys.readouterr().out
    assert (output / "in" / "clip.safetensors").stat().st_mtime_ns == before.st_mtime_ns
    os.utime(folder / "in" / "clip.mp4", ns=(1, 1))
    assert main(flags(model, folder, output)) == 0
    assert "1 made, 1 there already" in capsys.readouterr().out


@pytest.mark.slow
def test_other_settings_are_told_before_anything_is_written(model, folder, tmp_path):
    output = tmp_path / "rows"
    with pytest.raises(ValueError, match="rows.npy is to be a folder, which gets a .safetensors file for each video"):
        main(flags(model, folder / "in", tmp_path / "rows.npy"))
    assert main(flags(model, folder / "in", output)) == 0
    other = save_file(projector_state(scale=2.0), tmp_path / "other.safetensors") or tmp_path / "other.safetensors"
    draw(folder / "in" / "aa.mp4", 5)
    changed = flags(model, folder / "in", output, "--projector", other)
    with pytest.raises(ValueError, match="clip.safetensors was made with another projector; --overwrite True"):
        main(changed)
    assert not (output / "aa.safetensors").exists()
    assert main([*changed, "--overwrite", "True"]) == 0
    assert (output / "aa.safetensors").exists()
    assert main(changed) == 0
    with pytest.raises(ValueError, match="made with another projector and dtype"):
        main(flags(model, folder / "in", output, "--bf16", "True"))
    with pytest.raises(ValueError, match="made with another projector and pooling"):
        main(flags(model, folder / "in", output, "--pooling", "grid:1x2x2"))


def test_what_is_of_others_is_kept(model, folder, tmp_path):
    with pytest.raises(ValueError, match="a.safetensors is what is to be embedded; choose another --output folder"):
        main(flags(model, folder, folder))
    output = tmp_path / "rows"
    output.mkdir()
    for content in (b"somebody's", (folder / "a.safetensors").read_bytes()):
        (output / "a.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match="is no whole file of embeddings; remove it"):
            main(flags(model, folder, output, "--overwrite", "True"))
        assert (output / "a.safetensors").read_bytes() == content
    (output / "a.safetensors").unlink()
    assert main(flags(model, folder, output)) == 0


@pytest.mark.slow
def test_a_list_and_a_bad_video(model, folder, tmp_path, capsys):
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "some.txt").write_text("in/clip.mp4\nbad.mp4\n")
    output = tmp_path / "rows"
    assert main(flags(model, folder / "some.txt", output)) == 1
    told = capsys.readouterr()
    assert "1 made, 0 there already, 1 failed of 2" in told.out
    assert told.err.count("bad.mp4") == 1
    assert main(flags(model, folder / "some.txt", output, "--max_failures", "0.5")) == 0
    elsewhere = draw(tmp_path / "elsewhere.mp4", 4)
    (folder / "some.txt").write_text(f"{elsewhere}\n")
    with pytest.raises(ValueError, match="--video .*line 1 leads out of the list's folder.*--follow_links True"):
        main(flags(model, folder / "some.txt", output))
    assert main(flags(model, folder / "some.txt", output, "--follow_links", "True")) == 0
    (folder / "some.txt").write_text("\n")
    with pytest.raises(ValueError, match="some.txt names no file; write a path on each line"):
        main(flags(model, folder / "some.txt", output))
    with pytest.raises(ValueError, match="nowhere does not exist; give a video"):
        main(flags(model, tmp_path / "nowhere", output))


def test_links_that_lead_elsewhere_are_followed_if_told(model, tmp_path, capsys):
    inner, elsewhere = tmp_path / "videos", tmp_path / "elsewhere.safetensors"
    inner.mkdir()
    features = torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(3)).half()
    save_features(elsewhere, features, {})
    (inner / "link.safetensors").symlink_to(elsewhere)
    (inner / "some.txt").write_text("link.safetensors\n")
    output = tmp_path / "rows"
    for given in (inner, inner / "some.txt"):
        with pytest.raises(ValueError, match="names links alone, which --follow_links True follows"):
            main(flags(model, given, output))
    save_features(inner / "own.safetensors", features, {})
    for told, left, made in (((), 1, 1), (("--follow_links", "True"), 0, 2)):
        assert main(flags(model, inner, output, *told)) == 0
        assert ("1 links were left out; --follow_links True follows them" in capsys.readouterr().out) == bool(left)
        assert len(list(output.iterdir())) == made


def test_a_signal_ends_it_between_two_videos(model, folder, tmp_path, capsys, monkeypatch):
    import signal

    from fastvid.inference import embed

    made = embed.Embedder.make

    def make(self, medium):
        os.kill(os.getpid(), signal.SIGTERM)
        return made(self, medium)

    with monkeypatch.context() as patch:
        patch.setattr(embed.Embedder, "make", make)
        assert main(flags(model, folder, tmp_path / "rows")) == 128 + signal.SIGTERM
    told = capsys.readouterr()
    assert "1 made, 0 there already, 0 failed of 2" in told.out and "run it again to go on" in told.err
    assert main(flags(model, folder, tmp_path / "rows")) == 0
    assert "1 made, 1 there already" in capsys.readouterr().out
