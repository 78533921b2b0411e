"""The GPU check: whatever a task does, the others' results are there."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from bench.gpu import correct_steps, quality, results, stages, train
from bench.gpu.check import Check, Task, line_of, table

pytestmark = pytest.mark.usefixtures("forked")

FAULTS = {"raises": "RuntimeError: CUDA error", "hangs": "ran past its limit", "is_killed": "killed by signal 9"}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests" / "support"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def task(name, call="fine", **options):
    return Task("stage", name, "gpu_faults", call, **{"seconds": 60.0} | options)


def run(tasks, folder, **options):
    check = Check(tasks, folder, **{"seconds": 120.0, "ahead": 2, "say": lambda line: None} | options)
    return check.run()


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("process", [None, "shared"])
def test_a_fault_costs_its_own_rows(tmp_path, fault, process):
    tasks = [
        task("first", process=process),
        task("bad", fault, process=process, seconds=3.0),
        task("last", process=process),
    ]
    outcomes = run(tasks, tmp_path)
    assert [outcome for outcome, _, _ in outcomes.values()][::2] == ["ok", "ok"]
    outcome, seconds, rows = outcomes["stage", "bad"]
    assert outcome.startswith("failed: ") and FAULTS[fault] in outcome and [row["row"] for row in rows] == ["before"]
    assert seconds < 20
    written = [(row["task"], row["row"], row["status"]) for row in results.read(tmp_path)]
    assert written == [
        ("first", "fine", "ok"),
        ("first", "end", "ok"),
        ("bad", "before", "ok"),
        ("bad", "end", "failed"),
        ("last", "fine", "ok"),
        ("last", "end", "ok"),
    ]
    assert "stage bad: failed" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_a_wrong_result_fails_and_its_process_goes_on(tmp_path):
    outcomes = run([task("wrong", "is_wrong", process="p"), task("next", process="p")], tmp_path)
    assert outcomes["stage", "wrong"][0] == "failed: error 3 in [4], at most 1 is allowed"
    assert outcomes["stage", "next"][0] == "ok" and not (tmp_path / "log.txt").exists()


@pytest.mark.slow
def test_untimed_tasks_run_beside_each_other_and_timed_ones_wait(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.gpu.check.os.cpu_count", lambda: 4)
    names = ["a", "b"]
    tasks = [
        task(
            name,
            "meets",
            untimed=True,
            after=("before",),
            arguments={"name": name, "others": [other for other in names if other != name], "folder": str(tmp_path)},
        )
        for name in names
    ]
    late = task("late", "meets", untimed=True, arguments={"name": "late", "others": [], "folder": str(tmp_path)})
    timed = task("timed", "finds", arguments={"names": [*names, "late"], "folder": str(tmp_path)})
    outcomes = run([task("before", background=True), *tasks, late, timed], tmp_path)
    assert {outcome for outcome, _, _ in outcomes.values()} == {"ok"}
    assert outcomes["stage", "timed"][2][0]["there"] == ["a", "b", "late"]


def test_what_a_machine_has_not_is_told_apart(tmp_path):
    outcomes = run([task("one", "is_absent"), task("two")], tmp_path)
    assert [outcome for outcome, _, _ in outcomes.values()] == ["absent: no such library", "ok"]
    assert [row["status"] for row in results.read(tmp_path) if row["row"] == "end"] == ["absent", "ok"]
    assert "measured: 1 of 2" in table(outcomes) and "not to be had here: 1 of 2" in table(outcomes)


def test_a_background_task_runs_beside_others_and_is_waited_for(tmp_path):
    tasks = [task("slow", background=True), task("beside"), task("after", after=("slow",))]
    assert all(outcome == "ok" for outcome, _, _ in run(tasks, tmp_path).values())
    bad = [task("slow", "raises", background=True), task("beside"), task("after", after=("slow",))]
    outcomes = run(bad, tmp_path)
    assert outcomes["stage", "beside"][0] == "ok"
    assert outcomes["stage", "after"][0] == "left out: slow did not end well"


def test_who_comes_after_what_is_absent_says_so_itself(tmp_path):
    outcomes = run([task("data", "is_absent", background=True), task("user", "is_absent", after=("data",))], tmp_path)
    assert [outcome for outcome, _, _ in outcomes.values()] == ["absent: no such library"] * 2


@pytest.mark.slow
def test_what_does_not_fit_is_left_out(tmp_path):
    begin = time.monotonic()
    outcomes = run([task("long", "hangs"), task("late")], tmp_path, seconds=8.0)
    assert "ran past its limit" in outcomes["stage", "long"][0] and outcomes["stage", "late"][0] == "left out: no time"
    assert time.monotonic() - begin < 30
    said = table(outcomes)
    assert "failed: 1 of 2" in said and "left out: 1 of 2" in said and "measured" not in said


@pytest.mark.slow
@pytest.mark.parametrize("stage", stages.STAGES)
def test_in_every_stage_a_fault_costs_its_own_rows(tmp_path, stage):
    """The real table: one task hangs, crashes or is killed; of the others one is run, and all are told of."""
    tasks = stages.tasks_of([stage], small=True)
    chosen = [i for i, task in enumerate(tasks) if not task.background or stage == "tests"][:3]
    for fault, place in zip(FAULTS, chosen):
        tasks[place] = dataclasses.replace(tasks[place], module="gpu_faults", call=fault, seconds=2.0, process=None)
    kept = [task for i, task in enumerate(tasks) if i in chosen or (i > chosen[-1] and not task.after)][:4]
    kept = [dataclasses.replace(task, after=()) for task in kept]
    outcomes = run(kept, tmp_path)
    assert len(outcomes) == len(kept)
    for task_, (outcome, _, rows) in zip(kept, outcomes.values()):
        faulty = task_.module == "gpu_faults"
        assert outcome.startswith("failed" if faulty else ("ok", "absent")), (task_.name, outcome)
        assert len(rows) == 1 if faulty else rows


@pytest.mark.slow
def test_two_sharded_ranks_train_as_one_process():
    rows = list(correct_steps.two_sharded_ranks(True))
    if torch.cuda.device_count() == 1:
        assert [row["absent"] for row in rows] == ["one GPU"]
        return
    assert [(row["row"], row["status"], len(row["losses"])) for row in rows] == [
        ("full, two ranks", "ok", 3),
        ("hybrid, two ranks", "ok", 3),
    ], rows


@pytest.mark.slow
def test_two_ranks_that_cannot_start_are_said():
    assert "many is no whole number" in correct_steps._torchrun(2, ["--max_steps", "many"], seconds=60)


def test_ranks_of_one_gpu_are_absent(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert list(correct_steps.two_sharded_ranks(True)) == [{"row": "two ranks", "absent": "one GPU"}]


def test_a_line_that_a_crash_cut_short_is_passed_over(tmp_path):
    results.append(tmp_path, {"row": "whole", "status": "ok"})
    with open(tmp_path / results.NAME, "a") as file:
        file.write('{"row": "cut", "sta')
    assert [row["row"] for row in results.read(tmp_path)] == ["whole"]
    assert line_of({"row": "x", "status": "failed", "seconds_each": [1], "median": 0.123456789}) == (
        "FAILED row x, median 0.12346"
    )


def test_tables_are_told_apart():
    for small in (True, False):
        tasks = stages.tasks_of(list(stages.STAGES), small=small)
        names = [(task.stage, task.name) for task in tasks]
        assert len(names) == len(set(names)) and {task.stage for task in tasks} == set(stages.STAGES)
        # Written while nothing is timed.
        for prepared in (("train", "data"), ("quality", "clips")):
            assert names.index(prepared) < names.index(("correct", "add_rms_norm"))
        for task in tasks:
            assert task.seconds <= 150 and all((task.stage, name) in names for name in task.after)


def test_rows_for_memory_are_run_and_are_short():
    made = {task.name: task for task in stages.tasks_of(["train"], small=False)}
    for name in ("smallest", "smallest_nf4"):
        assert made[name].seconds == 60 and made[name].arguments["seconds"] == 0.0


class Counted:
    """A training row that counts its steps."""

    samples = rows = sample_rows = 1

    def __init__(self):
        self.steps = 0

    def step(self):
        self.steps += 1
        return 1.0, 1.0


@pytest.mark.parametrize("name, steps", [("smallest", 2), ("exact", 6)])
def test_of_a_row_for_memory_one_step_is_timed(monkeypatch, name, steps):
    """After the first, which loads the optimizer; others are warmed up and take at least three."""
    made = Counted()
    monkeypatch.setattr(train, "HELD", {})
    monkeypatch.setattr(train, "folder", lambda: None)
    monkeypatch.setattr(train.train_rows, "make", lambda *arguments: made)
    (row,) = train.row(False, "tiny-gpu", name, seconds=0.0)
    assert made.steps == steps and len(row["seconds_each"]) == (1 if name == "smallest" else 3)


def test_few_bits_that_a_machine_has_not_are_absent(monkeypatch):
    def refuse(frozen_dtype, device):
        raise ValueError(f"no {frozen_dtype} here")

    monkeypatch.setattr(train, "check_device", refuse)
    assert list(train.row(True, "tiny-gpu", "smallest_nf4")) == [{"row": "smallest_nf4", "absent": "no nf4 here"}]
    monkeypatch.setattr(quality, "check_device", refuse)
    monkeypatch.setattr(quality, "find_spec", lambda name: True)
    assert [row["absent"] for row in quality.fp8_curve(True)] == ["no fp8 here"]
    assert quality.way(Path("nowhere"), "FP8", True) == {"row": "FP8", "absent": "no fp8 here"}


@pytest.mark.parametrize("last, status", [(1.0, "ok"), (1.006, "failed"), (0.994, "failed"), (float("nan"), "failed")])
def test_curves_are_compared_over_all_steps_and_the_last(last, status):
    found = quality.curve_errors([2.0] * 150 + [last] * 50, [2.0] * 150 + [1.0] * 50)
    assert found["status"] == status
    assert found["of the last 50"] == pytest.approx(last - 1, nan_ok=True)
    assert found["relative error"] == pytest.approx((last - 1) / 7, nan_ok=True)
    whole = quality.curve_errors([2.03] * 150 + [1.0] * 50, [2.0] * 150 + [1.0] * 50)
    assert whole["status"] == "failed" and whole["of the last 50"] == 0


def answered(right, **more):
    first, left = right
    return {"first right": first, "first asked": 96, "left right": left, "left asked": 96, "skipped": 0} | more


@pytest.mark.parametrize(
    "name, others, row, fault",
    [
        ("exact", {}, answered((96, 93)), None),
        ("exact", {}, answered((96, 86)), "left: 86 of 96 right, too few"),
        ("shared", {"exact": (96, 93)}, answered((96, 88)), None),
        ("shared", {"exact": (96, 93)}, answered((96, 84)), "left: 84 of 96 right, exact has 93; 7.6 fewer"),
        ("shared", {"exact": (96, 96)}, answered((91, 96)), "first: 91 of 96 right, exact has 96; 4.8 fewer"),
        ("FP8", {"exact": (90, 93)}, answered((96, 93)), None),
        ("video first", {"exact": (96, 93)}, answered((96, 80)), None),  # its cost is told, and judged by nobody
        ("video first, shared", {"exact": (96, 93), "video first": (96, 80)}, answered((96, 79)), None),
        ("video first, shared", {"exact": (96, 93), "video first": (96, 93)}, answered((96, 79)), "video first has 93"),
        ("shared", {"exact": (96, 93)}, answered((96, 93), skipped=2), "2 samples were skipped"),
    ],
)
def test_a_way_must_answer_as_well_as_another(name, others, row, fault):
    found = {other: answered(right) for other, right in others.items()} | {name: row}
    said = quality.verdict(name, found, False)
    assert said["status"] == ("failed" if fault else "ok") and (fault or "") in said.get("error", "")


@pytest.mark.slow
def test_the_quickstarts_task_is_learned_in_every_way(tmp_path, monkeypatch):
    """At sizes that learn nothing."""
    monkeypatch.setenv("FASTVID_CHECK_SCRATCH", str(tmp_path))
    assert [row["clips"] for row in quality.clips(True)] == [2 * (48 + 8)]
    (curve,) = quality.fp8_curve(True)
    assert curve["steps"] == 3 and curve["bf16"] != curve["fp8"] and abs(curve["relative error"]) < 0.05
    base, *ways = quality.answers(True)
    assert base["row"] == "base" and [row["row"] for row in ways] == list(quality.WAYS)
    assert all((row["first asked"], row["left asked"], row["skipped"], row["steps"]) == (8, 8, 0, 2) for row in ways)


def test_results_lie_where_git_tracks_nothing():
    """Unless it is told another folder: figures of a loaded machine replace none that are published."""
    if not (ROOT / ".git").exists():
        pytest.skip("this is no checkout of git's")
    folder = re.search(r'os.environ.get\("OUT"\) or "(\S+)"\)', (ROOT / "bench/gpu/__main__.py").read_text())[1]
    assert subprocess.run(["git", "check-ignore", "-q", f"{folder}/results.jsonl"], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_command(tmp_path):
    command = [
        "bash",
        "scripts/gpu_check.sh",
        "--stages",
        "probe,kernels",
        "--tasks",
        "card,swiglu",
        "--minutes",
        "2",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable, "FASTVID_VENV": ""},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "measured: 2 of 2" in done.stdout and "no GPU: tiny sizes" in done.stderr
    rows = results.read(tmp_path)
    assert rows[0]["row"] == "environment" and rows[0]["small"] and rows[0]["versions"]["torch"]
    ours = next(row for row in rows if row.get("way") == "ours")
    assert ours["median"] > 0 and ours["kernel"] == "swiglu" and json.dumps(rows)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words, said",
    [
        (("--stages", "kernel"), "no stage is called kernel; there are probe, correct"),
        (("--minutes", "0"), "--minutes 0: give more than 0"),
        (("--tasks", "swiglu,nosuch"), "no task of these stages has nosuch in its"),
    ],
)
def test_command_refuses(words, said):
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"},
    )
    assert done.returncode == 2 and said in done.stderr
