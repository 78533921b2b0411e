"""The ladder of the training benchmark: how rows are run in turn, compared, drawn, and written."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from bench import ladder_plot, train_data, train_step
from bench.train_presets import PRESETS, ROWS

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("bench")
    train_data.write(made, TINY.shape, TINY.videos)
    return made


def measured(name, dtype, seconds, flops=8e9, **more):
    row = {
        "seconds": seconds,
        "cpu_seconds": seconds,
        "rates": [],
        "samples": 15,
        "rows": 12000,
        "flops": flops,
        "loss": 10.0,
        "norm": 4.0,
        "peak_bytes": 2**30,
        "start_bytes": 2**28,
    }
    return train_step._figures(name, dtype, row | more, 16e9)


ENVIRONMENT = {
    "device": "CPU X",
    "commit": "abc",
    "date": "2026-01-01",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
}


@pytest.fixture
def result():
    rows = [
        measured("reference", "bf16", [30.0, 29.0, 31.0]),
        measured("strong", "bf16", [20.0]),
        measured("tuned", "bf16", [15.0]),
        measured("exact", "bf16", [10.0], flops=80e9, peak_bytes=2**29),
        measured("recomputed", "bf16", [15.0], peak_bytes=2**28),
        measured("strong_video_first", "bf16", []),
        measured("shared", "bf16", [3.0]),
        measured("reference", "fp32", [60.0]),
        measured("exact", "fp32", [24.0], flops=192e9),
    ]
    return {
        "environment": ENVIRONMENT,
        "preset": "tiny",
        "rows": rows,
        **train_step.summary(rows, {"bf16": 16e9, "fp32": 16e9}),
    }


def test_summary_compares_rows_of_one_precision(result):
    assert result["ratios"] == pytest.approx(
        {
            "exact_vs_reference": 3.0,
            "exact_vs_strong": 2.0,
            "exact_vs_tuned": 1.5,
            "shared_vs_reference": 10.0,
            "shared_vs_strong": 20 / 3,
            "shared_vs_tuned": 5.0,
        }
    )
    assert result["ratios_fp32"] == pytest.approx({"exact_vs_reference": 2.5})
    assert (result["matmul_share"], result["matmul_share_fp32"]) == pytest.approx((0.5, 0.5))
    assert (result["memory_vs_reference"], result["memory_vs_reference_recomputed"]) == (0.5, 0.25)


@pytest.mark.slow
def test_table_and_picture_show_what_was_timed(result, tmp_path):
    lines = train_step.table(result["rows"]).splitlines()
    assert lines[2].split()[-12:] == "0.5 3 % 400 0 2 % 1,024 MiB 1.00 0.67 0.50".split()
    assert not any(ROWS["strong_video_first"].title in line for line in lines) and len(lines) == 11
    figure = ladder_plot.draw(result)
    speed, memory = figure.axes
    assert sorted(bar.get_width() for bar in speed.patches) == pytest.approx(
        sorted(row["samples_per_second"] for row in result["rows"] if row["seconds"])
    )
    assert {" 1.5  (3×)", " 0.5  (0.5×)"} <= {text.get_text() for axis in (speed, memory) for text in axis.texts}
    figure.savefig(tmp_path / "ladder.png")


@pytest.mark.slow
def test_table_goes_into_its_page_between_its_comments(result, tmp_path):
    table = ladder_plot.markdown(result)
    lines = table.splitlines()
    assert lines[2] == "| reference's recipe (transformers) | 0.5 | 0 | 2 % | 1.00 GiB | 0.25 | 0 | 1 % | 1.00 GiB |"
    assert lines[5].split(" | ")[1:] == [
        "1.5 (3.0×)",
        "8",
        "50 %",
        "0.50 GiB (0.50×)",
        "0.625 (2.5×)",
        "8",
        "50 %",
        "1.00 GiB (1.00×) |",
    ]
    assert lines[3].endswith("|  |  |  |  |") and len(lines) == 8
    text = f"# A\n{ladder_plot.BEGIN}\nold\n{ladder_plot.END}\nrest\n"
    assert ladder_plot.into_readme(text, table) == f"# A\n{ladder_plot.BEGIN}\n{table}\n{ladder_plot.END}\nrest\n"
    (tmp_path / "performance.md").write_text(text)
    (tmp_path / "result.json").write_text(json.dumps(result))
    ladder_plot.main(
        [str(tmp_path / "result.json"), "--png", str(tmp_path / "a.png"), "--readme", str(tmp_path / "performance.md")]
    )
    written = (tmp_path / "performance.md").read_text()
    assert table in written and "CPU X; torch 2.13.0" in written and "old" not in written
    assert (tmp_path / "a.png").stat().st_size > 10_000
    with pytest.raises(AssertionError, match="the page needs"):
        ladder_plot.into_readme("# A\n", table)


class Scripted:
    """A row's process that answers from a script and notes who was asked."""

    asked, rates = [], iter(())

    def __init__(self, name, *_):
        self.name = name

    def ask(self, command):
        self.asked.append((self.name, command))
        if command == "first":
            return {"loss": 1.0, "norm": 1.0, "samples": 15, "rows": 100, "sample_rows": 100, "flops": 4e9}
        if command == "end":
            return {"peak_bytes": 1, "start_bytes": 1}
        return {"rate": next(self.rates)} if self.name == "matmul" else {"seconds": 2.0, "cpu_seconds": 4.0}

    def stop(self):
        self.asked.append((self.name, "stop"))


