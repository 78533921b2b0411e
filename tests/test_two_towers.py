"""Runs with two vision towers side by side: from feature files to answers, resumed, on ranks, and what is refused."""

import json
import shutil

import pytest
import torch
from model_cases import assert_close, llama_of
from safetensors.torch import load_file
from training_run import CHANNELS, SAMPLES, SECOND_CHANNELS, flags, losses, start, write_run, write_second

from fastvid import chat, evaluate, export, inspection, train, validate
from fastvid.batch import by_tower
from fastvid.checkpoints import checkpoint
from fastvid.config import ExportConfig
from fastvid.data.dataset import SampleSet
from fastvid.features.file import load_features, save_features
from fastvid.inference.chat import Chat
from fastvid.provenance import Provenance, of_weights
from fastvid.weights.export import card_of

FULL = "--tune_mm_mlp_adapter", "False"
LORA = "--lora_enable", "True", "--lora_r", "4", "--lora_dropout", "0"
NAMES = [
    f"model.mm_projector{which}.{layer}.{kind}" for which in ("", "_2") for layer in "02" for kind in ("weight", "bias")
]


def headers(folder, tower):
    """Say in the headers of a folder's features what made them."""
    for path in folder.iterdir():
        save_features(
            path, load_features(path)[0], {"tower": tower, "tower_revision": f"sha256:{tower}", "num_frames": 4}
        )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = write_run(tmp_path_factory.mktemp("two"))
    headers(write_second(folder), "video-tower")
    headers(folder / "feats", "image-tower")
    return folder


def argv(run, output, *more):
    return [*flags(run, output, "--video_folder_2", str(run / "feats_2")), *more]


@pytest.fixture(scope="module")
def made(run):
    assert train.main(argv(run, run / "out")) == 0
    return run


@pytest.fixture(scope="module")
def asked(made):
    """A Chat of the feature files of both towers."""
    both = {"video": str(made / "feats"), "video_2": str(made / "feats_2")}
    chat = Chat(model_name_or_path=str(made / "model"), projector=str(made / "out"), max_new_tokens=5, **both)
    yield chat
    chat.close()


@pytest.mark.slow
def test_what_training_leaves(made):
    for name in ("mm_projector.bin", "mm_projector.safetensors"):
        path = made / "out" / name
        state = torch.load(path) if path.suffix == ".bin" else load_file(path)
        assert [*state][:1] == ["model.embed_tokens.weight"] and {*state} == {"model.embed_tokens.weight", *NAMES}
        assert state["model.mm_projector_2.0.weight"].shape[1] == SECOND_CHANNELS
        told = of_weights(path)
        assert (told.tower, told.tower_revision, told.rows) == ("image-tower", "sha256:image-tower", None)
        assert told.second == Provenance("video-tower", "sha256:video-tower", 4, pooling="temporal+spatial")
    started = load_file(made / "model" / "model.safetensors")
    assert not any(torch.equal(state[name], started[name]) for name in NAMES if name in started)
    assert of_weights(made / "out" / "checkpoint-18") == told


@pytest.mark.slow
def test_answers_are_of_both_blocks_in_place(made, asked):
    """The first token of an answer is transformers', of the prompt with both projected blocks put in by hand."""
    llama, tokens = llama_of(asked.model), asked.tokenizer.tokens
    state = load_file(made / "out" / "mm_projector.safetensors")
    for name in ("clip0", "clip1"):
        features = asked.features(made / "feats" / f"{name}.safetensors")
        blocks = []
        for x_RC, which in zip(by_tower(features), ("", "_2")):
            w0, b0, w2, b2 = (state[key] for key in NAMES if key.startswith(f"model.mm_projector{which}."))
            blocks.append(torch.nn.functional.gelu(x_RC.float() @ w0.T + b0) @ w2.T + b2)
        ids = torch.tensor(asked.prompt(features, "what does it see?"))
        x_ND, at = llama.model.embed_tokens(ids), int((ids == tokens.patch).nonzero()[0])
        assert int((ids == tokens.patch).sum()) == len(features)
        x_ND[at : at + len(features)] = torch.cat(blocks)
        with torch.no_grad():
            expected = llama(inputs_embeds=x_ND[None]).logits[0, -1]
            _, found = asked_logits(asked, features, ids)
        assert_close(found, expected)


