"""fastvid export: the reference's projector file, LLaVA-1.5's layout, llava-hf's layout; what is refused."""

import dataclasses
import json
import resource
import sys
from dataclasses import asdict, replace

import exported_run
import pytest
import torch
from checkpoint_cases import flip_a_bit
from exported_run import ADAPTER, ALL, assert_equal_models, logits
from forks import FORKS
from safetensors.torch import load_file
from towers import write_siglip
from weight_folders import C, D, load

from fastvid.checkpoints import checkpoint
from fastvid.config import ExportConfig
from fastvid.config.policy import Trainable
from fastvid.data.tokenizer import load_tokenizer
from fastvid.export import main
from fastvid.weights import export
from fastvid.weights.model_config import read_model_config

run, tokenizer_model = exported_run.run, exported_run.tokenizer_model


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [ADAPTER, Trainable(embed=True, head=True), ALL])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_format(tmp_path, run, trainable, tied):
    from transformers import AutoModelForCausalLM, LlamaForCausalLM

    folder, model, tokenizer = run(dataclasses.replace(trainable, head=trainable.head and not tied), tied=tied)
    output = tmp_path / "exported"
    paths = export.export(ExportConfig(str(folder), str(output), "llama"))
    assert paths == sorted(output.iterdir()) and (output / "model.safetensors").is_file()

    again = load_tokenizer(output, None)
    assert again.tokens.added == () and again.tokens.end == tokenizer.tokens.end
    fresh = load(output, tokens=again.tokens, trainable=Trainable())
    assert_equal_models(model, fresh)
    assert read_model_config(output).vision_tower == str(tmp_path / "tower")

    hf, report = LlamaForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"] and not report["error_msgs"]
    assert all("mm_projector" in key for key in report["unexpected_keys"])
    ids = [*again.encode("what is a red cat?"), again.tokens.patch]
    torch.testing.assert_close(logits(fresh, ids), hf(torch.tensor([ids])).logits[0], rtol=1e-5, atol=1e-5)
    assert isinstance(AutoModelForCausalLM.from_pretrained(output), LlamaForCausalLM)


@pytest.mark.slow
@pytest.mark.parametrize("trainable", [ADAPTER, ALL])
def test_llava_format(tmp_path, run, trainable):
    from PIL import Image
    from transformers import (
        AutoProcessor,
        AutoTokenizer,
        CLIPVisionModel,
        LlamaTokenizer,
        LlavaForConditionalGeneration,
    )

    folder, model, tokenizer = run(trainable)
    output = tmp_path / "exported"
    export.export(ExportConfig(str(folder), str(output), "llava"))
    hf, report = LlavaForConditionalGeneration.from_pretrained(output, output_loading_info=True)
    assert {key: list(value) for key, value in report.items()} == {key: [] for key in report}
    fresh = load(output, tokens=load_tokenizer(output, True).tokens, trainable=Trainable())
    assert_equal_models(model, fresh)
    ids = [*tokenizer.encode("what is a red cat?"), tokenizer.tokens.start]
    torch.testing.assert_close(logits(fresh, ids), hf(input_ids=torch.tensor([ids])).logits[0], rtol=1e-5, atol=1e-5)
    features = torch.randn(4, C)
    torch.testing.assert_close(hf.model.multi_modal_projector(features), model.projector(features))
    tower = CLIPVisionModel.from_pretrained(tmp_path / "tower").state_dict()
    held = hf.model.vision_tower.state_dict()
    assert held.keys() == tower.keys() and all(torch.equal(held[name], tower[name]) for name in tower)
    assert hf.config.image_token_id == tokenizer.tokens.patch
    processor = AutoProcessor.from_pretrained(output)
    picture = Image.new("RGB", (40, 30), "red")
    inputs = processor(images=picture, text="<vid_patch> what is it?", return_tensors="pt")
    assert (inputs.input_ids == tokenizer.tokens.patch).sum() == 4 and inputs.pixel_values.shape == (1, 3, 28, 28)
    assert hf(**inputs).logits.isfinite().all()
    for text in ("what is a red cat?", "USER: <vid_start> red</s>", "a  cat.\n<vid_patch> is"):
        assert (
            AutoTokenizer.from_pretrained(output)(text).input_ids
            == LlamaTokenizer.from_pretrained(output)(text).input_ids
        )


