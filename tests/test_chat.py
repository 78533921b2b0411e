"""The chat command: answers, which files it reads, and what a bad one costs."""

import json
import sys
import types

import pytest
import torch
from chat_models import CHANNELS, HIDDEN, model_maker, projector_state
from checkpoint_cases import flip_a_bit

from fastvid.chat import main
from fastvid.checkpoints import checkpoint
from fastvid.data.conversation import inference_prompt
from fastvid.features.file import save_features
from fastvid.inference import chat as chat_module
from fastvid.inference.chat import Chat
from fastvid.model.attention import SDPA

ROWS = 7


@pytest.fixture(scope="module")
def make_model(tmp_path_factory):
    """Writes a small model's folder: `chat_models.model_maker`."""
    return model_maker(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def model(make_model):
    return make_model("model")


@pytest.fixture(scope="module")
def features():
    return torch.randn(ROWS, CHANNELS, generator=torch.Generator().manual_seed(3)).half()


@pytest.fixture(scope="module")
def chat(model):
    chat = Chat(model_name_or_path=str(model), max_new_tokens=6, device="cpu")
    yield chat
    chat.close()


def test_attention_is_settled_when_the_model_is_built(chat):
    assert {layer.attention for layer in chat.model.decoder.layers} == {SDPA}  # in fp32 on a CPU


def test_attention_is_tested_without_gradients(model, monkeypatch):
    asked = []

    def settle(*given, **options):
        asked.append(options)
        return SDPA

    monkeypatch.setattr(chat_module, "settle_attention", settle)
    Chat(model_name_or_path=str(model), device="cpu").close()
    assert asked == [{"gradients": False}]


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A short video."""
    import av
    import numpy as np

    path = tmp_path_factory.mktemp("clips") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        columns = np.arange(64, dtype=np.uint8)[None, :, None] * np.ones((64, 1, 3), np.uint8)
        for shade in range(10):
            frame = av.VideoFrame.from_ndarray(columns * 3 + shade * 6, format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture
def folder(tmp_path, features, clip):
    """Videos and features: a.safetensors, bad.mp4, clip.mp4."""
    folder = tmp_path / "videos"
    folder.mkdir()
    save_features(folder / "a.safetensors", features, {})
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "clip.mp4").write_bytes(clip.read_bytes())
    return folder


def questions_file(tmp_path, *pairs):
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"video": video, "question": text}) + "\n" for video, text in pairs))
    return str(path)


def flags(model, *more):
    return ["--model_name_or_path", str(model), "--max_new_tokens", "6", "--device", "cpu", *map(str, more)]


def test_greedy_answer_is_that_of_transformers(chat, model, features):
    from transformers import LlamaForCausalLM

    tokenizer, state = chat.tokenizer, projector_state()
    ids = torch.tensor(
        inference_prompt("what is?", tokenizer, video_tokens=ROWS, use_start_end=True, conv_mode="pg-video-llava")
    )
    reference = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    embeds = reference.get_input_embeddings()(ids).detach()
    embeds[ids == tokenizer.tokens.patch] = torch.nn.functional.linear(
        features.float(), state["model.mm_projector.weight"], state["model.mm_projector.bias"]
    )
    answer = reference.generate(inputs_embeds=embeds[None], max_new_tokens=6, do_sample=False, eos_token_id=2)[0]
    assert chat.ask_features(features, "what is?") == tokenizer.decode(answer.tolist()).strip()
    assert len(answer) == 6 and chat.ask_features(features * 0, "what is?") != chat.ask_features(features, "what is?")


@pytest.mark.slow
def test_a_video_is_asked_about_through_its_features(chat, clip):
    from fastvid.video.decode import decode
    from fastvid.video.encoder import FeatureEncoder

    encoder = FeatureEncoder(chat.model_config.vision_tower, device="cpu")
    expected = encoder.encode(decode(clip, size=encoder.image_size)[0])
    assert expected.shape == (100 + 4, CHANNELS)
    torch.testing.assert_close(chat.features(clip), expected, rtol=0, atol=0)
    assert chat.ask(clip, "who is?") == chat.ask_features(expected, "who is?")


def test_history_and_sampling_reach_the_model(chat, model, features):
    turns = [("what is?", "cards")]
    assert chat.ask_features(features, "who is?", turns) != chat.ask_features(features, "who is?")
    hot = {
        seed: Chat(model_name_or_path=str(model), temperature=5.0, seed=seed, max_new_tokens=6, device="cpu")
        for seed in (1, 2)
    }
    first = hot[1].ask_features(features, "who is?")
    assert first == hot[1].ask_features(features, "who is?") != hot[2].ask_features(features, "who is?")


def test_the_end_token_is_left_out_and_not_its_characters(chat, features, monkeypatch):
    ids = [*chat.tokenizer.encode("plays cards"), chat.tokenizer.eos]
    monkeypatch.setattr(chat_module, "generate", lambda *_, **__: ids)
    assert chat.ask_features(features, "what?") == "plays cards"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda chat, features: chat.ask_features(features[:, :3], "?"), r"features are \[7, 3\]"),
        (lambda chat, features: chat.ask_features(features, "<vid_start>"), "holds <vid_start>"),
        (lambda chat, features: chat.ask_features(torch.zeros(800, CHANNELS), "?"), "the model's context 800"),
    ],
)
def test_what_cannot_be_asked_is_an_error(chat, features, call, message):
    with pytest.raises(ValueError, match=message):
        call(chat, features)


def saved_run(tmp_path, *, use_start_end, boundary=None):
    """An --output_dir whose newest checkpoint holds a projector twice the model's."""
    state = projector_state(scale=2.0)
    tensors = {
        "projector.0.weight": state["model.mm_projector.weight"],
        "projector.0.bias": state["model.mm_projector.bias"],
    }
    if boundary is not None:
        tensors["boundary.weight"] = boundary
    for step in (9, 10):
        checkpoint.save(
            tmp_path / "run",
            step,
            groups={"model": tensors},
            state={"config": {"mm_use_vid_start_end": use_start_end, "seed": 7}},
        )
    return tmp_path / "run"


def test_every_form_of_a_trained_projector_is_read(make_model, tmp_path):
    from safetensors.torch import save_file

    model = make_model("bare", projector=False)
    torch.save(projector_state(scale=2.0), tmp_path / "p.bin")
    save_file(projector_state(scale=2.0), tmp_path / "p.safetensors")
    run = saved_run(tmp_path, use_start_end=True)
    output = tmp_path / "output"
    output.mkdir()
    torch.save(projector_state(scale=2.0), output / "mm_projector.bin")
    for path in (tmp_path / "p.bin", tmp_path / "p.safetensors", run / "checkpoint-10", run, output):
        loaded = Chat(model_name_or_path=str(model), projector=str(path), device="cpu").model
        torch.testing.assert_close(
            loaded.projector[0].weight.detach(), projector_state(scale=2.0)["model.mm_projector.weight"], rtol=0, atol=0
        )
    flip_a_bit(next((run / "checkpoint-10").glob("model-*")))
    with pytest.raises(ValueError, match="checkpoint-10 is damaged: the sha256 of model-00000"):
        Chat(model_name_or_path=str(model), projector=str(run / "checkpoint-10"), device="cpu")
    with pytest.raises(ValueError, match="give the trained one with --projector"):
        Chat(model_name_or_path=str(model), device="cpu")
    with pytest.raises(ValueError, match="nothing does not exist; give a projector"):
        Chat(model_name_or_path=str(model), device="cpu", projector=str(tmp_path / "nothing"))


def test_start_and_end_are_used_where_something_says_so(make_model, model, tmp_path):
    lacking = make_model("lacking", tokens=False)
    told = make_model("told", mm_use_vid_start_end=False)

    def uses(folder, **settings):
        return Chat(model_name_or_path=str(folder), device="cpu", **settings).tokenizer.tokens.start is not None

    assert uses(model) and not uses(lacking) and not uses(told)
    assert uses(told, mm_use_vid_start_end=True) and not uses(model, mm_use_vid_start_end=False)
    boundary = torch.randn(2, HIDDEN)
    run = saved_run(tmp_path, use_start_end=True, boundary=boundary)
    chat = Chat(model_name_or_path=str(lacking), device="cpu", projector=str(run))
    tokens = chat.tokenizer.tokens
    torch.testing.assert_close(chat.model.embed.weight[[tokens.start, tokens.end]].detach(), boundary, rtol=0, atol=0)
    assert not uses(model, projector=str(saved_run(tmp_path / "without", use_start_end=False)))
    torch.save(
        projector_state() | {"model.embed_tokens.weight": torch.randn(tokens.vocab_size, HIDDEN)},
        tmp_path / "table.bin",
    )
    torch.save(projector_state(), tmp_path / "plain.bin")
    assert uses(lacking, projector=str(tmp_path / "table.bin"))
    assert not uses(lacking, projector=str(tmp_path / "plain.bin"))
    torch.save(
        projector_state() | {"model.embed_tokens.weight": torch.randn(tokens.start, HIDDEN)}, tmp_path / "short.bin"
    )
    with pytest.raises(ValueError, match="--mm_use_vid_start_end False"):
        uses(lacking, projector=str(tmp_path / "short.bin"))


def test_one_question_prints_the_answer_alone(chat, model, folder, features, capsys):
    assert main(flags(model, "--video", folder / "a.safetensors", "--question", "what is?")) == 0
    assert capsys.readouterr().out == chat.ask_features(features, "what is?") + "\n"


@pytest.mark.parametrize("question", ["", "  "])
def test_an_empty_question_is_refused(model, folder, question):
    with pytest.raises(ValueError, match="--question is empty"):
        main(flags(model, "--video", folder / "a.safetensors", "--question", "what is?", "--question", question))


@pytest.mark.slow
def test_a_folder_answers_as_jsonl_and_a_bad_video_costs_one_line(chat, model, folder, capsys, monkeypatch):
    made = []
    features_of = Chat.features
    monkeypatch.setattr(Chat, "features", lambda self, path: made.append(path.name) or features_of(self, path))
    assert main(flags(model, "--video", folder, "--question", "what is?", "--question", "who is?")) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["video"], line["question"]) for line in lines] == [
        (name, text) for name in ("a.safetensors", "clip.mp4") for text in ("what is?", "who is?")
    ]
    assert made == ["a.safetensors", "bad.mp4", "clip.mp4"]
    assert lines[3]["answer"] == chat.ask(folder / "clip.mp4", "who is?")
    assert ["bad.mp4" in line for line in err.splitlines() if "error:" in line] == [True]


