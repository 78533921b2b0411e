"""First stage: whose answers are written, what a missing video costs, and how a run goes on."""

import errno
import fcntl
import json
import os
import re
import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from evaluation_run import settings, write_evaluation

from fastvid.config import EvaluateConfig
from fastvid.data.conversation import EncodedSample
from fastvid.data.packing import pack
from fastvid.evaluation.lines import Lines
from fastvid.evaluation.predict import _fingerprint, answered, predict, read_settings, write_upstream
from fastvid.evaluation.tasks import Sample
from fastvid.evaluation.videos import Videos
from fastvid.features.file import load_features, save_features
from fastvid.inference import likelihood
from fastvid.inference.chat import Chat
from fastvid.inference.likelihood import option_likelihoods, with_options


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_evaluation(tmp_path_factory.mktemp("evaluation"))


@pytest.fixture(scope="module")
def chat(run):
    chat = Chat(model_name_or_path=str(run / "model"), max_new_tokens=9, device="cpu")
    yield chat
    chat.close()


@pytest.fixture
def output(tmp_path):
    return tmp_path


def config(run, output, task="vcg", **changes):
    return EvaluateConfig(**{**settings(run, output, task), **changes})


def os_error(number):
    raise OSError(number, os.strerror(number))


def features(run, name):
    return load_features(run / "feats" / f"{name}.safetensors")[0]


def test_answers_are_chats_own(run, chat, output):
    assert not predict(chat, config(run, output), 0, 1)  # one video is missing
    found = answered(output)
    assert len(found) == 6
    for name, line in found.items():
        known = features(run, line["video"])
        texts = line["question"] if isinstance(line["question"], list) else [line["question"]]
        expected = [chat.ask_features(known, text) for text in texts]
        assert (line["prediction"] if name.startswith("consistency") else [line["prediction"]]) == expected
    failed = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    (failed,) = [line for line in failed if "error" in line]
    assert failed["id"] == "generic/3" and failed["error"].startswith("clip99 is none of the files of")
    generic = json.loads((output / "upstream" / "generic.json").read_text())
    assert [record["video_name"] for record in generic] == ["clip0", "clip1", "clip0", "clip2"]
    assert generic[1]["pred"] == found["generic/1"]["prediction"]
    told = read_settings(output)
    assert (told["samples"], told["task"], told["max_new_tokens"]) == (7, "vcg", 9)


@pytest.mark.parametrize("question_order", ["reference", "video_first"])
def test_likelihoods_are_those_of_each_text_alone(run, chat, output, question_order):
    asked = Chat(replace(chat.config, question_order=question_order))
    try:
        predict(asked, config(run, output, "mc"), 0, 1)
        found = answered(output)
        assert sorted(found) == [f"mc/{i}" for i in range(5)]
        for line in found.values():
            known = features(run, "sub/star_1_5" if line["video"] == "star.mp4" else line["video"][:-4])
            for option, (value, tokens) in zip(line["options"], line["likelihoods"], strict=True):
                prompt = asked.prompt(known, line["question"])
                ids = asked.prompt(known, line["question"], answer=option)
                assert ids[: len(prompt)] == prompt and ids[-1] == asked.tokenizer.eos
                assert asked.tokenizer.decode(ids[len(prompt) : -1]).strip() == option
                batch = pack([(EncodedSample("", ids), [known])], asked.tokenizer.tokens, known.shape[1])
                with torch.no_grad():
                    logs = asked.model.logits(asked.model.hidden(batch)).log_softmax(-1)
                expected = sum(logs[i - 1, ids[i]].item() for i in range(len(prompt), len(ids)))
                assert value == pytest.approx(expected, abs=1e-4) and tokens == len(ids) - len(prompt)
    finally:
        asked.close()
    errors = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["error"].split(" below")[0] for line in errors if "error" in line] == [
        "same.mp4 is the name of 2 videos"
    ]