def asked_logits(chat, features, ids):
    from fastvid.data.conversation import EncodedSample
    from fastvid.data.packing import pack

    batch = pack([(EncodedSample("", ids.tolist()), [features])], chat.tokenizer.tokens, chat.model_config.channels)
    logits = chat.model.logits(chat.model.hidden(batch))
    return logits, logits[-1]


@pytest.mark.slow
def test_exports_answer_alike(made, asked, tmp_path):
    features = asked.features(made / "feats" / "clip3.safetensors")
    expected = asked.ask_features(features, "what is it?")
    folder = str(tmp_path / "llama")
    for form, output in (("llama", folder), ("projector", str(tmp_path / "p.safetensors"))):
        assert export.main(["--checkpoint", str(made / "out"), "--output", output, "--format", form]) == 0
    values = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert (values["mm_hidden_size"], values["mm_hidden_size_2"]) == (CHANNELS, SECOND_CHANNELS)
    card = card_of(ExportConfig(str(made / "out"), folder, "llama"))
    assert "| image-tower, sha256:image-tower; beside it video-tower, sha256:video-tower |" in card
    assert load_file(tmp_path / "p.safetensors").keys() == {"model.embed_tokens.weight", *NAMES}
    base, second = str(made / "model"), str(made / "feats_2" / "clip3.safetensors")
    for again in (
        Chat(model_name_or_path=folder, video_2=second, max_new_tokens=5),
        Chat(model_name_or_path=base, projector=str(tmp_path / "p.safetensors"), video_2=second, max_new_tokens=5),
        Chat(model_name_or_path=base, projector=str(made / "out" / "checkpoint-18"), video_2=second, max_new_tokens=5),
    ):
        assert again.trained.second == asked.trained.second
        found = again.features(made / "feats" / "clip3.safetensors")
        assert again.ask_features(found, "what is it?") == expected
    # Training goes on from both projectors of either.
    for i, starts in enumerate((["--model_name_or_path", folder], ["--pretrain_mm_mlp_adapter", str(made / "out")])):
        assert train.main(argv(made, tmp_path / str(i), "--max_steps", "1", "--learning_rate", "0", *starts)) == 0
        left = load_file(tmp_path / str(i) / "mm_projector.safetensors")
        before = load_file(made / "out" / "mm_projector.safetensors")
        assert all(torch.equal(left[name], before[name]) for name in NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("more", [FULL, (*LORA, "--share_video", "True")], ids=["full", "lora, shared"])
def test_a_resumed_run_has_the_same_bits(run, tmp_path, more):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    common = "--lr_scheduler_type", "constant", *more
    assert train.main(argv(run, straight, "--max_steps", "6", *common)) == 0
    for steps in ("4", "6"):
        assert train.main(argv(run, halves, "--max_steps", steps, *common)) == 0
    assert losses(halves) == losses(straight) and max(losses(straight)) == 6
    ours, theirs = (checkpoint.read_full(path / "checkpoint-6", "model") for path in (halves, straight))
    assert ours.keys() == theirs.keys() >= {"projector.second.0.weight"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, shard", [((), "none"), (FULL, "full"), ((), "full")], ids=["adapter", "full fine-tune", "sharded adapter"]
)
def test_two_ranks_have_the_losses_of_one(run, tmp_path, mode, shard):
    """Every other sample has no video, so that a rank without one waits for the other's projectors."""
    records = json.loads((run / "train.json").read_text())
    for record in records[::2]:
        del record["video"]
        record["conversations"][0]["value"] = "what?"
    (tmp_path / "half.json").write_text(json.dumps(records))
    common = "--data_path", str(tmp_path / "half.json"), "--max_steps", "4", "--lr_scheduler_type", "constant"
    assert train.main(argv(run, tmp_path / "one", *common, *mode)) == 0
    more = "--per_device_train_batch_size", "1", *mode, "--shard", shard
    finished = start(["-m", "fastvid.train"], argv(run, tmp_path / "two", *common, *more), ranks=2)
    assert finished.returncode == 0, finished.stderr
    found, expected = losses(tmp_path / "two"), losses(tmp_path / "one")
    assert found.keys() == expected.keys() and len(found) == 4
    assert all(found[step] == pytest.approx(expected[step], rel=1e-5) for step in expected)


@pytest.mark.slow
def test_a_run_on_other_features_of_the_second_tower_is_not_gone_on_with(run, tmp_path):
    assert train.main(argv(run, tmp_path / "out", "--max_steps", "2", "--save_steps", "1")) == 0
    shutil.copytree(run / "feats_2", tmp_path / "other")
    for path in (tmp_path / "other").iterdir():
        features_RC, header = load_features(path)
        save_features(path, features_RC + 1, header)
    moved = shutil.copytree(run / "feats_2", tmp_path / "moved")
    assert train.main(argv(run, tmp_path / "out", "--max_steps", "3", "--video_folder_2", str(moved))) == 0
    with pytest.raises(
        ValueError, match=r"the features of clip0\S* in --video_folder \S+, or in --video_folder_2 \S+other"
    ):
        train.main(argv(run, tmp_path / "out", "--max_steps", "4", "--video_folder_2", str(tmp_path / "other")))


@pytest.mark.slow
def test_another_tower_in_the_second_folder_is_told(run, tmp_path, caplog, monkeypatch):
    second = shutil.copytree(run / "feats_2", tmp_path / "second")
    header = {"tower": "other", "tower_revision": "sha256:other", "num_frames": 4}
    save_features(second / "clip5.safetensors", torch.zeros(3, SECOND_CHANNELS), header)
    given = argv(run, tmp_path / "out", "--num_train_epochs", "1", "--video_folder_2", str(second))
    assert train.main([*given, "--dry_run", "True"]) == 0
    assert f"features of 2 vision towers: {SAMPLES - 1} of video-tower (sha256:video-tower…), 1 of other" in caplog.text
    monkeypatch.setattr(SampleSet, "HEADERS", 1)
    assert train.main(given) == 0
    assert "its features are of the tower other (sha256:other…), not of video-tower" in caplog.text


@pytest.mark.slow
def test_a_benchmark_is_answered_with_both(made, asked, tmp_path):
    (tmp_path / "ask.json").write_text(
        json.dumps([{"id": str(i), "video": f"clip{i}", "question": "what is it?", "answer": "a cat"} for i in (0, 1)])
    )
    given = ["--task", "match", "--annotations", str(tmp_path / "ask.json"), "--output", str(tmp_path / "out")]
    given += ["--model_name_or_path", str(made / "model"), "--projector", str(made / "out"), "--max_new_tokens", "5"]
    given += ["--video", str(made / "feats"), "--video_2", str(made / "feats_2")]
    assert evaluate.main(given) == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    for line in lines:
        features = asked.features(made / "feats" / f"{line['video']}.safetensors")
        assert line["prediction"] == asked.ask_features(features, "what is it?")
    assert len({line["features"] for line in lines}) == 2


@pytest.mark.slow
def test_validate_counts_rows_of_both_and_tells_the_folder(run, tmp_path, capsys):
    second = shutil.copytree(run / "feats_2", tmp_path / "second")
    given = f"--data_path {run}/train.json --video_folder {run}/feats --video_folder_2 {second}".split()
    given += ["--model_name_or_path", str(run / "model"), "--mm_use_vid_start_end"]
    assert validate.main(given) == 0
    told = capsys.readouterr().out
    assert "nothing wrong" in told and f"8 × {CHANNELS}" in told and f"4 × {SECOND_CHANNELS}" in told
    assert validate.main([*given, "--num_video_tokens", "12"]) == 1
    assert "video 'clip0.safetensors' has 8 and 3 rows instead of 12; leave" in capsys.readouterr().out
    (second / "clip2.safetensors").unlink()
    save_features(second / "clip4.safetensors", torch.zeros(3, SECOND_CHANNELS + 1), {})
    assert validate.main(given) == 1
    told = capsys.readouterr().out
    assert f"video 'clip2.safetensors' has no features in {second}" in told
    assert f"{second / 'clip4.safetensors'} is 3 × 7 instead of any number × 6" in told


@pytest.mark.slow
def test_inspect_shows_what_training_makes(run, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert inspection.main(argv(run, tmp_path / "out", "--index", "1", "--html", str(page))) == 0
    told = capsys.readouterr().out
    assert "<vid_start><vid_patch>×12<vid_end>" in told and "warning" not in told
    assert page.read_text().count("<h2>clip1.safetensors") == 2
    assert "image-tower" in page.read_text() and "video-tower" in page.read_text()


# --- what is refused


@pytest.mark.slow
def test_training_refuses_half_of_it(run, made, tmp_path):
    second = shutil.copytree(run / "feats_2", tmp_path / "second")
    (second / "clip5.safetensors").unlink()
    out = tmp_path / "out"
    with pytest.raises(ValueError, match=rf"video 'clip5.safetensors' has no features in {second}; extract them"):
        train.main(argv(run, out, "--video_folder_2", str(second)))
    save_features(second / "clip5.safetensors", torch.zeros(3, SECOND_CHANNELS), {})
    assert train.main(argv(run, out, "--video_folder_2", str(second), "--dry_run", "True")) == 0

    with pytest.raises(
        ValueError, match=r"--video_folder_2 .*: the reference has one vision tower; leave it out, or --par"
    ):
        train.main(argv(run, out, "--parity", "reference"))
    with pytest.raises(ValueError, match="--video_folder_2 .*: give the first tower's features with --video_folder"):
        validate.main(["--data_path", str(run / "train.json"), "--video_folder_2", str(run / "feats_2")])
    # A start of two towers takes features of two.
    with pytest.raises(
        ValueError, match=f"of {CHANNELS} and {SECOND_CHANNELS} channels: give the second one's features"
    ):
        train.main(flags(run, out, "--pretrain_mm_mlp_adapter", str(made / "out")))
    assert train.main(argv(run, out, "--pretrain_mm_mlp_adapter", str(made / "out"), "--dry_run", "True")) == 0


@pytest.mark.slow
def test_a_new_projector_that_is_not_trained_is_refused(run, tmp_path):
    frozen = argv(run, tmp_path / "out", "--max_steps", "1", "--freeze_mm_mlp_adapter", "True")
    with pytest.raises(ValueError, match="holds no projector of a second vision tower, and none is trained: leave"):
        train.main(frozen)
    assert train.main(argv(run, tmp_path / "out", "--max_steps", "1")) == 0
    given = "--pretrain_mm_mlp_adapter", str(tmp_path / "out"), "--output_dir", str(tmp_path / "next")
    assert train.main([*frozen, *given]) == 0


@pytest.mark.slow
def test_chat_needs_both_or_says_so(run, made, asked, tmp_path):
    base, clip = str(made / "model"), made / "feats" / "clip0.safetensors"
    alone = Chat(model_name_or_path=base, projector=str(made / "out"), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"clip0.safetensors holds one vision tower's features, .* with --video_2"):
        alone.features(clip)
    lone = shutil.copytree(made / "feats_2", tmp_path / "lone")
    (lone / "clip0.safetensors").unlink()
    lacking = Chat(model_name_or_path=base, projector=str(made / "out"), video_2=str(lone))
    with pytest.raises(ValueError, match=rf"video 'clip0.safetensors' has no features in {lone}"):
        lacking.features(clip)
    lacking = Chat(model_name_or_path=base, projector=str(made / "out"), video_2=str(lone))
    save_features(lone / "clip0.safetensors", torch.zeros(3, SECOND_CHANNELS), {"tower_revision": "sha256:other"})
    with pytest.raises(
        ValueError, match=r"lone/clip0.safetensors was made by another tower .* extract it with that one"
    ):
        lacking.features(clip)
    with pytest.raises(ValueError, match=r"features are \[8, 10\], the projector takes \[rows, 10\] and \[rows, 6\]"):
        asked.ask_features(load_features(clip)[0], "what?")
    with pytest.raises(
        ValueError, match=r"--vision_tower_2 some/tower: \S+ was trained with one vision tower; leave it out"
    ):
        Chat(model_name_or_path=base, vision_tower_2="some/tower")
    Chat(model_name_or_path=base)
    given = f"--model_name_or_path {base} --projector {made}/out --video {clip} --video_2 {made}/feats_2"
    assert chat.main([*given.split(), "--max_new_tokens", "2", "--question", "what?"]) == 0


@pytest.mark.slow
def test_a_format_of_one_tower_is_refused(made, tmp_path):
    given = ["--checkpoint", str(made / "out"), "--output", str(tmp_path / "hf"), "--format"]
    with pytest.raises(ValueError, match="has one vision tower, this model two: export it with --format llama"):
        export.main([*given, "llava"])


@pytest.mark.slow
def test_a_projector_file_lacks_half_of_the_second(made, tmp_path):
    from safetensors.torch import save_file

    state = load_file(made / "out" / "mm_projector.safetensors")
    del state["model.mm_projector_2.2.bias"]
    save_file(state, tmp_path / "half.safetensors")
    with pytest.raises(ValueError, match=r"half.safetensors lacks model.mm_projector_2.2.bias: it is not a whole"):
        Chat(model_name_or_path=str(made / "model"), projector=str(tmp_path / "half.safetensors"))