@pytest.mark.slow
def test_a_questions_file_is_answered_in_its_order(chat, model, folder, features, tmp_path, capsys):
    pairs = [
        ("a", "who is?"),
        ("clip.mp4", "what is?"),
        ("a.pkl", "<vid_patch>"),
        ("../videos/a", "?"),
        ("a", "what is?"),
    ]
    path = questions_file(tmp_path, *pairs)
    assert main(flags(model, "--video", folder, "--questions_file", path)) == 1
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["video"] for line in lines] == [video for video, _ in pairs]
    assert [lines[0]["answer"], lines[4]["answer"]] == [
        chat.ask_features(features, text) for text in ("who is?", "what is?")
    ]
    assert ["error" in line for line in lines] == [False, False, True, True, False]
    assert "holds <vid_patch>" in lines[2]["error"] and "record 3" in lines[3]["error"]
    assert "record 3" in err and "holds <vid_patch>" in err
    for pairs, code in (([("a", "who is?")], 0), ([("a", "who is?"), ("unknown", "who is?")], 1)):
        path = questions_file(tmp_path, *pairs)
        assert main(flags(model, "--video", folder, "--questions_file", path)) == code
    with pytest.raises(ValueError, match="none of the 1 questions can be asked; the first: .*'unknown'"):
        main(flags(model, "--video", folder, "--questions_file", questions_file(tmp_path, ("unknown", "who is?"))))