@pytest.mark.parametrize("question_order", ["reference", "video_first"])
def test_a_video_is_computed_once_for_all_its_options(run, chat, output, monkeypatch, question_order):
    """With the video first; else each question's rows stand before it. The numbers are those of each question alone."""
    asked = Chat(replace(chat.config, question_order=question_order))
    known, options = features(run, "clip0"), ["a cat", "red house near a cat", "why"]
    questions = [with_options(asked, "clip0", known, f"what {word}?", options) for word in ("is it", "cat", "so fast")]
    alone = [option_likelihoods(asked, known, [each])[0] for each in questions]
    videos = []
    before = likelihood.pack
    monkeypatch.setattr(likelihood, "pack", lambda *rest, **more: videos.append(before(*rest, **more)) or videos[-1])
    together = option_likelihoods(asked, known, questions)
    assert [[(pytest.approx(value, abs=1e-4), tokens) for value, tokens in each] for each in alone] == together
    assert len(videos) == 1 and len(videos[0].features) == (1 if question_order == "video_first" else 3) * len(known)
    few = option_likelihoods(asked, known, questions, most_rows=len(known) + 1)
    assert len(videos) == 4 and [[pytest.approx(x, abs=1e-4) for x in each] for each in few] == together
    asked.close()


def test_options_are_scored_from_one_place_on():
    """Of a tokenizer that joins one option's first letter to the prompt's last: else the others leave that one out."""
    texts = {None: [1, 2, 3], "x": [1, 2, 4, 5], "y": [1, 2, 3, 6, 7]}
    decoder = SimpleNamespace(context=9)
    chat: Any = SimpleNamespace(
        prompt=lambda features_RC, question, answer=None: texts[answer], model_config=SimpleNamespace(decoder=decoder)
    )
    samples = with_options(chat, "v", torch.zeros(1, 1), "q", ["x", "y"])
    assert [each.supervised for each in samples] == [[(2, 4)], [(2, 5)]]


def test_features_of_another_tower_do_not_join(run, chat, output):
    """Nor in a later run; predictions of features that tell no tower do."""
    records = [{"video": f"made{i}", "question": "why?", "answer": "a"} for i in range(3)]
    (run / "made.json").write_text(json.dumps(records))
    for i, header in enumerate(({"tower_revision": "sha256:aa"}, {"tower_revision": "sha256:bb"}, {})):
        save_features(run / "feats" / f"made{i}.safetensors", features(run, "clip0"), {"tower": "t", **header})
    asked = config(run, output, "match", annotations=str(run / "made.json"))
    for _ in range(2):
        assert not predict(chat, asked, 0, 1)
        assert {name: line.get("tower") for name, line in answered(output).items()} == {
            "made/0": "sha256:aa",
            "made/2": None,
        }
    assert "was made by another tower (sha256:bb)" in (output / "predictions.jsonl").read_text()
    save_features(run / "feats" / "made1.safetensors", features(run, "clip0"), {"tower_revision": "sha256:aa"})
    assert predict(chat, asked, 0, 1)  # extracted with that one, as the message tells


def test_nobody_is_answered_with_a_namesakes_frames(run, chat, output):
    """A video of that name in another folder is another video, and two names in folders are not one file."""
    asked = ("sub/star_1_5", "other/star_1_5", "p/clip1", "q/clip1.mp4", "p/clip2", "clip3", "p/clip3")
    records = [{"video": name, "question": "why?", "answer": "a"} for name in asked]
    (run / "folders.json").write_text(json.dumps(records))
    settings = config(run, output, "match", annotations=str(run / "folders.json"))
    assert not predict(chat, settings, 0, 1)
    assert {line["video"] for line in answered(output).values()} == {"sub/star_1_5", "p/clip2", "clip3"}
    told = (output / "predictions.jsonl").read_text()
    assert "other/star_1_5 is none of the files of" in told
    assert "p/clip1 and q/clip1 are several videos, of which " in told and "move it to a folder of that name" in told
    (run / "feats" / "p").mkdir()
    (run / "feats" / "clip1.safetensors").rename(run / "feats" / "p" / "clip1.safetensors")
    try:
        predict(chat, settings, 0, 1)
        assert "p/clip1" in {line["video"] for line in answered(output).values()}
    finally:
        (run / "feats" / "p" / "clip1.safetensors").rename(run / "feats" / "clip1.safetensors")


