"""Benchmarks of a model in training: its answers are those of its checkpoint, whoever shares the work."""

import contextlib
import json
import os
import shutil
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from evaluation_run import write_evaluation
from training_run import config_of, flags, start, write_run, write_second

from fastvid import train
from fastvid.config import ChatConfig, ExportConfig
from fastvid.dist import parallel
from fastvid.evaluate import main
from fastvid.evaluation import beside_training, predict
from fastvid.evaluation.predict import answered
from fastvid.features.file import load_features, save_features
from fastvid.inference.chat import Chat
from fastvid.inference.live import LiveModel
from fastvid.training import recovery
from fastvid.training.metrics import read_metrics
from fastvid.weights import export

CPU = parallel.World(0, 1, 0, torch.device("cpu"), False)
MODES = {
    "adapter": [],
    "everything": ["--tune_mm_mlp_adapter", "False"],
    "average": ["--ema_decay", "0.5"],
    "lora": ["--lora_enable", "True", "--lora_r", "2", "--lora_alpha", "4", "--lora_dropout", "0.5"],
    "recomputed": ["--recompute", "full"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's inputs, and benchmarks whose videos all have features."""
    run = write_evaluation(tmp_path_factory.mktemp("run"))
    choices = json.loads((run / "mc.json").read_text())[:5]
    (run / "mc.json").write_text(json.dumps(choices))
    short = [{"video": f"clip{i}", "question": "what is it?", "answer": "a cat"} for i in range(4)]
    (run / "short.json").write_text(json.dumps(short))
    (run / "vcg" / "generic_qa.json").write_text(
        json.dumps([{"video_name": f"clip{i}", "Q": "what does the cat see?", "A": "a cat"} for i in range(3)])
    )
    return run


def asking(run, *more):
    """Flags of a run of 4 steps that asks at the second and the last."""
    files = {"mc": run / "mc.json", "match": run / "short.json", "vcg": run / "vcg" / "generic_qa.json"}
    tasks = [f"{task}={path}" for task, path in files.items()]
    steps = ["--max_steps", "4", "--eval_strategy", "steps", "--eval_steps", "2", "--save_steps", "2"]
    return ["--eval_tasks", *tasks, "--eval_max_new_tokens", "7", "--eval_kv_cache_gib", "0.01", *steps, *more]


def predictions(folder):
    return {name: (line["prediction"], line.get("likelihoods")) for name, line in answered(folder).items()}


def lines_of(output):
    return [line for line in read_metrics(output / "metrics.jsonl") if "eval_mc_mc/likelihood" in line]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_answers_are_those_of_the_checkpoint(run, tmp_path, mode):
    """Of its average, too, and beside a loss over a validation set."""
    more = [*MODES[mode], "--eval_data_path", str(run / "train.json")]
    assert train.main(flags(run, tmp_path, *asking(run, *more))) == 0
    told = lines_of(tmp_path)
    assert [line["step"] for line in told] == [2, 4] and all("eval_loss" in line for line in told)
    for line in told:
        checkpoint = tmp_path / f"checkpoint-{line['step']}"
        asked: dict[str, Any] = {"model_name_or_path": str(run / "model"), "projector": str(checkpoint)}
        if mode == "everything":
            export.export(ExportConfig(str(checkpoint), str(checkpoint.with_name("hf")), format="llama"))
            asked = {"model_name_or_path": str(checkpoint.with_name("hf"))}
        chat = Chat(ChatConfig(**asked, max_new_tokens=7, device="cpu"))
        for name, count in {"mc_mc": 5, "match_short": 4, "vcg_generic_qa": 3}.items():
            folder = tmp_path / "eval_tasks" / name / f"step-{line['step']}"
            found = answered(folder)
            assert line[f"eval_{name}/answered"] == len(found) == count
            for each in found.values():
                feature = "sub/star_1_5" if each["video"] == "star.mp4" else each["video"].removesuffix(".mp4")
                known = chat.features(run / "feats" / f"{feature}.safetensors")
                text = each["question"]
                if "options" in each:
                    lettered = (f"({letter}) {option}" for letter, option in zip("ABC", each["options"]))
                    text = "\n".join([text, *lettered, "Answer with the letter of the right option."])
                assert each["prediction"] == chat.ask_features(known, text)
            if name != "vcg_generic_qa":
                scores = json.loads((folder / "scores.json").read_text())["scores"]
                assert {f"eval_{name}/{key}": value["mean"] for key, value in scores.items()} == {
                    key: value
                    for key, value in line.items()
                    if key.startswith(f"eval_{name}/") and key[-8:] != "answered"
                }
        chat.close()
        shutil.rmtree(checkpoint.with_name("hf"), ignore_errors=True)


@pytest.mark.slow
def test_two_towers_answer_as_their_checkpoint(tmp_path):
    """Of a folder with sub-folders, and of one that lies elsewhere; one without the second tower's file is told."""
    run = write_run(tmp_path, max_position_embeddings=400)
    second = write_second(run)
    for folder in (run / "feats", second):
        (folder / "in").mkdir()
        shutil.copy(folder / "clip3.safetensors", folder / "in" / "clip77.safetensors")
    asked = [{"video": name, "question": "what is it?", "answer": "a cat"} for name in ("clip1", "in/clip77", "clip2")]
    (run / "short.json").write_text(json.dumps(asked))
    (run / "mc.json").write_text(json.dumps([{**each, "options": ["a cat", "why"]} for each in asked]))
    given = ["--video_folder_2", str(second), "--eval_tasks", f"match={run}/short.json", f"mc={run}/mc.json"]
    given += ["--eval_max_new_tokens", "7", "--eval_kv_cache_gib", "0.01", "--max_steps", "2", "--save_steps", "2"]
    given += ["--eval_strategy", "steps", "--eval_steps", "2"]
    shutil.copytree(second, run / "elsewhere")
    (run / "elsewhere" / "clip2.safetensors").unlink()
    lacking = config_of(run, run / "out", *given, "--eval_video_folder_2", str(run / "elsewhere"))
    with pytest.raises(ValueError, match="1 videos have no features .*clip2.*--eval_video_folder"):
        train.prepare(lacking, CPU)
    assert train.main(flags(run, run / "out", *given)) == 0
    both = {"video": str(run / "feats"), "video_2": str(second)}
    chat = Chat(
        ChatConfig(str(run / "model"), str(run / "out" / "checkpoint-2"), max_new_tokens=7, device="cpu", **both)
    )
    found = answered(run / "out" / "eval_tasks" / "match_short" / "step-2")
    assert len(found) == 3
    for each in found.values():
        known = chat.features(run / "feats" / f"{each['video']}.safetensors")
        assert each["prediction"] == chat.ask_features(known, each["question"])
    again = {"model_name_or_path": run / "model", "projector": run / "out" / "checkpoint-2", "output": run / "again"}
    again |= {**both, "task": "mc", "annotations": run / "mc.json", "max_new_tokens": 7, "device": "cpu"}
    assert main([word for name, value in again.items() for word in (f"--{name}", str(value))]) == 0
    of_training = predictions(run / "out" / "eval_tasks" / "mc_mc" / "step-2")
    assert of_training == predictions(run / "again") and len(of_training) == 3


QUANTISED = [
    "int8",
    "nf4",
    pytest.param("fp8", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_quantised_decoder_answers_as_it_is(run, tmp_path, dtype):
    """Not as `chat` would, whose decoder is not; the settings and scores tell so."""
    words = ["--eval_tasks", f"match={run / 'short.json'}", "--eval_max_new_tokens", "7", "--eval_kv_cache_gib", "0.01"]
    words += ["--max_steps", "2", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "2"]
    words += ["--frozen_dtype", dtype, *(["--bf16", "True"] if dtype == "fp8" else [])]
    assert train.main(flags(run, tmp_path, *words)) == 0
    folder = tmp_path / "eval_tasks" / "match_short" / "step-2"
    scores = json.loads((folder / "scores.json").read_text())
    assert predict.read_settings(folder)["frozen_dtype"] == scores["frozen_dtype"] == dtype
    assert len(answered(folder)) == 4
    if dtype == "fp8":
        return  # products of one row and of many may be rounded differently
    state = train.build(config_of(run, tmp_path, *words), CPU)
    recovery.resume(state)
    asked = ChatConfig(str(run / "model"), projector=str(tmp_path / "checkpoint-2"), max_new_tokens=7, device="cpu")
    with contextlib.closing(Chat(asked)) as chat:
        chat.model = state.model
        for each in answered(folder).values():
            known = chat.features(run / "feats" / f"{each['video']}.safetensors")
            assert each["prediction"] == chat.ask_features(known, each["question"])


ALIKE = {
    "everything": MODES["everything"],
    "noise, average": ["--neftune_noise_alpha", "5", *MODES["average"]],
    "bf16, lora": ["--bf16", "True", *MODES["lora"]],
    "shared, recomputed": ["--share_video", "True", "--question_order", "video_first", *MODES["recomputed"]],
}


def _told(output):
    """What a run's steps and validations have of figures that asking must not change."""
    kept = ("step", "loss", "grad_norm", "eval_loss")
    lines = ([(key, line[key]) for key in kept if key in line] for line in read_metrics(output / "metrics.jsonl"))
    return [line for line in lines if len(line) > 1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", ALIKE)
def test_training_is_bit_for_bit_as_without_questions(run, tmp_path, mode):
    more = [*ALIKE[mode], "--eval_data_path", str(run / "train.json"), "--max_steps", "3", "--eval_strategy", "steps"]
    more += ["--eval_steps", "1", "--save_steps", "3"]
    questions = ["--eval_tasks", f"mc={run / 'mc.json'}", "--eval_max_new_tokens", "5", "--eval_kv_cache_gib", "0.01"]
    for name, asked in (("without", []), ("with", questions)):
        assert train.main(flags(run, tmp_path / name, *more, *asked)) == 0
    assert _told(tmp_path / "with") == _told(tmp_path / "without") and len(_told(tmp_path / "with")) == 6
    assert len(lines_of(tmp_path / "with")) == 3


@pytest.mark.slow
def test_sharded_training_is_bit_for_bit_as_without_questions(run, tmp_path):
    more = ["--shard", "full", "--tune_mm_mlp_adapter", "False", "--per_device_train_batch_size", "1"]
    more += ["--gradient_accumulation_steps", "2", "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "1"]
    more += ["--eval_data_path", str(run / "train.json"), "--save_strategy", "no"]
    questions = ["--eval_tasks", f"mc={run / 'mc.json'}", "--eval_max_new_tokens", "5", "--eval_kv_cache_gib", "0.01"]
    for name, asked in (("without", []), ("with", questions)):
        done = start(["-m", "fastvid.train"], flags(run, tmp_path / name, *more, *asked), ranks=2)
        assert done.returncode == 0, done.stderr
    assert _told(tmp_path / "with") == _told(tmp_path / "without") and len(_told(tmp_path / "with")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("more", [["--shard", "full", "--tune_mm_mlp_adapter", "False"], ["--ema_decay", "0.5"]])
def test_ranks_share_the_work_and_training_goes_on_alike(run, tmp_path, more):
    """Also where the model is sharded, and after a resume, whose first call of the model may be this."""
    assert train.main(flags(run, tmp_path / "one", *asking(run, *more))) == 0
    batch = ["--per_device_train_batch_size", "1"]
    for steps in ("2", "4"):
        command = flags(run, tmp_path / "two", *asking(run, *more), *batch, "--max_steps", steps)
        done = start(["-m", "fastvid.train"], command, ranks=2)
        assert done.returncode == 0, done.stderr
    for name in ("mc_mc", "match_short", "vcg_generic_qa"):
        for step in (2, 4):
            one, two = (tmp_path / ranks / "eval_tasks" / name / f"step-{step}" for ranks in ("one", "two"))
            assert {file.name for file in two.glob("predictions*")} == {"predictions.0.jsonl", "predictions.1.jsonl"}
            assert predictions(one).keys() == predictions(two).keys()
            for key, (text, likelihoods) in predictions(one).items():
                again = predictions(two)[key]
                assert again[0] == text
                assert likelihoods is None or again[1] == [[pytest.approx(x, abs=1e-3), n] for x, n in likelihoods]
    one, two = (read_metrics(tmp_path / ranks / "metrics.jsonl") for ranks in ("one", "two"))
    assert [line["loss"] for line in two if "loss" in line] == pytest.approx(
        [line["loss"] for line in one if "loss" in line], rel=1e-4
    )


@pytest.mark.slow
def test_a_signal_ends_the_questions_and_the_next_run_goes_on(run, tmp_path, monkeypatch):
    words = asking(run, "--logging_steps", "1")
    before, answers = predict._line, []

    def line(sample, *others):
        answers.append(sample.id)
        if len(answers) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(sample, *others)

    monkeypatch.setattr(predict, "_line", line)
    assert train.main(flags(run, tmp_path, *words)) == 128 + signal.SIGTERM
    assert 3 <= len(answers) < 12 and not lines_of(tmp_path)
    kept = predictions(tmp_path / "eval_tasks" / "mc_mc" / "step-2")
    assert len(kept) == len(answers)
    assert train.main(flags(run, tmp_path, *words)) == 0
    assert len(answers) == 24 and len(set(answers)) == 12  # none twice of one step
    assert kept.items() <= predictions(tmp_path / "eval_tasks" / "mc_mc" / "step-2").items()
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("change", ["flag", "annotations"])
def test_a_step_of_other_settings_is_asked_anew(run, tmp_path, monkeypatch, caplog, change):
    """Such settings may change when a run goes on, also in the midst of a step's questions."""
    questions = shutil.copy(run / "mc.json", tmp_path / "mc.json")
    words = asking(run, "--max_steps", "2")
    words[1:4] = [f"mc={questions}"]
    with monkeypatch.context() as patch:
        before = predict._line

        def line(sample, *others):
            os.kill(os.getpid(), signal.SIGTERM)
            return before(sample, *others)

        patch.setattr(predict, "_line", line)
        assert train.main(flags(run, tmp_path / "out", *words)) == 128 + signal.SIGTERM
    folder = tmp_path / "out" / "eval_tasks" / "mc_mc" / "step-2"
    assert 0 < len(answered(folder)) < 5
    if change == "flag":
        words += ["--eval_max_new_tokens", "9"]
    else:
        questions.write_text(json.dumps(json.loads(questions.read_text())[:4]))
    assert train.main(flags(run, tmp_path / "out", *words)) == 0
    assert f"{folder}: its predictions are of other settings" in caplog.text and "are made anew" in caplog.text
    assert len(answered(folder)) == (5 if change == "flag" else 4)
    assert predict.read_settings(folder)["max_new_tokens"] == (9 if change == "flag" else 7)


@pytest.mark.slow
def test_what_the_run_reads_is_not_moved_away(run, tmp_path):
    """Nor what a user keeps under another name; with the files elsewhere it runs, as the message tells."""
    steps = ["--max_steps", "1", "--resume", "never"]
    given = ["--eval_tasks", f"match={run / 'short.json'}", "--eval_kv_cache_gib", "0.01", *steps]
    own = tmp_path / "eval" / "feats"
    shutil.copytree(run / "feats", own)
    shutil.copytree(run / "feats", tmp_path / "eval_tasks" / "feats")
    shutil.copy(run / "vcg" / "generic_qa.json", tmp_path / "eval_tasks")
    for more in (
        ["--eval_video_folder", str(tmp_path / "eval_tasks" / "feats")],
        ["--eval_tasks", f"vcg={tmp_path / 'eval_tasks' / 'generic_qa.json'}"],
    ):
        with pytest.raises(ValueError, match=f"{more[0]} .* would move aside or write over"):
            train.main(flags(run, tmp_path, *given, *more))
    assert train.main(flags(run, tmp_path, *given, "--eval_video_folder", str(own))) == 0
    assert own.is_dir() and (tmp_path / "previous-1" / "eval_tasks" / "feats").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout, said", [("replicated", "take up to"), ("full", "GiB for the gathered model and up to")]
)
def test_the_plan_tells_what_questions_take(run, tmp_path, monkeypatch, caplog, layout, said):
    monkeypatch.setattr(parallel, "choose_layout", lambda *_, **__: layout)
    with caplog.at_level("INFO", "fastvid"):
        train.prepare(config_of(run, tmp_path), CPU)
        assert "benchmarks take" not in caplog.text
        train.prepare(config_of(run, tmp_path, *asking(run)), CPU)
    assert "not counted: benchmarks take" in caplog.text
    assert f"{said} 0.01 GiB for keys and values (--eval_kv_cache_gib)" in caplog.text


@pytest.mark.slow
def test_no_answer_at_all_is_told_loudly(run, tmp_path, caplog):
    """By the names of training's flags, with which the answers fit."""
    small = flags(run, tmp_path, *asking(run, "--max_steps", "2"), "--eval_kv_cache_gib", "0.000001")
    assert train.main(small) == 0
    told = [record.message for record in caplog.records if record.levelname == "ERROR"]
    assert len(told) == 3 and "none of the 5 samples of mc_mc has an answer at step 2" in told[0]
    assert "raise --eval_kv_cache_gib, or lower --eval_max_new_tokens" in caplog.text
    assert " --kv_cache_gib" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_misfit_features_are_refused_before_anything_is_trained(run, tmp_path, skip):
    """Of other rows or channels; some of them may be, where the user says so."""
    more = ["--on_bad_sample", "skip"] if skip else []
    plain, header = load_features(run / "feats" / "clip0.safetensors")
    for values, made, said in (
        (torch.cat([plain, plain[:1]]), header, "has .* rows, and the features of training have"),
        (plain[:, :-1], header, "channels, the projector takes"),
    ):
        folder = tmp_path / str(values.shape)
        shutil.copytree(run / "feats", folder)
        files = sorted(folder.rglob("*.safetensors"))
        for file in files:
            save_features(file, values, made)
        config = config_of(run, tmp_path, *asking(run, *more), "--eval_video_folder", str(folder))
        with pytest.raises(ValueError, match=f"--eval_tasks mc=.*{said}.*--eval_video_folder"):
            train.prepare(config, CPU)
        for file in files[1:]:
            save_features(file, plain, header)
        if skip:
            train.prepare(config, CPU)
    train.prepare(config_of(run, tmp_path, *asking(run, *more), "--eval_video_folder", str(run / "feats")), CPU)


@pytest.mark.slow
def test_predictions_of_steps_that_are_made_anew_are_dropped(run, tmp_path):
    """What was killed after its last checkpoint begins again there; the weights of its later steps may be others."""
    task = beside_training.EvalTask("mc_mc", "mc", "", "")
    for step in (2, 10, 12):
        beside_training.step_folder(tmp_path, task, step).mkdir(parents=True)
    (tmp_path / "eval_tasks" / "mc_mc" / "step-best").mkdir()
    beside_training.drop_later(tmp_path, [task], 10)
    assert {file.name for file in (tmp_path / "eval_tasks" / "mc_mc").iterdir()} == {"step-2", "step-10", "step-best"}


@pytest.mark.slow
def test_a_judge_may_grade_what_training_left(run, tmp_path, capsys):
    assert train.main(flags(run, tmp_path, *asking(run))) == 0
    assert main(["--output", str(tmp_path / "eval_tasks" / "vcg_generic_qa" / "step-4")]) == 0
    assert "--judge and --judge_model have them judged" in capsys.readouterr().out
    assert main(["--output", str(tmp_path / "eval_tasks" / "mc_mc" / "step-4")]) == 0


@pytest.mark.slow
def test_features_of_other_rows_are_refused(run, tmp_path):
    state = train.build(config_of(run, tmp_path), CPU)
    chat = LiveModel(state.model, state.tokenizer, state.loader.samples.look_again(), ChatConfig(str(run / "model")))
    known = chat.features(run / "feats" / "clip0.safetensors")
    assert isinstance(known, torch.Tensor), "of one tower"
    save_features(tmp_path / "more.safetensors", torch.cat([known, known[:1]]), {})
    with pytest.raises(ValueError, match="the tower, the frames and the pooling of those"):
        chat.features(tmp_path / "more.safetensors")
    save_features(tmp_path / "more.safetensors", known, {})
    again = chat.features(tmp_path / "more.safetensors")
    assert isinstance(again, torch.Tensor) and torch.equal(again, known)


MISTAKES = [
    ("--eval_tasks {run}/mc.json", "give TASK=ANNOTATIONS", "--eval_tasks mc={run}/mc.json"),
    ("--eval_tasks mvbench={run}/mc.json", "tasks: vcg, ", "--eval_tasks mc={run}/mc.json"),
    ("--eval_tasks mc={run}/none.json", "does not exist", "--eval_tasks mc={run}/mc.json"),
    ("--eval_tasks mc={run}/mc.json mc={run}/b/mc.json", "would have the same name", "--eval_tasks mc={run}/mc.json"),
    (
        "--eval_tasks mc={run}/mc.json --eval_video_folder {run}/videos",
        "name the folder of their features with --eval_video_folder",
        "--eval_tasks mc={run}/mc.json --eval_video_folder {run}/feats",
    ),
    (
        "--eval_tasks match={run}/unknown.json",
        "1 videos have no features",
        "--eval_tasks match={run}/unknown.json --on_bad_sample skip",
    ),
    (
        "--eval_tasks mc={run}/mc.json --eval_video_folder_2 {run}/feats",
        "the run has one vision tower; leave the flag out",
        "--eval_tasks mc={run}/mc.json",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize("mistake, said, mended", MISTAKES)
def test_mistakes_are_told_before_anything_is_trained(run, tmp_path, mistake, said, mended):
    (run / "videos").mkdir(exist_ok=True)
    (run / "videos" / "clip0.mp4").write_bytes(b"video")
    (run / "unknown.json").write_text(
        json.dumps([{"video": name, "question": "q", "answer": "a"} for name in ("clip1", "clip77")])
    )
    with pytest.raises(ValueError, match=said):
        train.prepare(config_of(run, tmp_path, *mistake.format(run=run).split()), CPU)
    train.prepare(config_of(run, tmp_path, *mended.format(run=run).split()), CPU)


@pytest.mark.slow
def test_text_alone_needs_a_folder_for_them(run, tmp_path):
    (run / "text.json").write_text(
        json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}] * 4)
    )
    config = config_of(run, tmp_path, "--data_path", str(run / "text.json"), "--eval_tasks", f"mc={run / 'mc.json'}")
    config = replace(config, data_path=[str(run / "text.json")], video_folder=None)
    with pytest.raises(ValueError, match="name their folder with --eval_video_folder"):
        beside_training.eval_tasks(config)
    told = replace(config, eval_video_folder=str(run / "feats"))
    assert [task.name for task in beside_training.eval_tasks(told)] == ["mc_mc"]