@pytest.mark.slow
def test_a_test_of_consistency_is_one_line(chat, model, folder, features, tmp_path, capsys):
    path = tmp_path / "consistency.json"
    path.write_text(
        json.dumps(
            [
                {"video_name": "a", "Q1": "who is?", "Q2": "what is?", "A": "cards"},
                {"video_name": "bad", "Q1": "who is?", "Q2": "what is?", "A": "cards"},
            ]
        )
    )
    assert main(flags(model, "--video", folder, "--questions_file", path)) == 1
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert (
        [first["pred1"], first["pred2"]]
        == first["answer"]
        == [chat.ask_features(features, text) for text in ("who is?", "what is?")]
    )
    assert second["A"] == "cards" and "cannot be opened" in second["error"]


def test_what_is_no_video_is_told_before_anything_is_loaded(folder, tmp_path):
    pictures = {"a.png": b"\x89PNG\r\n\x1a\n", "b.mp4": b"\xff\xd8\xff\xe0", "c.webp": b"RIFF\0\0\0\0WEBPVP8 "}
    for name, content in pictures.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"--video .*{name} is an image, not a video"):
            main(flags("no model", "--video", tmp_path / name, "--question", "what is?"))
    (tmp_path / "d.mp4").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ValueError, match="d.mp4 is a git-lfs pointer"):
        main(flags("no model", "--video", tmp_path / "d.mp4", "--question", "what is?"))
    with pytest.raises(ValueError, match="--video https://example.com/a.mp4 is a URL: download"):
        main(flags("no model", "--video", "https://example.com/a.mp4", "--question", "what is?"))


