"""Videos seen by two vision towers: each decoded at its own size, through its own projector, by every command."""

import json
from shutil import copytree

import pytest
import torch
from chat_models import CHANNELS, HIDDEN, model_maker
from clips import draw
from safetensors.torch import load_file, save_file
from serving_run import served, text_of, uri

from fastvid import embed
from fastvid.batch import by_tower
from fastvid.features.file import save_features
from fastvid.inference.chat import Chat
from fastvid.provenance import EXPORT_MARK, KEY
from fastvid.video.decode import decode
from fastvid.video.encoder import FeatureEncoder
from fastvid.video.towers.choice import revisions

SECOND = 24  # channels


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """model/, tower/ of 28 pixels, second/ of 42, alike/ of 28, clip.mp4."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    root = tmp_path_factory.mktemp("two")
    sizes = {"intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    model = model_maker(root)("model", mm_hidden_size_2=SECOND)
    for i, (name, size) in enumerate((("second", 42), ("alike", 28))):
        torch.manual_seed(7 + i)
        CLIPVisionModel(CLIPVisionConfig(hidden_size=SECOND, image_size=size, **sizes)).save_pretrained(root / name)
    state = load_file(model / "model.safetensors")
    state["model.mm_projector_2.weight"] = torch.randn(HIDDEN, SECOND, generator=torch.Generator().manual_seed(6))
    state["model.mm_projector_2.bias"] = torch.zeros(HIDDEN)
    save_file(state, model / "model.safetensors")
    draw(root / "clip.mp4", 9)
    return root


def asked_with(made, second="second", **settings):
    settings = {"num_frames": 3, "max_new_tokens": 6, "device": "cpu", **settings}
    return Chat(model_name_or_path=str(made / "model"), vision_tower_2=str(made / second), **settings)


@pytest.fixture(scope="module")
def chat(made):
    chat = asked_with(made)
    yield chat
    chat.close()


def encoded(made, tower, pooling="temporal+spatial", num_frames=3):
    encoder = FeatureEncoder(made / tower, device="cpu", num_temporal=num_frames, pooling=pooling)
    frames, _ = decode(made / "clip.mp4", num_frames=num_frames, size=encoder.image_size)
    return encoder.encode(frames)


@pytest.mark.parametrize("second, decoded", [("second", 2), ("alike", 1)])
def test_a_video_is_decoded_once_for_each_size(made, second, decoded, monkeypatch):
    chat, sizes = asked_with(made, second), []
    own = chat._worker.decode
    monkeypatch.setattr(chat._worker, "decode", lambda *args, **more: sizes.append(more["size"]) or own(*args, **more))
    features = chat.features(made / "clip.mp4")
    chat.close()
    assert len(sizes) == decoded
    for found, tower in zip(by_tower(features), ("tower", second)):
        assert torch.equal(found, encoded(made, tower))
    assert features.shape == (3 + 4 + 3 + (9 if second == "second" else 4), (CHANNELS, SECOND))


@pytest.mark.slow
def test_a_server_answers_with_both(made, chat):
    expected = chat.ask(made / "clip.mp4", "what plays?")
    with served(chat, made / "model", max_new_tokens=6) as running:
        for _ in range(2):  # once made, once kept
            status, answer = running.ask(uri(made / "clip.mp4"))
            assert status == 200 and text_of(answer)[0] == expected
        first, second = (each.nbytes for each in by_tower(chat.features(made / "clip.mp4")))
        assert running.service._features.bytes == first + second


@pytest.mark.slow
def test_a_server_takes_no_feature_file_of_one(made, chat, tmp_path):
    save_features(tmp_path / "a.safetensors", torch.zeros(7, CHANNELS), {})
    with served(chat, made / "model", allowed_folder=str(tmp_path)) as running:
        status, answer = running.ask(f"file://{tmp_path}/a.safetensors")
        assert status == 400 and "two vision towers; send the video instead" in answer["error"]["message"]


@pytest.mark.slow
def test_rows_for_other_programs_are_of_both(made, chat, tmp_path):
    features = chat.features(made / "clip.mp4")
    folders = [tmp_path / name for name in ("one", "two")]
    for folder, found in zip(folders, by_tower(features)):
        (folder / "in").mkdir(parents=True)
        save_features(folder / "in" / "a.safetensors", found, {"tower": folder.name})
    known = ["--model_name_or_path", str(made / "model"), "--device", "cpu", "--num_frames", "3"]
    towers = ["--video", str(made / "clip.mp4"), "--vision_tower_2", str(made / "second")]
    files = ["--video", str(folders[0]), "--video_2", str(folders[1])]
    with torch.no_grad():
        expected = chat.model.projector(*(each.float() for each in by_tower(features)))
    for given, name in ((towers, "clip"), (files, "in/a")):
        output = tmp_path / "rows"
        for made_now in (1, 0):
            assert embed.main([*known, *given, "--output", str(output)]) == 0
            assert torch.equal(load_file(output / f"{name}.safetensors")["embeddings"], expected), made_now
    written = (output / "in" / "a.safetensors").stat().st_mtime_ns
    save_features(
        folders[1] / "in" / "a.safetensors", by_tower(features)[1] * 0, {"tower": "two"}
    )  # another second one
    assert embed.main([*known, *files, "--output", str(output)]) == 0
    assert (output / "in" / "a.safetensors").stat().st_mtime_ns > written
    assert not torch.equal(load_file(output / "in" / "a.safetensors")["embeddings"], expected)


@pytest.fixture
def remembering(made, tmp_path):
    """A model that tells what it was trained on: of the second tower 2 frames, in a grid."""
    told = {
        "tower": str(made / "tower"),
        "tower_revision": revisions(made / "tower")[0],
        "num_frames": 3,
        "pooling": "temporal+spatial",
        "second": {
            "tower": str(made / "second"),
            "tower_revision": revisions(made / "second")[0],
            "num_frames": 2,
            "pooling": "grid:2x3x3",
        },
        "rows": 3 + 4 + 2 * 9,
    }
    model = copytree(made / "model", tmp_path / "model")
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, EXPORT_MARK: {KEY: told}}))
    return model


@pytest.mark.slow
def test_each_tower_sees_what_it_saw_in_training(made, remembering, tmp_path):
    chat = Chat(model_name_or_path=str(remembering), max_new_tokens=2, device="cpu")
    found = by_tower(chat.features(made / "clip.mp4"))
    chat.close()
    assert torch.equal(found[0], encoded(made, "tower"))
    assert torch.equal(found[1], encoded(made, "second", "grid:2x3x3", 2))
    with pytest.raises(ValueError, match="--vision_tower_2 .*alike is another tower than the one of the features"):
        Chat(model_name_or_path=str(remembering), vision_tower_2=str(made / "alike"), device="cpu")
    # Feature files are checked alike, and their rows count together.
    for name, x_RC, header in (
        ("one", found[0], {"tower_revision": revisions(made / "tower")[0], "num_frames": 3}),
        ("two", found[1], {"tower_revision": revisions(made / "second")[0], "num_frames": 5}),
        (
            "short",
            found[1][1:],
            {"tower_revision": revisions(made / "second")[0], "num_frames": 2, "pooling": "grid:2x3x3"},
        ),
    ):
        (tmp_path / name).mkdir()
        save_features(tmp_path / name / "a.safetensors", x_RC, header)
    for folder, message in (
        ("two", r"two/a.safetensors was made with --num_frames 5, \S+ was trained with 2; extract it with that"),
        ("short", r"one/a.safetensors has 24 rows, \S+ was trained on features of 25: extract it with the tower"),
    ):
        chat = Chat(model_name_or_path=str(remembering), video_2=str(tmp_path / folder), device="cpu")
        with pytest.raises(ValueError, match=message):
            chat.features(tmp_path / "one" / "a.safetensors")


def test_a_second_tower_of_other_channels_is_refused(made):
    chat = asked_with(made, "tower")
    with pytest.raises(ValueError, match=r"--vision_tower_2 \S+ has 16 channels, the projector takes 24: give"):
        chat.features(made / "clip.mp4")
    chat.close()
    chat = Chat(model_name_or_path=str(made / "model"), device="cpu")
    with pytest.raises(ValueError, match=r"model names no vision tower: give --vision_tower_2"):
        chat.features(made / "clip.mp4")
    chat.close()


def test_a_model_that_lacks_the_second_projector_is_refused(made, tmp_path):
    model = copytree(made / "model", tmp_path / "model")
    state = load_file(model / "model.safetensors")
    save_file({name: x for name, x in state.items() if "projector_2" not in name}, model / "model.safetensors")
    with pytest.raises(ValueError, match=r"model holds no projector of the second vision tower: give the trained ones"):
        Chat(model_name_or_path=str(model), device="cpu")
    save_file({name: x for name, x in state.items() if "projector" in name}, tmp_path / "both.safetensors")
    chat = Chat(model_name_or_path=str(model), projector=str(tmp_path / "both.safetensors"), device="cpu")
    assert len(chat.towers) == 2
    chat.close()
