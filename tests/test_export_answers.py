"""What others make of an exported folder: transformers' processor and model, the card's and the documents' code."""

import json

import exported_run
import pytest
import torch
from conftest import ROOT
from exported_run import ADAPTER
from weight_folders import C

from fastvid.config import ExportConfig
from fastvid.config.policy import Trainable
from fastvid.weights import export

run, tokenizer_model = exported_run.run, exported_run.tokenizer_model


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
