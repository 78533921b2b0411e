"""Reporters: what each is told, when a run goes on too, and what a missing or failing one costs.

Each package is the real one where it is installed (pip install fastvid[reporters]), without a network. A stand-in that
writes down its calls takes the place of one that is not.
"""

import importlib.util
import json
import sys
import types
from types import SimpleNamespace

import pytest

from fastvid.training import reporters
from fastvid.training.metrics import Metrics
from fastvid.training.reporters import Run, chosen, figures, open_reporters

FLAGS = {"learning_rate": 1e-3, "data_path": ["a.json"], "run_name": None, "bf16": True}
LINE = {"step": 7, "loss": 0.5, "eval_loss": 0.25, "grad_norm": float("nan"), "note": None}


def is_missing(package):
    return importlib.util.find_spec(package) is None


@pytest.fixture
def stand_in(monkeypatch):
    """Function that puts a module of these functions into a package's place; returns the list of their calls."""

    def install(name, **results):
        calls, module = [], types.ModuleType(name)
        for function, result in results.items():

            def called(*arguments, _function=function, _result=result, **options):
                calls.append((_function, arguments, options))
                return _result(*arguments, **options) if callable(_result) else _result

            setattr(module, function, called)
        monkeypatch.setitem(sys.modules, name, module)
        return calls

    return install


def run_of(folder, start_step=0):
    return Run(folder, FLAGS, "my run", None, start_step)


def test_figures_are_named_by_kind_and_finite():
    assert figures(LINE) == {"train/loss": 0.5, "eval/loss": 0.25}


@pytest.mark.parametrize(
    "names, expected",
    [
        (["none"], []),
        (["None"], []),
        ([], []),
        (["TensorBoard"], ["tensorboard"]),
        (["none", "tensorboard"], ["tensorboard"]),
        (["tensorboard", "tensorboard"], ["tensorboard"]),
    ],
)
def test_names(names, expected):
    assert chosen(names) == expected


def test_all_are_those_that_are_installed(stand_in, monkeypatch):
    stand_in("wandb")
    for package in ("mlflow", "trackio"):
        monkeypatch.setitem(sys.modules, package, None)
    assert chosen(["all"]) == ["tensorboard", "wandb"]


def test_a_name_that_means_nothing():
    with pytest.raises(ValueError, match="--report_to neptune: known are tensorboard, trackio, wandb, mlflow, all and"):
        chosen(["wandb", "neptune"])


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_named(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=f"--report_to {name}: .*pip install {name}"):
        chosen([name])