def test_rows_step_in_turn_and_the_fastest_product_counts(monkeypatch):
    monkeypatch.setattr(train_step, "RowProcess", Scripted)
    Scripted.asked, Scripted.rates = [], iter([1e9, 8e9, 2e9, 3e9, 4e9, 5e9])
    preset = dataclasses.replace(TINY, rounds={"bf16": 3})
    rows, rate = train_step.measure(
        ["reference", "kept", "exact", "strong_video_first"], "bf16", preset, None, say=lambda line: None
    )
    assert rate == 8e9 and [row["row"] for row in rows] == ["reference", "kept", "exact", "strong_video_first"]
    assert [len(row["seconds"]) for row in rows] == [3, ROWS["kept"].rounds, 3, 0]
    assert rows[0]["matmul_share"] == pytest.approx(4e9 / 2 / 8e9) and rows[3]["samples_per_second"] is None
    steps = [name for name, command in Scripted.asked if command == "step"]
    assert steps == ["matmul", "reference", "exact"] * 3 + ["matmul", "kept"] * 2 + ["matmul"]
    started = {name for name, _ in Scripted.asked}
    assert all((name, "stop") in Scripted.asked for name in started)


@pytest.mark.slow
def test_what_ends_a_rows_process_is_told(folder):
    with pytest.raises(train_step.RowFailed, match="(?s)no_such_row ended with exit code 1.*KeyError"):
        train_step.RowProcess("no_such_row", "fp32", TINY, folder)


def test_a_gpu_is_for_the_check(monkeypatch, capsys):
    monkeypatch.setattr(train_step, "has_gpu", lambda: True)
    with pytest.raises(SystemExit):
        train_step.main(["--preset", "tiny"])
    assert "gpu_check.sh --stages train" in capsys.readouterr().err


@pytest.mark.slow
def test_command_writes_the_ladder(tmp_path):
    command = [
        sys.executable,
        "bench/train_step.py",
        "--preset",
        "tiny",
        "--rows",
        "reference,exact",
        "--dtypes",
        "bf16",
        "--out",
        str(tmp_path),
    ]
    variables = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=variables)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "× reference" in done.stdout and (tmp_path / "train-tiny.png").stat().st_size > 10_000
    written = json.loads((tmp_path / "train-tiny.json").read_text())
    assert {"environment", "ratios", "matmul_share", "matmul_share_fp32", "memory_vs_reference"} <= written.keys()
    reference, exact = written["rows"]
    assert written["ratios"]["exact_vs_reference"] == pytest.approx(reference["seconds"][0] / exact["seconds"][0])
    assert written["faults"] == [] and reference["peak_bytes"] > reference["start_bytes"] > 2**26
    assert exact["matmul_share"] == pytest.approx(
        exact["flops"] / exact["seconds"][0] / written["matmul_flops_per_second"]["bf16"]
    )


def test_presets_name_rows():
    for preset in PRESETS.values():
        assert all(name in ROWS for names in preset.rows.values() for name in names)
        assert preset.rows.keys() == preset.rounds.keys()


def test_docs_show_the_committed_ladder():
    path = ROOT / "bench" / "results" / "train-cpu-110m.json"
    text = (ROOT / "docs" / "performance.md").read_text()
    assert ladder_plot.into_readme(text, ladder_plot.block(json.loads(path.read_text()))) == text