def test_exported_twice_is_the_same(tmp_path, run):
    """An export is a starting model like any other; exporting what starts from it changes no bit."""
    folder, _model, _tokenizer = run(ADAPTER)
    export.export(ExportConfig(str(folder), str(tmp_path / "first"), "llama"))
    tokens = load_tokenizer(tmp_path / "first", True).tokens
    state = checkpoint.read_state(folder)
    state["config"]["model_name_or_path"], state["tokens"] = str(tmp_path / "first"), asdict(tokens)
    trained = {name: p for name, p in load(tmp_path / "first", tokens=tokens).named_parameters() if p.requires_grad}
    second = checkpoint.save(tmp_path / "out2", 1, groups={"model": trained}, state=state)
    export.export(ExportConfig(str(second), str(tmp_path / "second"), "llama"))
    for name in ("model.safetensors", "tokenizer.model", "tokenizer_config.json", "added_tokens.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes(), name


@pytest.mark.parametrize("ending", ["bin", "safetensors"])
def test_projector_format(tmp_path, run, ending):
    folder, model, _tokenizer = run(ADAPTER, kind="linear")
    path = tmp_path / f"mm_projector.{ending}"
    assert export.export(ExportConfig(str(folder), str(path))) == [path]
    tensors = load_file(path) if ending == "safetensors" else torch.load(path, weights_only=True)
    assert set(tensors) == {"model.embed_tokens.weight", "model.mm_projector.weight", "model.mm_projector.bias"}
    assert torch.equal(tensors["model.mm_projector.weight"], model.projector[0].weight)
    table = model.embed.weight.clone()
    table[-2:] = model.boundary.weight
    assert torch.equal(tensors["model.embed_tokens.weight"], table)


def test_output_dir_means_its_newest_valid_checkpoint(tmp_path, run):
    folder, model, _ = run(ADAPTER)
    trained = {name: p + 1 for name, p in model.named_parameters() if p.requires_grad}
    checkpoint.save(folder.parent, 10, groups={"model": trained}, state=checkpoint.read_state(folder))
    export.export(ExportConfig(str(folder.parent), str(tmp_path / "p.bin")))
    written = torch.load(tmp_path / "p.bin", weights_only=True)
    assert torch.equal(written["model.mm_projector.0.bias"], trained["projector.0.bias"])
    with pytest.raises(ValueError, match="neither a checkpoint-N folder nor an --output_dir"):
        export.export(ExportConfig(str(tmp_path / "tower"), str(tmp_path / "p.bin")))


def test_a_damaged_checkpoint_is_not_exported(tmp_path, run):
    folder, _, _ = run(Trainable(projector=True))
    flip_a_bit(next(folder.glob("model-*")))
    for named in (folder, folder.parent):
        with pytest.raises(ValueError, match="the sha256 of model-00000-of-00001.safetensors"):
            export.export(ExportConfig(checkpoint=str(named), output=str(tmp_path / "p.bin")))
    assert not (tmp_path / "p.bin").exists()


def test_pretrained_projector_and_frozen_projector(tmp_path, run):
    """Start and end rows are trained over a projector file: the export has the file's projector."""
    first, model, _ = run(ADAPTER)
    export.export(ExportConfig(str(first), str(tmp_path / "p.bin")))
    rows = {"boundary.weight": torch.randn(2, D)}
    state = checkpoint.read_state(first)
    state["config"] |= {"pretrain_mm_mlp_adapter": str(tmp_path / "p.bin"), "freeze_mm_mlp_adapter": True}
    second = checkpoint.save(tmp_path / "second", 1, groups={"model": rows}, state=state)
    export.export(ExportConfig(str(second), str(tmp_path / "exported"), "llama"))
    tensors = load_file(tmp_path / "exported" / "model.safetensors")
    assert torch.equal(tensors["model.mm_projector.2.weight"], model.projector[2].weight)
    assert torch.equal(tensors["model.embed_tokens.weight"][-2:], rows["boundary.weight"])


def test_shards_and_index(tmp_path, run, monkeypatch):
    from transformers import LlamaForCausalLM

    folder, model, _ = run(ALL)
    monkeypatch.setattr(export, "SHARD_BYTES", 20_000)
    output = tmp_path / "exported"
    export.export(ExportConfig(str(folder), str(output), "llama", dtype="bfloat16"))
    files = sorted(output.glob("*.safetensors"))
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert [path.name for path in files] == [
        f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)
    ] and len(files) > 2
    held = {name: path.name for path in files for name in load_file(path)}
    assert held == index["weight_map"]
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    assert all(tensor.dtype == torch.bfloat16 for tensor in tensors.values())
    hf, report = LlamaForCausalLM.from_pretrained(output, output_loading_info=True)
    assert not report["missing_keys"] and hf.dtype == torch.bfloat16
    q = model.decoder.layers[1].qkv.weight[:D]
    assert torch.equal(hf.model.layers[1].self_attn.q_proj.weight, q.to(torch.bfloat16))


def export_with_little_room(settings):
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    try:
        export.export(settings)
    except OSError as error:
        sys.exit(0 if f"{settings.output}" in str(error).replace("/.", "/") and "File too large" in str(error) else 2)
    sys.exit(1)


