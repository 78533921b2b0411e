"""What a model's path means, and the remedy where it is something else."""

import pytest
from training_run import flags, write_run

from fastvid import chat, export, train
from fastvid.checkpoints.find import checkpoint_folder, projector_path
from fastvid.data.tokenizer import load_tokenizer
from fastvid.data.video_tokens import read_settings
from fastvid.files import model_folder
from fastvid.weights.model_config import read_model_config
from fastvid.weights.model_folder import ModelFolder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run's inputs; adapter/ and full/, what training left."""
    folder = write_run(tmp_path_factory.mktemp("folders"))
    assert train.main(flags(folder, folder / "adapter", "--max_steps", "1")) == 0
    assert train.main(flags(folder, folder / "full", "--max_steps", "1", "--tune_mm_mlp_adapter", "False")) == 0
    return folder


def cached(tmp_path, model, *names):
    folder = tmp_path / "models--a--b"
    for name in names:
        (folder / "snapshots" / name).mkdir(parents=True)
        for file in model.iterdir():
            (folder / "snapshots" / name / file.name).symlink_to(file)
    return folder


@pytest.mark.slow
def test_a_folder_of_the_hubs_cache_is_its_snapshot(made, tmp_path):
    folder = cached(tmp_path, made / "model", "x")
    assert model_folder(folder) == model_folder(folder / "snapshots") == folder / "snapshots" / "x"
    for read in (load_tokenizer(folder, True).folder, ModelFolder(folder).folder):
        assert read == folder / "snapshots" / "x"
    assert read_settings(folder) == read_settings(made / "model") != {}
    assert read_model_config(folder).decoder == read_model_config(made / "model").decoder
    assert train.main(flags(made, tmp_path / "out", "--max_steps", "1", "--model_name_or_path", str(folder))) == 0


@pytest.mark.slow
def test_of_several_snapshots_one_must_be_given(made, tmp_path):
    folder = cached(tmp_path, made / "model", "x", "y")
    with pytest.raises(ValueError, match="holds 2 snapshots .*: give one of them, such as .*snapshots/x"):
        model_folder(folder)
    (tmp_path / "models--c--d" / "snapshots").mkdir(parents=True)
    with pytest.raises(ValueError, match="is empty: download"):
        model_folder(tmp_path / "models--c--d")


def ask(model, made, *more):
    return chat.main(
        [
            "--model_name_or_path",
            str(model),
            "--video",
            str(made / "feats" / "clip1.safetensors"),
            "--question",
            "what",
            "--max_new_tokens",
            "2",
            *map(str, more),
        ]
    )


@pytest.mark.slow
def test_an_output_dir_is_told_what_to_give_instead(made):
    with pytest.raises(ValueError, match=r"full is an --output_dir; its model is (\S+full/model): give that"):
        ask(made / "full", made)
    assert ask(made / "full" / "model", made) == 0
    with pytest.raises(ValueError, match=r"adapter training.*: give \S+/model, and \S+adapter as --projector"):
        ask(made / "adapter", made)
    assert ask(made / "model", made, "--projector", made / "adapter") == 0


@pytest.mark.slow
def test_a_checkpoint_is_to_be_exported(made, tmp_path):
    folder = made / "full" / "checkpoint-1"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(folder)
    for path, what in ((folder, "a checkpoint"), (tmp_path / "run", "an --output_dir of checkpoints")):
        with pytest.raises(
            ValueError,
            match=rf"is {what}, not a whole model; export it \(fastvid export --checkpoint "
            rf"{path} --format llama --output FOLDER\)",
        ):
            ask(path, made)
        assert export.main(["--checkpoint", str(path), "--format", "llama", "--output", str(tmp_path / "x")]) == 0
        assert ask(tmp_path / "x", made) == 0


def test_addresses_are_told(made):
    for read in (model_folder, ModelFolder, read_model_config, lambda path: load_tokenizer(path, None)):
        with pytest.raises(ValueError, match="https://huggingface.co/a/b is a URL"):
            read("https://huggingface.co/a/b")
    with pytest.raises(ValueError, match="--projector https://x/p.bin is a URL"):
        ask(made / "model", made, "--projector", "https://x/p.bin")


@pytest.mark.slow
def test_a_projector_is_found_in_what_training_left(made, tmp_path):
    adapter = made / "adapter"
    assert projector_path(adapter, "--projector") == adapter / "mm_projector.bin"
    assert projector_path(adapter / "checkpoint-1", "--projector") == adapter / "checkpoint-1"
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(adapter / "checkpoint-1")
    assert projector_path(tmp_path / "run", "--projector") == tmp_path / "run" / "checkpoint-1"
    argv = flags(made, tmp_path / "out", "--max_steps", "1", "--pretrain_mm_mlp_adapter")
    with pytest.raises(ValueError, match="--pretrain_mm_mlp_adapter .*model: neither a projector file"):
        train.main([*argv, str(made / "model")])
    assert train.main([*argv, str(adapter)]) == 0


def test_a_projector_file_is_no_checkpoint(made, tmp_path):
    with pytest.raises(ValueError, match=r"mm_projector.bin: neither a checkpoint-N folder.*--pretrain_mm_mlp_adapter"):
        export.main(["--checkpoint", str(made / "adapter" / "mm_projector.bin"), "--output", str(tmp_path / "x.bin")])


@pytest.mark.slow
def test_the_model_that_training_started_from_may_be_elsewhere(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    assert train.main(flags(made, tmp_path / "run", "--max_steps", "1", "--model_name_or_path", "model")) == 0
    monkeypatch.chdir(tmp_path)
    argv = ["--checkpoint", str(tmp_path / "run"), "--output", str(tmp_path / "p.bin")]
    with pytest.raises(ValueError, match="started from model .a path .* run in., which is not here: .*--model_name"):
        export.main(argv)
    assert export.main([*argv, "--model_name_or_path", str(made / "model")]) == 0


def test_a_checkpoints_address_is_told():
    with pytest.raises(ValueError, match="--checkpoint https://a.b/c is a URL: download"):
        checkpoint_folder("https://a.b/c")


def test_of_several_snapshots_the_hubs_main_is_taken(made, tmp_path):
    folder = cached(tmp_path, made / "model", "x", "y")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("y\n")
    assert model_folder(folder) == folder / "snapshots" / "y"
    (folder / "refs" / "main").write_text("../../elsewhere")
    with pytest.raises(ValueError, match="holds 2 snapshots"):
        model_folder(folder)


def test_what_is_no_model_folder_is_named(tmp_path):
    file = tmp_path / "m.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="m.gguf is a file, where a model's folder is wanted"):
        model_folder(file)
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a LoRA adapter: give the model .*, and .* as --adapter"):
        model_folder(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert model_folder(tmp_path) == tmp_path