@pytest.mark.parametrize(
    "missing, told", [(3, "gone2 .*[)]$"), (5, "; and 2 more reasons, all in .*/predictions.jsonl$")]
)
def test_of_many_reasons_some_are_told(run, chat, output, caplog, missing, told):
    path = output / "short.json"
    asked = [{"video": f"gone{number}", "question": "why?", "answer": "a"} for number in range(missing)]
    path.write_text(json.dumps([*asked, {**asked[0], "video": "clip1"}]))
    assert not predict(chat, config(run, output / "new", "match", annotations=str(path)), 0, 1)
    assert re.search(f"no answer to {missing} of {missing + 1} samples: .*gone0.*{told}", caplog.messages[-1])


def test_a_part_is_of_one_video(run):
    sample = Sample("1", "y/sub/star.mp4", ("q",), "a", "match", part=(1, 5))
    assert Videos(run / "feats", [sample.video]).find(sample).name == "star_1_5.safetensors"
    with pytest.raises(ValueError, match="are several videos"):
        Videos(run / "feats", [sample.video, "z/sub/star.mp4"]).find(sample)
    with pytest.raises(ValueError, match="is none of the files"):
        Videos(run / "feats", ["z/star.mp4"]).find(replace(sample, video="z/star.mp4"))


def test_a_part_of_a_video_is_a_file_of_its_own(run, chat, output):
    record = {"video": "clip1.mp4", "question": "when?", "candidates": ["a", "b"], "answer": "a", "start": 1, "end": 5}
    parts = run / "parts.json"
    parts.write_text(json.dumps([record]))
    predict(chat, config(run, output, "mc", annotations=str(parts)), 0, 1)
    errors = (output / "predictions.jsonl").read_text()
    assert "clip1_1_5 is none of the files of" in errors and "seconds 1 to 5 of clip1.mp4; cut that file" in errors


def test_a_run_goes_on_behind_a_torn_line(run, chat, output):
    predict(chat, config(run, output), 0, 1)
    whole, path = answered(output), output / "predictions.jsonl"
    lines = [line for line in path.read_text().splitlines(keepends=True) if "error" not in line]
    kept = lines[:2]
    path.write_text("".join(kept) + lines[2][:20])
    assert len(answered(output)) == 2
    predict(chat, config(run, output), 0, 1)
    assert answered(output) == whole
    assert path.read_text().startswith("".join(kept))


def test_ranks_share_and_one_goes_on_for_others(run, chat, output):
    predict(chat, config(run, output), 0, 2)
    some = answered(output)
    assert 0 < len(some) < 6 and {line["video"] for line in some.values()} == {"clip0", "clip2"}
    predict(chat, config(run, output), 1, 2)
    assert len(answered(output)) == 6
    before = (output / "predictions.0.jsonl").read_bytes(), (output / "predictions.1.jsonl").read_bytes()
    predict(chat, config(run, output), 0, 1)  # alone: nothing but what failed is tried
    after = (output / "predictions.0.jsonl").read_bytes(), (output / "predictions.1.jsonl").read_bytes()
    assert before == after
    assert len((output / "predictions.jsonl").read_text().splitlines()) == 1