@pytest.mark.slow
def test_pictures_in_a_folder_cost_a_line_each(model, folder, capsys):
    (folder / "bad.mp4").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    assert main(flags(model, "--video", folder, "--question", "what is?")) == 1
    assert "bad.mp4 is an image, not a video" in capsys.readouterr().err


@pytest.mark.slow
def test_one_bad_video_is_the_users_mistake(model, folder):
    for questions in (["what is?"], ["what is?", "who is?"]):
        with pytest.raises(ValueError, match="bad.mp4.*cannot be opened"):
            main(flags(model, "--video", folder / "bad.mp4", "--question", *questions))
    with pytest.raises(ValueError, match="holds <vid_end>"):
        main(flags(model, "--video", folder / "a.safetensors", "--question", "<vid_end>"))


def test_questions_typed_at_a_terminal_keep_their_history(chat, model, folder, features, capsys, monkeypatch):
    typed = iter(["what is?", "<vid_end>", "who is?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: True))
    assert main(flags(model, "--video", folder / "a.safetensors")) == 0
    first = chat.ask_features(features, "what is?")
    second = chat.ask_features(features, "who is?", [("what is?", first)])
    assert capsys.readouterr().out == f"{first}\n{second}\n"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "give --video"),
        (["--video", "missing.mp4", "--question", "?"], "missing.mp4 does not exist"),
        (["--video", ".", "--question", "?", "--questions_file", "q"], "not both"),
        (["--video", "."], "give --question"),
    ],
)
def test_flags_that_do_not_fit_are_errors_before_anything_is_loaded(more, message, monkeypatch):
    monkeypatch.setattr(sys, "stdin", types.SimpleNamespace(isatty=lambda: False))
    with pytest.raises(ValueError, match=message):
        main(flags("no model", *more))


def test_a_tower_of_another_width_is_refused(make_model, clip):
    chat = Chat(model_name_or_path=str(make_model("narrow", channels=8)), device="cpu")
    with pytest.raises(ValueError, match="has 16 channels, the projector takes 8"):
        chat.ask(clip, "what?")


@pytest.mark.slow
def test_the_recordings_model_answers_about_a_clip(tiny, golden, tmp_path):
    torch.save(
        {"model.mm_projector.weight": torch.randn(64, 64), "model.mm_projector.bias": torch.randn(64)},
        tmp_path / "projector.bin",
    )
    chat = Chat(
        model_name_or_path=str(tiny / "model224"),
        projector=str(tmp_path / "projector.bin"),
        device="cpu",
        max_new_tokens=3,
    )
    assert chat.ask(min((golden / "videos").glob("*.mp4")), "What is happening?")
    chat.close()
