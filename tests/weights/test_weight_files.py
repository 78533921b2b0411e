"""Weight files: what cannot be read, what would run code, and what would lead out of a folder."""

import json
import zipfile

import pytest
import torch
from weight_folders import CONFIG, RunsCode, assert_same, llava_state, load, write_folder


def test_files_that_cannot_be_read_are_named(tmp_path):
    state = llava_state()
    with pytest.raises(ValueError, match="holds no weights: expected one of model.safetensors.index.json"):
        empty = tmp_path / "empty"
        empty.mkdir()
        (empty / "config.json").write_text(json.dumps(CONFIG))
        load(empty)
    for name, reason in (
        ("m-q4.gguf", "m-q4.gguf is of llama.cpp"),
        ("consolidated.00.pth", "of Meta's release"),
        ("model.safetensors.incomplete", "its download has not ended"),
        ("model-00001-of-00002.safetensors", "model.safetensors.index.json lists them"),
    ):
        (empty / name).write_bytes(b"x")
        with pytest.raises(ValueError, match=f"holds no weights: .*{reason}"):
            load(empty)
        (empty / name).unlink()
    (empty / "model.safetensors").symlink_to(tmp_path / "blob")
    with pytest.raises(ValueError, match="model.safetensors is a link that leads nowhere"):
        load(empty)
    folder = write_folder(tmp_path / "gone", state, files=3)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00003.safetensors does not exist"):
        load(folder)
    for ending in ("bin", "safetensors"):
        folder = write_folder(tmp_path / f"torn-{ending}", state, ending=ending)
        file = next(folder.glob(f"*.{ending}"))
        file.write_bytes(file.read_bytes()[:-1000])
        with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
            load(folder)
    for name, ending, files in (
        ("model.safetensors", "safetensors", 1),
        ("pytorch_model.bin", "bin", 1),
        ("pytorch_model.bin.index.json", "bin", 2),
        ("config.json", "bin", 1),
        ("pytorch_model-00002-of-00002.bin", "bin", 2),
    ):
        folder = write_folder(tmp_path / f"pointer-{name}", state, ending=ending, files=files)
        (folder / name).write_text("version https://git-lfs.github.com/spec/v1\n")
        with pytest.raises(ValueError, match=f"{name} is a git-lfs pointer"):
            load(folder)
    folder = write_folder(tmp_path / "lacks", state, files=2)
    index = folder / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model.norm.weight", "model.layers.0.mlp.gate_proj.weight_"))
    with pytest.raises(ValueError, match="norm.weight is missing"):
        load(folder)
    index.write_text("[]")
    with pytest.raises(ValueError, match="is not an index of weights"):
        load(folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = write_folder(tmp_path / "m", llava_state(), files=2)
    index = folder / "model.safetensors.index.json"
    for name in ("../model-00001-of-00002.safetensors", str(folder / "model-00001-of-00002.safetensors")):
        values = json.loads(index.read_text())
        values["weight_map"]["model.norm.weight"] = name
        index.write_text(json.dumps(values))
        with pytest.raises(ValueError, match="names files outside its folder"):
            load(folder)


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_pickle_that_runs_code_is_refused(tmp_path, as_zip):
    folder = write_folder(tmp_path / "m", llava_state(), ending="bin")
    trace, file = tmp_path / "executed", folder / "pytorch_model.bin"
    torch.save({"model.norm.weight": RunsCode(trace)}, file, _use_new_zipfile_serialization=as_zip)
    assert zipfile.is_zipfile(file) == as_zip
    with pytest.raises(ValueError, match="pytorch_model.bin .*could run code: it was not loaded"):
        load(folder)
    assert not trace.exists()


@pytest.mark.slow
def test_files_of_torch_before_zip(tmp_path):
    state = llava_state()
    folder = write_folder(tmp_path / "m", state, ending="bin")
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_same(load(folder), state)
    torch.save([1, 2], folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="does not hold tensors by name"):
        load(folder)