def test_the_last_of_several_ranks_writes_all_for_upstream(tmp_path):
    """Of two that end together one may have read before the other's last line was there, and write after it."""
    sample = Sample("1", "v", ("q",), "a", "match", record={"q": "q"})
    with Lines(tmp_path / "predictions.0.jsonl") as lines, open(tmp_path / "settings.json", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        writer = threading.Thread(target=write_upstream, args=("match", [sample], tmp_path))
        writer.start()
        writer.join(0.5)
        told = {"id": "1", "video": "v", "kind": "match", "group": "", "question": "q", "answer": "a"}
        lines.append(told | {"prediction": "p"})
        fcntl.flock(other, fcntl.LOCK_UN)
        writer.join()
    assert json.loads((tmp_path / "upstream" / "match.json").read_text()) == [{"q": "q", "pred": "p"}]


@pytest.mark.slow
def test_another_pooling_is_another_setting(run, chat, output, monkeypatch):
    """The recipe's is not written, so that folders of before there were others go on."""
    predict(chat, config(run, output), 0, 1)
    assert "pooling" not in json.loads((output / "settings.json").read_text())
    monkeypatch.setattr(chat, "config", replace(chat.config, pooling="grid:2x2x2"))
    with pytest.raises(ValueError, match="of other settings .pooling None there, grid:2x2x2 now"):
        predict(chat, config(run, output), 0, 1)


def test_other_settings_want_another_folder(run, chat, output):
    predict(chat, config(run, output), 0, 1)
    with pytest.raises(
        ValueError, match="predictions of other settings .task vcg there, mc now.*give another --output"
    ):
        predict(chat, config(run, output, "mc"), 0, 1)
    (run / "another").mkdir()
    predict(chat, config(run, run / "another", "mc"), 0, 1)
    assert len(answered(run / "another")) == 5


@pytest.mark.parametrize("links", [True, False])
def test_of_two_that_begin_together_one_gives_the_settings(run, chat, output, monkeypatch, links):
    """The other must not put its own beside the answers of the first."""
    asked, link = config(run, output), os.link

    def late(*paths):
        monkeypatch.setattr(os, "link", link)
        predict(chat, asked, 0, 1)
        os.link(*paths)

    if not links:
        monkeypatch.setattr(os, "link", lambda *_: os_error(errno.EPERM))
        assert not predict(chat, asked, 0, 1)
    else:
        monkeypatch.setattr(os, "link", late)
        with pytest.raises(ValueError, match="task vcg there, mc now"):
            predict(chat, config(run, output, "mc"), 0, 1)
    assert read_settings(output)["task"] == "vcg" and len(answered(output)) == 6
    assert not [name for name in os.listdir(output) if name.startswith(".")]


def test_a_prompt_that_is_too_long_costs_its_sample(run, chat, output):
    long = run / "long.json"
    long.write_text(json.dumps([{"video": "clip0", "question": q, "answer": "a"} for q in ("cat " * 200, "why?")]))
    predict(chat, config(run, output, "match", annotations=str(long)), 0, 1)
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [("error" in line, line["id"]) for line in lines] == [(True, "long/0"), (False, "long/1")]
    assert "shorten the question" in lines[0]["error"]


def test_a_damaged_line_is_told(run, chat, output):
    predict(chat, config(run, output), 0, 1)
    path = output / "predictions.jsonl"
    path.write_text("{broken\n" + path.read_text())
    with pytest.raises(ValueError, match="predictions.jsonl: line 1 is damaged .* remove it"):
        predict(chat, config(run, output), 0, 1)
    path.write_text(path.read_text().partition("\n")[2])
    assert len(answered(output)) == 6


@pytest.mark.parametrize(
    "changed",
    [
        {"id": 5},
        {"video": None},
        {"prediction": 7},
        {"prediction": ["a", "b"]},
        {"right": 3},
        {"likelihoods": [[-1.0, 1], [-2.0, 1]]},
        {"likelihoods": [[float("nan"), 1], [-2.0, 1], [-3.0, 1]]},
        {"likelihoods": [[-1.0, 0], [-2.0, 1], [-3.0, 1]]},
        {"options": "abc"},
        {"group": ...},
    ],
    ids=str,
)
def test_a_line_that_another_program_wrote_is_told(tmp_path, changed):
    line = {"id": "x/0", "video": "v", "kind": "choice", "group": "", "question": "q", "answer": "a", "prediction": "b"}
    line |= {"options": ["a", "b", "c"], "right": 0, "likelihoods": [[-1.0, 1], [-2.0, 1], [-3.0, 1]]}
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(line) + "\n")
    assert answered(tmp_path) == {"x/0": line}
    line = {name: value for name, value in (line | changed).items() if value is not ...}
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    with pytest.raises(
        ValueError, match="predictions.jsonl: line 2 is damaged .its|predictions.jsonl: line 2 .*no 'gr"
    ):
        answered(tmp_path)


