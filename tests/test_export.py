"""fastvid export: the reference's projector file, LLaVA-1.5's layout, llava-hf's layout."""

import dataclasses
import json
import resource
import sys
from dataclasses import asdict, replace

import pytest
import torch
from checkpoint_cases import flip_a_bit
from conftest import ROOT
from forks import FORKS
from safetensors.torch import load_file
from towers import write_siglip
from weight_folders import C, D, llava_state, load, write_folder

from fastvid.batch import AttentionLayout, PackedBatch
from fastvid.checkpoints import checkpoint
from fastvid.config import ExportConfig, TrainConfig
from fastvid.data.tokenizer import load_tokenizer
from fastvid.export import main
from fastvid.policy import Trainable
from fastvid.weights import export
from fastvid.weights.model_config import read_model_config

PIECES = 300
ADAPTER = Trainable(projector=True, boundary=True)
ALL = Trainable(projector=True, embed=True, head=True, decoder=True)


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """A small LLaMA-like tokenizer.model."""
    import sentencepiece

    prefix = tmp_path_factory.mktemp("tokenizer") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["USER: what is it? ASSISTANT: a red cat </s>"] * 20),
        model_prefix=str(prefix),
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def run(tmp_path, tokenizer_model):
    """make(trained, …) -> (checkpoint folder, model after training, tokenizer): a base folder and a run from it."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=C, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
        )
    ).save_pretrained(tmp_path / "tower")

    def make(trainable, *, kind="mlp2x_gelu", tied=False, start_end=True, dtype=torch.float32, **flags):
        rows = load_vocabulary(tokenizer_model)
        state = {
            name: torch.randn(rows, D).to(dtype) if tensor.shape == (40, D) else tensor
            for name, tensor in llava_state(kind, dtype, tied).items()
        }
        config = {
            "model_type": "llava",
            "hidden_size": D,
            "intermediate_size": 44,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": rows,
            "rms_norm_eps": 1e-5,
            "max_position_embeddings": 256,
            "mm_hidden_size": C,
            "mm_projector_type": kind,
            "mm_vision_tower": str(tmp_path / "tower"),
            "tie_word_embeddings": tied,
        }
        base = write_folder(tmp_path / "base", state, config, files=2)
        (base / "tokenizer.model").write_bytes(tokenizer_model.read_bytes())
        tokenizer = load_tokenizer(base, start_end)
        model = load(base, tokens=tokenizer.tokens, trainable=trainable, seed=5)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in trained.values():
                parameter += torch.randn(parameter.shape)
        settings = TrainConfig(
            model_name_or_path=str(base),
            data_path=["/data/of/mine/videos.json"],
            output_dir=str(tmp_path / "out"),
            version="v1",  # as runs settle it
            seed=5,
            mm_use_vid_start_end=start_end,
            **flags,
        )
        folder = checkpoint.save(
            tmp_path / "out",
            7,
            groups={"model": trained},
            state={
                "config": asdict(settings),
                "tokens": asdict(tokenizer.tokens),
                "step": 7,
                "total_steps": 9,
                "num_samples": 1234,
            },
        )
        return folder, model, tokenizer

    return make


def load_vocabulary(path):
    from sentencepiece import SentencePieceProcessor

    return SentencePieceProcessor(model_file=str(path)).get_piece_size()


def text_batch(ids):
    empty = torch.empty(0, dtype=torch.int64)
    positions, layout = torch.arange(len(ids), dtype=torch.int32), AttentionLayout.of_lengths([len(ids)])
    return PackedBatch(torch.tensor(ids), positions, layout, empty, torch.empty(0, C), empty, empty, empty)


def logits(model, ids):
    return model.logits(model.hidden(text_batch(ids)))


def assert_equal_models(model, other):
    """The same computation: equal tensors, `model`'s boundary rows in `other`'s table."""
    mine = {name: p.detach().clone() for name, p in model.named_parameters()}
    if "boundary.weight" in mine:
        mine["embed.weight"][-2:] = mine.pop("boundary.weight")
    theirs = dict(other.named_parameters())
    assert set(mine) == set(theirs)
    for name, tensor in mine.items():
        assert torch.equal(tensor, theirs[name]), name


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


def test_the_processor_is_the_towers(tmp_path, run):
    from transformers import AutoProcessor

    folder, _, _ = run(ADAPTER)
    (tmp_path / "tower" / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "feature_extractor_type": "CLIPProcessor"}
        )
    )
    export.export(ExportConfig(str(folder), str(tmp_path / "exported"), "llava"))
    image = AutoProcessor.from_pretrained(tmp_path / "exported").image_processor
    assert (list(image.image_mean), list(image.image_std)) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7])


@pytest.mark.slow
@pytest.mark.parametrize("order", ["reference", "video_first"])
@pytest.mark.parametrize("start_end", [True, False])
def test_processor_and_model_answer_about_a_picture_as_chat_does(tmp_path, run, monkeypatch, start_end, order):
    """The same pixels, the same prompt, the same logits."""
    import numpy as np
    from PIL import Image
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    from fastvid.data.conversation import EncodedSample
    from fastvid.data.packing import pack
    from fastvid.inference.chat import Chat

    folder, _, _ = run(Trainable(projector=True, boundary=start_end), start_end=start_end, question_order=order)
    output = tmp_path / "exported"
    export.export(ExportConfig(str(folder), str(output), "llava"))
    pixels = np.random.default_rng(3).integers(0, 256, (28, 28, 3), np.uint8)
    picture = Image.fromarray(pixels)
    picture.save(tmp_path / "picture.png")
    model = LlavaForConditionalGeneration.from_pretrained(output).eval()
    processor = AutoProcessor.from_pretrained(output)
    monkeypatch.setattr("fastvid.video.encoder.default_dtype", lambda *_: torch.float32)  # as transformers' tower
    chat = Chat(model_name_or_path=str(output), device="cpu")
    features = chat.features(tmp_path / "picture.png")
    assert features.shape == (4, C), "no temporal rows, as in training"
    for history in ((), (("what is it?", "a red cat"),)):
        texts = [text for turn in history for text in turn] + ["what is a cat?"]
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
        messages[0]["content"] = [{"type": "image", "image": picture}, {"type": "text", "text": texts[0]}]
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        ids = chat.prompt(features, "what is a cat?", history)
        assert inputs.input_ids[0].tolist() == ids
        with torch.no_grad():
            theirs = model(**inputs).logits[0]
            states = model.model.vision_tower(inputs.pixel_values, output_hidden_states=True).hidden_states
            exact = states[-2][0, 1:]
            ours = [
                chat.model.logits(
                    chat.model.hidden(pack([(EncodedSample("question", ids), [rows])], chat.tokenizer.tokens, C))
                )
                for rows in (exact, features)
            ]
        spread = theirs.std()
        assert (ours[0] - theirs).abs().max() < 1e-4 * spread
        assert (features - exact).abs().max() < 2e-3 * exact.abs().max()  # they are kept in 16 bits
        assert (ours[1] - theirs).abs().max() < 5e-2 * spread
    chat.close()
    with pytest.raises(Exception, match="leave the message of system out"):
        processor.apply_chat_template([{"role": "system", "content": "be brief"}, *messages])
    wide = processor(images=Image.fromarray(np.repeat(pixels, 2, 1)), text="<vid_patch>", return_tensors="pt")
    same = processor(images=picture, text="<vid_patch>", return_tensors="pt")
    assert torch.equal(wide.pixel_values, same.pixel_values), "a picture is neither cropped nor blurred"


def test_the_model_card(tmp_path, run):
    import yaml

    folder, _, _ = run(ADAPTER, learning_rate=2.5e-4)
    base = tmp_path / "base" / "config.json"
    base.write_text(json.dumps({**json.loads(base.read_text()), "_name_or_path": "someone/base-7b"}))
    output = tmp_path / "my-model"
    export.export(ExportConfig(str(folder), str(output), "llava"))
    text = (output / "README.md").read_text()
    _, front, rest = text.split("---\n", 2)
    said = yaml.safe_load(front)
    assert said["base_model"] == ["someone/base-7b"]
    assert said["library_name"] == "transformers"
    assert said["pipeline_tag"] == "video-text-to-text"
    assert "fastvid" in said["tags"] and "license" not in said
    assert "# my-model" in rest
    assert "| language model | someone/base-7b |" in rest and "| vision tower | tower" in rest
    assert "| `--learning_rate` | 0.00025 |" in rest and "| step | 7 of 9 |" in rest
    assert "| data | `videos.json`, 1,234 samples |" in rest and "/data" not in text
    assert str(tmp_path) not in text, "folders of this machine are nobody's business"


@pytest.mark.slow
def test_the_cards_code_answers_as_chat_does(tmp_path, run, monkeypatch, capsys):
    from clips import draw
    from PIL import Image

    from fastvid.embed import main as embed
    from fastvid.inference.chat import Chat

    folder, _, _ = run(ADAPTER)
    monkeypatch.setattr("fastvid.video.encoder.default_dtype", lambda *_: torch.float32)
    output = tmp_path / "exported"
    export.export(ExportConfig(str(folder), str(output), "llava"))
    draw(tmp_path / "clip.mp4", 5)
    pixels = torch.arange(28 * 28 * 3).reshape(28, 28, 3) % 251
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(output / "picture.png")
    model, frames = ["--model_name_or_path", str(output), "--device", "cpu"], ["--num_frames", "3"]
    assert embed([*model, *frames, "--video", str(tmp_path / "clip.mp4"), "--output", str(output)]) == 0
    monkeypatch.chdir(output)
    blocks = (output / "README.md").read_text().split("```python\n")[1:]
    code = "".join(block.split("```")[0] for block in blocks).replace("max_new_tokens=64", "max_new_tokens=9")
    capsys.readouterr()
    names = {}
    exec(code, names)
    chat = Chat(model_name_or_path=str(output), max_new_tokens=9, device="cpu", num_frames=3)
    with torch.no_grad():  # Chat's own features of the picture are rounded to 16 bits
        tower = names["model"].model.vision_tower
        states = tower(names["inputs"].pixel_values, output_hidden_states=True).hidden_states
    # A random model writes halves of characters, which tokenizers spells otherwise than sentencepiece.
    monkeypatch.setattr(chat.tokenizer, "decode", lambda ids: names["processor"].decode(ids, skip_special_tokens=True))
    picture = chat.ask_features(states[-2][0, 1:], "What is this?")
    video = chat.ask(tmp_path / "clip.mp4", "What happens in this video?")
    chat.close()
    assert capsys.readouterr().out == f"{picture}\n{video}\n"
    assert picture and video and picture != video


def test_an_edited_card_is_kept(tmp_path, run):
    folder, _, _ = run(ADAPTER)
    config = ExportConfig(str(folder), str(tmp_path / "exported"), "llava")
    export.export(config)
    export.export(config)  # its own is replaced
    card = tmp_path / "exported" / "README.md"
    card.write_text(card.read_text() + "\nlicense: mine\n")
    with pytest.raises(ValueError, match="README.md was written by somebody since.*move it away"):
        export.export(config)
    assert "license: mine" in card.read_text()
    card.rename(tmp_path / "kept.md")
    export.export(config)
    assert "license: mine" not in card.read_text()


@pytest.mark.slow
def test_the_documents_example_answers_as_chat_does(tmp_path, run, monkeypatch, capsys):
    from fastvid.embed import main as embed
    from fastvid.features.file import save_features
    from fastvid.inference.chat import Chat

    folder, _, _ = run(ADAPTER)
    (tmp_path / "features").mkdir()
    save_features(tmp_path / "features" / "clip.safetensors", torch.randn(6, C).half(), {})
    export.export(ExportConfig(str(folder), str(tmp_path / "exported-hf"), "llava"))
    model = ["--model_name_or_path", str(tmp_path / "exported-hf"), "--device", "cpu"]
    assert embed([*model, "--video", str(tmp_path / "features"), "--output", str(tmp_path / "rows")]) == 0
    text = (ROOT / "docs" / "transformers.md").read_text()
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(text.split("```python\n")[1].split("```")[0].replace("max_new_tokens=64", "max_new_tokens=9"), {})
    chat = Chat(model_name_or_path="exported-hf", max_new_tokens=9, device="cpu")
    assert chat.config.conv_mode == "vicuna_v1_1"
    answer = chat.ask("features/clip.safetensors", "What happens in this video?")
    assert capsys.readouterr().out.strip() == answer != ""


def test_the_command_prints_what_it_wrote(tmp_path, run, capsys):
    folder, _, _ = run(ADAPTER)
    assert main(["--checkpoint", str(folder), "--output", str(tmp_path / "p.safetensors")]) == 0
    size = (tmp_path / "p.safetensors").stat().st_size / 1e6
    assert capsys.readouterr().out == f"{size:12,.1f} MB  {tmp_path / 'p.safetensors'}\n"
