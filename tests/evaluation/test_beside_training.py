"""Benchmarks of a model in training: its answers are those of its checkpoint, whoever shares the work."""

import json
import os
import shutil
import signal
from dataclasses import replace
from typing import Any

import pytest
import torch
from evaluation_run import write_evaluation
from training_run import config_of, flags, start

from fastvid import train
from fastvid.config import ChatConfig, ExportConfig
from fastvid.dist import parallel
from fastvid.evaluate import main
from fastvid.evaluation import beside_training, predict
from fastvid.evaluation.predict import answered
from fastvid.features.file import save_features
from fastvid.inference.chat import Chat
from fastvid.inference.live import LiveModel
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
            folder = tmp_path / "eval" / name / f"step-{line['step']}"
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
            one, two = (tmp_path / ranks / "eval" / name / f"step-{step}" for ranks in ("one", "two"))
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
    kept = predictions(tmp_path / "eval" / "mc_mc" / "step-2")
    assert len(kept) == len(answers)
    assert train.main(flags(run, tmp_path, *words)) == 0
    assert len(answers) == 24 and len(set(answers)) == 12  # none twice of one step
    assert kept.items() <= predictions(tmp_path / "eval" / "mc_mc" / "step-2").items()
    assert [line["step"] for line in lines_of(tmp_path)] == [2, 4]


def test_predictions_of_steps_that_are_made_anew_are_dropped(run, tmp_path):
    """What was killed after its last checkpoint begins again there; the weights of its later steps may be others."""
    task = beside_training.EvalTask("mc_mc", "mc", "", "")
    for step in (2, 10, 12):
        beside_training.step_folder(tmp_path, task, step).mkdir(parents=True)
    (tmp_path / "eval" / "mc_mc" / "step-best").mkdir()
    beside_training.drop_later(tmp_path, [task], 10)
    assert {file.name for file in (tmp_path / "eval" / "mc_mc").iterdir()} == {"step-2", "step-10", "step-best"}


def test_a_judge_may_grade_what_training_left(run, tmp_path, capsys):
    assert train.main(flags(run, tmp_path, *asking(run))) == 0
    assert main(["--output", str(tmp_path / "eval" / "vcg_generic_qa" / "step-4")]) == 0
    assert "--judge and --judge_model have them judged" in capsys.readouterr().out
    assert main(["--output", str(tmp_path / "eval" / "mc_mc" / "step-4")]) == 0


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
        "--eval_tasks mc={run}/mc.json --video_folder_2 {run}/feats",
        "a run of two vision towers",
        "--eval_tasks mc={run}/mc.json",
    ),
]


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