def test_settings_that_another_program_wrote_are_told(run, chat, output):
    (output / "settings.json").write_text('{"task": "mc", "samples": "6"}')
    with pytest.raises(ValueError, match="settings.json is none that fastvid wrote; give another --output"):
        read_settings(output)
    (output / "other").mkdir()
    predict(chat, config(run, output / "other", "mc"), 0, 1)
    assert read_settings(output / "other")["samples"] == 6


def test_answers_to_a_file_of_another_name_do_not_join(run, chat, output):
    """The ids of samples are made of it, or what they are judged for."""
    one, other = (run / f"{name}.json" for name in ("generic_one", "temporal_one"))
    one.write_text(json.dumps([{"video_name": "clip0", "Q": "why?", "A": "a"}]))
    asked = config(run, output, annotations=str(one))
    assert predict(chat, asked, 0, 1)
    one.rename(other)
    with pytest.raises(ValueError, match="holds an answer to generic/0, .* give it that name again, or give another"):
        predict(chat, replace(asked, annotations=str(other)), 0, 1)
    other.rename(one)
    assert predict(chat, asked, 0, 1) and len(answered(output)) == 1


def test_weights_are_known_by_more_than_their_ends(tmp_path):
    path = tmp_path / "model.safetensors"
    content = bytearray(8 << 20)
    path.write_bytes(content)
    before = _fingerprint([path])
    content[3 << 20 : 4 << 20] = b"x" * (1 << 20)
    path.write_bytes(content)
    assert _fingerprint([path]) != before


def test_a_model_that_tells_nothing_has_no_score(run, chat, output, monkeypatch):
    """Of a value that is not finite some token, and some option, would be the likeliest."""
    logits = chat.model.logits
    monkeypatch.setattr(chat.model, "logits", lambda h_LD: logits(h_LD) * torch.nan)
    for task, why in (("mc", "the likelihoods of its options are not finite"), ("vcg", "there is no next token")):
        (output / task).mkdir()
        assert not predict(chat, config(run, output / task, task), 0, 1)
        assert not answered(output / task)
        assert why in (output / task / "predictions.jsonl").read_text()
    monkeypatch.undo()
    predict(chat, config(run, output / "vcg"), 0, 1)
    assert len(answered(output / "vcg")) == 6


def test_two_writers_are_refused(run, chat, output):
    refused = "is written by another process .* wait until that has ended"
    with Lines(output / "predictions.jsonl"), pytest.raises(ValueError, match=refused):
        predict(chat, config(run, output), 0, 1)
    predict(chat, config(run, output), 0, 1)
    assert len(answered(output)) == 6


def test_a_name_that_two_videos_have_is_clear_once_the_other_is_moved(run, chat, output):
    record = {"video": "same.mp4", "question": "q", "answer": "a"}
    (run / "same.json").write_text(json.dumps([record]))
    asked = config(run, output, "match", annotations=str(run / "same.json"))
    predict(chat, asked, 0, 1)
    assert "is the name of 2 videos" in (output / "predictions.jsonl").read_text()
    (run / "feats" / "b" / "same.safetensors").rename(output / "same.safetensors")
    try:
        assert predict(chat, asked, 0, 1)
    finally:
        (output / "same.safetensors").rename(run / "feats" / "b" / "same.safetensors")