def test_tensorboard_shows_the_flags(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reporter = reporters.TensorBoard(run_of(tmp_path))
    reporter.log(7, figures(LINE))
    reporter.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["eval/loss", "train/loss"]
    text = events.Tensors("flags/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "my run" in text and "| learning_rate | 0.001 |" in text
    written = b"".join(path.read_bytes() for path in (tmp_path / "tensorboard").iterdir())
    assert b"_hparams_/session_start_info" in written


def test_trackio_stand_in(stand_in, tmp_path):
    calls = stand_in("trackio", init=None, log=None, finish=None)
    for start_step in (0, 4):
        reporter = open_reporters(["trackio"], run_of(tmp_path, start_step), pytest.fail)["trackio"]
        reporter.log(7, {"train/loss": 0.5})
        reporter.close()
    assert [name for name, *_ in calls] == ["init", "log", "finish"] * 2
    (_, _, first), (_, logged, step), _, (_, _, again), *_ = calls
    assert (first["project"], first["name"], first["resume"], again["resume"]) == (
        "fastvid",
        "my run",
        "never",
        "allow",
    )
    assert first["config"]["learning_rate"] == 1e-3 and "run_name" not in first["config"]
    assert logged == ({"train/loss": 0.5},) and step == {"step": 7}


def test_wandb_stand_in(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    told = []
    run = SimpleNamespace(
        id="abc",
        define_metric=lambda *a, **k: told.append(("define", a, k)),
        log=lambda values: told.append(values),
        finish=lambda: told.append("finish"),
    )
    calls = stand_in("wandb", init=run)
    for start_step in (0, 4):
        reporter = open_reporters(["wandb"], run_of(tmp_path, start_step), pytest.fail)["wandb"]
        reporter.log(7, {"train/loss": 0.5})
        reporter.close()
    assert [options["id"] for _, _, options in calls] == [None, "abc"], "a run that goes on is the same run"
    assert calls[0][2]["project"] == "theirs" and calls[0][2]["name"] == "my run"
    assert told[:3] == [("define", ("*",), {"step_metric": "step"}), {"train/loss": 0.5, "step": 7}, "finish"]


def test_mlflow_stand_in(stand_in, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    batches, ended, made = [], [], []
    client = SimpleNamespace(
        get_experiment_by_name=lambda name: None,
        create_experiment=lambda name, **k: made.append(name) or "1",
        create_run=lambda experiment, run_name: SimpleNamespace(info=SimpleNamespace(run_id="r")),
        log_batch=lambda run_id, metrics=(), params=(): batches.append((run_id, list(metrics), list(params))),
        update_run=lambda run_id, status: batches.append((run_id, status)),
        set_terminated=ended.append,
    )
    calls = stand_in("mlflow", MlflowClient=client)
    stand_in("mlflow.entities", Metric=lambda *values: values, Param=lambda *values: values)
    monkeypatch.setattr(reporters.time, "time", lambda: 2.0)
    for start_step in (0, 4):
        reporter = open_reporters(["mlflow"], run_of(tmp_path, start_step), pytest.fail)["mlflow"]
        reporter.log(7, {"train/loss": 0.5})
        reporter.close()
    assert calls[0][2]["tracking_uri"] == f"sqlite:///{tmp_path}/mlflow.db" and made == ["fastvid"]
    assert ("learning_rate", "0.001") in batches[0][2] and batches[1] == ("r", [("train/loss", 0.5, 2000, 7)], [])
    assert batches[2:] == [("r", "RUNNING"), ("r", [("train/loss", 0.5, 2000, 7)], [])] and ended == ["r", "r"]


@pytest.mark.skipif(is_missing("trackio"), reason="trackio is not installed: pip install -e '.[reporters]'")
def test_trackio_keeps_the_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "store"))
    program = (
        "import sys; from pathlib import Path; from fastvid.training.reporters import Run, Trackio\n"
        "r = Trackio(Run(Path(sys.argv[1]), {'learning_rate': 1e-3}, 'my run'))\n"
        "r.log(7, {'train/loss': 0.5}); r.close()"
    )
    run_apart(program, tmp_path)
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*.db*"))
    assert b"train/loss" in stored and b"my run" in stored and b"learning_rate" in stored


@pytest.mark.skipif(is_missing("mlflow"), reason="mlflow is not installed: pip install -e '.[reporters]'")
def test_mlflow_keeps_the_figures(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    from mlflow import MlflowClient

    for start_step in (0, 4):
        reporter = open_reporters(["mlflow"], run_of(tmp_path, start_step), pytest.fail)["mlflow"]
        reporter.log(start_step + 3, {"train/loss": 0.5})
        reporter.close()
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    found = client.get_run(reporter.run_id)
    assert [metric.step for metric in client.get_metric_history(found.info.run_id, "train/loss")] == [3, 7]
    assert found.data.params["learning_rate"] == "0.001" and found.info.run_name == "my run"
    assert found.info.status == "FINISHED" and not list(tmp_path.glob("mlruns"))


@pytest.mark.skipif(is_missing("wandb"), reason="wandb is not installed: pip install -e '.[reporters]'")
def test_wandb_keeps_the_figures_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    program = (
        "import sys; from pathlib import Path; from fastvid.training.reporters import Run, Wandb\n"
        "r = Wandb(Run(Path(sys.argv[1]), {'learning_rate': 1e-3}, 'my run'))\n"
        "r.log(7, {'train/loss': 0.5}); r.close()"
    )
    run_apart(program, tmp_path)
    [stored] = tmp_path.rglob("*.wandb")
    assert b"train/loss" in stored.read_bytes() and b"learning_rate" in stored.read_bytes()
    assert json.loads((tmp_path / "reporters.json").read_text())["wandb"]


def run_apart(program, folder):
    """In a process of its own: these packages keep threads and handlers until a process ends."""
    import subprocess

    result = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""


def test_what_several_keep_is_kept_and_not_that_of_a_run_before(tmp_path):
    run = run_of(tmp_path)
    (tmp_path / "reporters.json").write_text('{"wandb": "old"}')
    open_reporters([], run, pytest.fail)
    assert run.kept() == {}
    run.keep(wandb="1")
    run.keep(mlflow="2")
    assert run_of(tmp_path, 5).kept() == {"wandb": "1", "mlflow": "2"}
    (tmp_path / "reporters.json").write_text("[1]")
    assert run.kept() == {}


def test_one_that_cannot_begin_is_an_error_with_a_remedy(stand_in, tmp_path):
    def refuse(**options):
        raise RuntimeError("api_key not configured\n(no-tty)")

    stand_in("wandb", init=refuse)
    with pytest.raises(ValueError, match="--report_to wandb cannot begin: api_key not configured .*WANDB_MODE=offline"):
        open_reporters(["wandb"], run_of(tmp_path), pytest.fail)


def test_one_that_fails_later_is_left_out_and_the_run_goes_on(stand_in, tmp_path, capsys):
    def lose(values, step):
        raise ConnectionError("the network is gone")

    calls = stand_in("trackio", init=None, log=lose, finish=None)
    metrics = Metrics(tmp_path, total_steps=9, report_to=["trackio"])
    metrics.log(1, {"loss": 1.0})
    metrics.log(2, {"loss": 1.0})
    metrics.close()
    assert capsys.readouterr().err.count("--report_to trackio has failed and is left out from here on: the net") == 1
    assert [name for name, *_ in calls] == ["init", "log"]


def test_metrics_tell_them_flags_names_and_figures(stand_in, tmp_path):
    calls = stand_in("trackio", init=None, log=None, finish=None)
    metrics = Metrics(tmp_path / "stage1", total_steps=9, report_to=["trackio"], flags=FLAGS, project="p")
    metrics.log(3, {"loss": 0.5})
    metrics.close()
    assert calls[0][2]["name"] == "stage1" and calls[0][2]["project"] == "p" and calls[0][2]["config"]["bf16"] is True
    assert calls[1][1][0]["train/loss"] == 0.5 and calls[1][2] == {"step": 3}
