"""A run is known by what its files hold, wherever they lie."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_run import flags, losses, write_run

from fastvid import train
from fastvid.checkpoints import checkpoint
from fastvid.config import TrainConfig
from fastvid.features.file import load_features, save_features
from fastvid.training import content


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """(a run's inputs, its output after four of six steps): started from a projector file."""
    run = write_run(tmp_path_factory.mktemp("run"))
    folder = tmp_path_factory.mktemp("out")
    assert train.main(flags(run, folder / "first", "--max_steps", "1")) == 0
    shutil.copy(folder / "first" / "mm_projector.bin", run / "start.bin")
    assert (
        train.main(flags(run, folder / "out", "--max_steps", "4", "--pretrain_mm_mlp_adapter", str(run / "start.bin")))
        == 0
    )
    return run, folder / "out"


@pytest.fixture
def moved(stopped, tmp_path):
    """(the inputs at another place, the output)."""
    shutil.copytree(stopped[0], tmp_path / "elsewhere")
    shutil.copytree(stopped[1], tmp_path / "out")
    return tmp_path / "elsewhere", tmp_path / "out"


def go_on(run, output, *more):
    return train.main(
        flags(run, output, "--max_steps", "6", "--pretrain_mm_mlp_adapter", str(run / "start.bin"), *more)
    )


@pytest.mark.slow
def test_the_same_content_elsewhere_goes_on(moved, monkeypatch):
    run, output = moved
    (run / "train.json").rename(run / "renamed.json")
    monkeypatch.chdir(run)
    argv = flags(
        run,
        output,
        "--max_steps",
        "6",
        "--video_folder",
        "feats/",
        "--model_name_or_path",
        "./model",
        "--pretrain_mm_mlp_adapter",
        "start.bin",
    )
    argv[argv.index("--data_path") + 1] = "renamed.json"
    assert train.main(argv) == 0
    assert sorted(losses(output)) == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_weights_in_other_files_are_the_same(moved):
    run, output = moved
    tensors = load_file(run / "model" / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, run / "model" / f"model-{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    (run / "model" / "model.safetensors").unlink()
    (run / "model" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert go_on(run, output) == 0


def change_texts(run):
    records = json.loads((run / "train.json").read_text())
    records[3]["conversations"][1]["value"] += " yes"
    (run / "train.json").write_text(json.dumps(records))


def change_features(run):
    for path in (run / "feats").iterdir():
        features, header = load_features(path)
        save_features(path, features * 2, header)


def change_weights(run):
    path = next((run / "model").glob("*.safetensors"))
    tensors = load_file(path)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, path, {"format": "pt"})


def change_config(run):
    path = run / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.5}))


def change_projector(run):
    tensors = torch.load(run / "start.bin")
    torch.save({name: tensor + 1 for name, tensor in tensors.items()}, run / "start.bin")


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, named",
    [
        (change_texts, "the content of --data_path .*train.json"),
        (change_features, "features of clip0.* --video_folder"),
        (change_weights, "the weights in --model_name_or_path"),
        (change_config, r"rms_norm_eps of --model_name_or_path .* \(1e-0\d before, 0.5 now\)"),
        (change_projector, "the content of --pretrain_mm_mlp_adapter"),
    ],
)
def test_other_content_at_the_same_place_is_refused(moved, change, named):
    run, output = moved
    change(run)
    with pytest.raises(
        ValueError, match=f"checkpoint-4 belongs to another run: [^;]*{named}[^;]* is not the same.*--resume never"
    ):
        go_on(run, output)
    assert go_on(run, output, "--resume", "never") == 0


@pytest.mark.slow
@pytest.mark.parametrize("change", [change_texts, change_features, change_weights, change_projector])
def test_a_finished_run_on_other_files_is_moved_aside(moved, change, caplog):
    """Nothing of it goes on, and nothing of it is lost."""
    run, output = moved
    assert go_on(run, output) == 0
    ended = {path.name: path.read_bytes() for path in output.glob("mm_projector.*")}
    change(run)
    assert go_on(run, output) == 0
    assert "is the end of a finished run on other files" in caplog.text and "is not the same" in caplog.text
    assert {path.name: path.read_bytes() for path in (output / "previous-1").glob("mm_projector.*")} == ended
    assert (output / "previous-1" / "checkpoint-6").is_dir() and (output / "checkpoint-6").is_dir()
    assert (output / "mm_projector.bin").read_bytes() != ended["mm_projector.bin"]


@pytest.mark.slow
def test_a_checkpoint_without_notes_of_content_is_taken(moved, monkeypatch, caplog):
    run, output = moved
    read = checkpoint.read_state

    def older(folder):
        state = read(folder)
        del state["content"], state["run"]
        return state

    monkeypatch.setattr(checkpoint, "read_state", older)
    assert go_on(run, output) == 0
    assert "whether --model_name_or_path, --data_path" in caplog.text.replace(
        "--data_path, --video_folder, --model_name_or_path", "--model_name_or_path, --data_path"
    )


@pytest.mark.slow
def test_the_run_keeps_its_name(moved):
    run, output = moved
    before = checkpoint.read_state(output / "checkpoint-4")["run"]
    assert go_on(run, output, "--save_steps", "6") == 0
    assert len(before) == 32 and checkpoint.read_state(output / "checkpoint-6")["run"] == before


def test_a_pipe_is_not_read_again_and_not_compared(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "a.json").write_text("[]")
    of_pipe, of_file = content._of_file(tmp_path / "pipe"), content._of_file(tmp_path / "a.json")
    config = TrainConfig("model", ["a.json"], output_dir="out")
    rest = {"features": [], "weights": "0", "tokenizer": "0", "projector": None, "model": {}}
    assert of_pipe is None and of_file
    for was, now in ((of_pipe, of_file), (of_file, of_pipe)):
        assert content.changes({"data": [was], **rest}, {"data": [now], **rest}, config) == []
    assert len(content.changes({"data": ["0"], **rest}, {"data": [of_file], **rest}, config)) == 1


@pytest.mark.parametrize("at", [0, 700_000, 1_499_999])
def test_large_tensors_are_sampled_to_their_ends(at):
    large = torch.zeros(1_500_000)
    before = content._of_tensors({"a": large})
    large[at : at + 100_000] += 1
    assert content._of_tensors({"a": large}) != before
    assert content._of_tensors({"b": torch.zeros(1_500_000)}) != before