@pytest.mark.slow
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, run):
    folder, _, _ = run(ADAPTER)
    child = FORKS.Process(
        target=export_with_little_room, args=(ExportConfig(str(folder), str(tmp_path / "exported"), "llama"),)
    )
    child.start()
    child.join(60)
    assert child.exitcode == 0 and not list(tmp_path.glob("*exported*"))


def test_what_may_be_replaced(tmp_path, run, monkeypatch, caplog):
    folder, _, _ = run(ADAPTER)
    output = tmp_path / "exported"
    output.mkdir()
    config = ExportConfig(str(folder), str(output), "llama")
    export.export(config)
    (output / "notes.txt").touch()
    with pytest.raises(ValueError, match="exported also holds notes.txt, which would go"):
        export.export(config)
    (output / "notes.txt").unlink()
    (output / "model-00001-of-00002.safetensors").touch()
    export.export(config)
    assert not (output / "model-00001-of-00002.safetensors").exists(), "an export of ours is replaced whole"
    assert f"holds an earlier export (format llama, of {folder}), which is replaced" in caplog.text
    before = sorted(path.name for path in tmp_path.iterdir())

    def fails(*args):
        raise OSError("no space left")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(export, "write_json", fails)
        export.export(config)
    assert sorted(path.name for path in tmp_path.iterdir()) == before and (output / "model.safetensors").is_file()

    (output / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="exported exists and is not an export of fastvid's"):
        export.export(config)
    for source in (folder, tmp_path / "base"):
        with pytest.raises(ValueError, match="is what the export is made of"):
            export.export(ExportConfig(str(folder), str(source), "llama"))


def test_what_cannot_be_exported(tmp_path, run):
    folder, _model, _tokenizer = run(ADAPTER, kind="linear")
    with pytest.raises(ValueError, match="has an mlp2x_gelu projector, this model a linear one.*--format llama"):
        export.export(ExportConfig(str(folder), str(tmp_path / "x"), "llava"))
    assert not (tmp_path / "x").exists() and not list(tmp_path.glob(".x*"))
    assert export.export(ExportConfig(str(folder), str(tmp_path / "as told"), "llama"))
    state = checkpoint.read_state(folder)
    other = checkpoint.save(tmp_path / "o", 1, groups={"model": {"decoder.norm.weight": torch.ones(3)}}, state=state)
    with pytest.raises(ValueError, match=r"decoder.norm.weight is \[3\], which does not fit .*base"):
        export.export(ExportConfig(str(other), str(tmp_path / "x"), "llama"))
    state["tokens"]["patch"] += 1
    other = checkpoint.save(tmp_path / "o", 2, groups={"model": {"projector.0.bias": torch.ones(D)}}, state=state)
    with pytest.raises(ValueError, match="other ids for the video tokens"):
        export.export(ExportConfig(str(other), str(tmp_path / "x"), "llama"))
    del state["config"]["seed"]
    other = checkpoint.save(tmp_path / "o", 3, groups={"model": {"projector.0.bias": torch.ones(D)}}, state=state)
    with pytest.raises(ValueError, match="state.json does not say seed"):
        export.export(ExportConfig(str(other), str(tmp_path / "x")))


def test_the_tower_must_fit(tmp_path, run):
    from transformers import CLIPVisionConfig, CLIPVisionModel

    folder, _, _ = run(ADAPTER)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=C + 2,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    ).save_pretrained(tmp_path / "wide")
    with pytest.raises(ValueError, match="wide has 12 channels, the projector takes 10"):
        export.export(ExportConfig(str(folder), str(tmp_path / "x"), "llava", vision_tower=str(tmp_path / "wide")))


def test_a_tower_of_siglip_is_named_and_not_held(tmp_path, run):
    folder, _, _ = run(ADAPTER)
    write_siglip(tmp_path / "siglip", hidden_size=12, layers=2)
    made = ExportConfig(str(folder), str(tmp_path / "x"), "llava", vision_tower=str(tmp_path / "siglip"))
    with pytest.raises(ValueError, match="siglip is one of SigLIP: export it with --format llama"):
        export.export(made)
    assert export.export(replace(made, format="llama"))
    assert json.loads((tmp_path / "x" / "config.json").read_text())["mm_vision_tower"] == str(tmp_path / "siglip")


def test_the_command_prints_what_it_wrote(tmp_path, run, capsys):
    folder, _, _ = run(ADAPTER)
    assert main(["--checkpoint", str(folder), "--output", str(tmp_path / "p.safetensors")]) == 0
    size = (tmp_path / "p.safetensors").stat().st_size / 1e6
    assert capsys.readouterr().out == f"{size:12,.1f} MB  {tmp_path / 'p.safetensors'}\n"
