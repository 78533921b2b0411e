"""Metrics: exact lines, honest rates, and a log that survives a kill and a resume."""

import contextlib
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios

import matplotlib
import pytest
import torch
from conftest import ROOT

from fastvid.training import metrics as metrics_module
from fastvid.training.flops import StepCounts
from fastvid.training.metrics import Metrics, peak_memory, read_metrics


@pytest.fixture(autouse=True)
def quick_runs():
    """Runs as they are."""


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves: `clock[0]` seconds."""
    now = [100.0]
    monkeypatch.setattr(metrics_module.time, "perf_counter", lambda: now[0])
    return now


def open_metrics(folder, **options):
    return Metrics(folder, **{"total_steps": 100, "report_to": [], **options})


def steps_in(path):
    return [line["step"] for line in read_metrics(path)]


# metrics.jsonl


def test_lines_keep_every_bit_and_are_there_at_once(tmp_path):
    metrics = open_metrics(tmp_path / "new" / "folder")
    values = {"epoch": 1 / 3, "loss": 0.1 + 0.2, "learning_rate": 5e-324, "grad_norm": 1e300}
    returned = metrics.log(1, values)
    [line] = [json.loads(text) for text in metrics.path.read_text().splitlines()]
    assert list(line)[:5] == ["step", "epoch", "loss", "learning_rate", "grad_norm"]
    assert line == returned and line.items() >= values.items()


def test_a_loss_that_is_not_finite_is_still_json(tmp_path):
    metrics = open_metrics(tmp_path)
    metrics.log(1, {"loss": math.nan, "grad_norm": math.inf})
    line = json.loads(metrics.path.read_text(), parse_constant=pytest.fail)
    assert line["loss"] is None and line["grad_norm"] is None


def test_a_resume_drops_later_and_torn_lines(tmp_path):
    metrics = open_metrics(tmp_path)
    for step in (10, 20, 30):
        metrics.log(step, {"loss": 1 / step})
    before = metrics.path.read_text().splitlines()[:2]
    with open(metrics.path, "a") as file:
        file.write('{"step": 15, "loss": 0.12')  # killed in the middle of a write
    assert steps_in(metrics.path) == [10, 20, 30]

    metrics = open_metrics(tmp_path, start_step=20)
    assert metrics.path.read_text().splitlines() == before
    metrics.log(25, {"loss": 1.0})
    assert steps_in(metrics.path) == [10, 20, 25]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_starts_a_new_log(tmp_path):
    open_metrics(tmp_path).log(0, {"eval_loss": 1.0})
    assert steps_in(open_metrics(tmp_path).path) == []


@pytest.mark.parametrize(
    "put, what",
    [
        (os.mkfifo, "is no regular file"),
        (os.mkdir, "is a folder, not a file"),
        (lambda path: os.symlink("/dev/zero", path), "is no regular file"),
    ],
)
def test_what_is_no_file_is_not_waited_for(tmp_path, put, what):
    put(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match=f"metrics.jsonl {what}.*; move it away"):
        open_metrics(tmp_path, start_step=4)


@pytest.mark.parametrize("put", [os.mkfifo, lambda path: os.symlink("/dev/zero", path)])
def test_what_lies_in_the_way_of_the_rewrite_is_not_opened(tmp_path, put):
    put(tmp_path / ".metrics.jsonl.tmp")
    open_metrics(tmp_path).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_only_rank_zero_writes_and_prints(tmp_path, capsys):
    metrics = open_metrics(tmp_path / "out", rank=1)
    metrics.count(StepCounts(4, 100, 10))
    line = metrics.log(1, {"loss": 1.0})
    metrics.message("hello")
    metrics.close()
    assert line["samples_per_second"] > 0
    assert not (tmp_path / "out").exists() and capsys.readouterr() == ("", "")


# Rates


def test_rates_are_those_since_the_last_training_line(tmp_path, clock):
    metrics = open_metrics(tmp_path, peak_flops=2e12, token_budget=2000)
    metrics.count(StepCounts(8, 1000, 50, sample_rows=2000, padding_rows=0, flops=3 * 10**12))
    metrics.count(StepCounts(8, 2000, 70, sample_rows=2000, padding_rows=30, flops=3 * 10**12))
    metrics.wait(0.5)
    metrics.stall(0.25)
    metrics.stall(0.5)
    clock[0] += 4
    line = metrics.log(2, {"loss": 1.0})
    expected = {
        "samples_per_second": 4,
        "tokens_per_second": 750,
        "supervised_per_second": 30,
        "padding_share": 0.01,
        "shared_token_share": 1 - 2970 / 4000,
        "data_wait_share": 0.125,
        "tflops_per_second": 1.5,
        "mfu": 0.75,
        "budget_fill": 0.75,
        "checkpoint_stall_seconds": 0.75,
    }
    assert {name: line[name] for name in expected} == expected

    metrics.count(StepCounts(10, 10, 10))
    clock[0] += 1
    with metrics.paused():
        clock[0] += 50
        assert metrics.log(3, {"eval_loss": 2.0}) == {"step": 3, "eval_loss": 2.0}
    clock[0] += 1
    line = metrics.log(3, {"loss": 1.0})
    assert line["samples_per_second"] == 5 and line["data_wait_share"] == 0
    assert "checkpoint_stall_seconds" not in line


def test_no_share_of_what_was_not_stated(tmp_path, clock):
    metrics = open_metrics(tmp_path)
    metrics.count(StepCounts(flops=5 * 10**12))
    clock[0] += 1
    line = metrics.log(1, {"loss": 1.0})
    assert line["tflops_per_second"] == 5 and not {"mfu", "budget_fill"} & line.keys()


def test_steps_without_samples_share_nothing(tmp_path, clock):
    metrics = open_metrics(tmp_path)
    metrics.count(StepCounts(rows=2, padding_rows=2))
    clock[0] += 1
    line = metrics.log(1, {"loss": 0.0})
    assert line["shared_token_share"] == 0 and line["padding_share"] == 1


def test_the_summary_is_of_this_run(tmp_path, clock, monkeypatch):
    monkeypatch.setattr(metrics_module, "peak_memory", lambda: 3 * 2**29)
    metrics = open_metrics(tmp_path, start_step=1000, total_steps=3000, peak_flops=5e11)
    for _ in range(1001, 3001):
        metrics.count(StepCounts(8, 100, 10, flops=5 * 10**11))
        metrics.wait(0.2)
        clock[0] += 2
    metrics.stall(0.75)
    metrics.log(3000, {"loss": 0.43216})
    metrics.log(3000, {"eval_loss": 0.5})
    assert metrics.summary() == (
        "2,000 steps (after 1,000), 16,000 samples in 1:06:40 (4.00 samples/s, 50 tokens/s, "
        "0.25 TFLOP/s (50.0% of peak), data wait 10.0%), final loss 0.4322, "
        "peak memory 1.50 GiB, stopped for checkpoints 0.75 s"
    )


def test_peak_memory_is_in_bytes():
    held = torch.ones(50 * 2**20, dtype=torch.uint8)
    assert 2**26 < peak_memory() < 2**40 and held[0]


def test_a_full_disk_is_told_once_by_name(tmp_path, capsys):
    """What `close` cannot write either does not take the place of the error that ends the run."""
    metrics = open_metrics(tmp_path)
    metrics._file.close()
    metrics._file = open("/dev/full", "a")
    with pytest.raises(OSError, match=f"No space left.*{metrics.path}"), contextlib.closing(metrics):
        metrics.log(1, {"loss": 1.0})
    assert f"{metrics.path} lacks its last lines" in capsys.readouterr().err


def test_a_run_that_was_done_already_knows_its_loss(tmp_path):
    open_metrics(tmp_path).log(100, {"loss": 0.25})
    open_metrics(tmp_path, start_step=100).log(100, {"eval_loss": 0.5})
    assert (
        open_metrics(tmp_path, start_step=100)
        .summary()
        .startswith("all 100 steps are done already (final loss 0.2500)")
    )


# What the user sees


def test_without_a_terminal_a_line_per_log(tmp_path, clock, capsys):
    metrics = open_metrics(tmp_path, start_step=10, peak_flops=1e12)
    for _ in range(10):
        metrics.count(StepCounts(8, 600, 10, flops=3 * 10**12))
        metrics.wait(1.5)
        clock[0] += 6
    metrics.log(20, {"epoch": 0.5, "loss": 1.25, "learning_rate": 2e-5})
    metrics.log(20, {"eval_loss": 1.5})
    metrics.message("saved checkpoint-20")
    metrics.close()
    out, err = capsys.readouterr()
    assert out == "" and err.splitlines() == [
        "step 20/100, epoch 0.5, loss 1.25, learning_rate 2e-05, 1.33 samples/s, 100 tokens/s, 0.5 TFLOP/s (50.0% of "
        "peak), data wait 25.0%, ETA 08:00",
        "step 20/100, eval_loss 1.5",
        "saved checkpoint-20",
    ]


def test_on_a_terminal_a_bar_that_goes_on_where_the_run_does(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metrics = open_metrics(tmp_path, start_step=40)
    metrics.count(StepCounts(8, 600, 10))
    metrics.log(41, {"loss": 1.25})
    metrics.message("a message")
    metrics.close()
    err = capsys.readouterr().err
    assert " 40/100 [" in err
    assert re.search(r"41%\|.* 41/100 \[[^]]*, loss 1.2500\]", err)
    assert "a message\n" in err and re.search(r"step 41/100, loss 1.25, .*, ETA [\d:]+\n", err)


def on_a_terminal(columns, tmp_path):
    """What a run of one log line shows on a terminal of so many columns."""
    program = (
        "import sys\nfrom fastvid.training.flops import StepCounts\n"
        "from fastvid.training.metrics import Metrics\n"
        "m = Metrics(sys.argv[1], total_steps=10, report_to=[])\n"
        "m.count(StepCounts(8, 600, 10)); m.log(1, {'loss': 1.25}); m.close()"
    )
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stderr=theirs,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
    )
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that the other end is closed
        while piece := os.read(ours, 4096):
            shown += piece
    os.close(ours)
    assert process.wait(60) == 0
    return shown.decode()


@pytest.mark.slow
def test_a_bar_fits_the_terminal_and_lines_stay(tmp_path, forked):
    shown = on_a_terminal(80, tmp_path)
    assert "step 1/10, loss 1.25, " in shown
    bars = [part for part in re.split(r"[\r\n]", shown) if "%|" in part]
    assert any("loss 1.2500" in bar for bar in bars) and max(map(len, bars)) <= 80


@pytest.mark.slow
def test_a_terminal_of_no_columns_shows_lines(tmp_path):
    shown = on_a_terminal(0, tmp_path)
    assert "step 1/10, loss 1.25, " in shown and "%|" not in shown


def test_progress_can_be_turned_off(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    metrics = open_metrics(tmp_path, progress=False)
    metrics.count(StepCounts(8, 600, 10))
    metrics.log(1, {"loss": 1.25})
    assert re.fullmatch(r"step 1/100, loss 1.25, .*, ETA [\d:]+\n", capsys.readouterr().err)


@pytest.mark.slow
def test_tensorboard_holds_the_values(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start_step, steps in [(0, (10, 20, 30)), (20, (25,))]:
        metrics = open_metrics(tmp_path, report_to=["tensorboard"], start_step=start_step)
        for step in steps:
            metrics.log(step, {"loss": step / 4})
            metrics.log(step, {"eval_loss": 0.5})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(10, 2.5), (20, 5), (25, 6.25)]
    assert {event.value for event in events.Scalars("eval/loss")} == {0.5}


@pytest.mark.parametrize(
    "missing, options, message",
    [
        ("tensorboard", {"report_to": ["tensorboard"]}, "no TensorBoard: .*pip install tensorboard"),
        ("matplotlib.figure", {}, "no loss_curve.png: .*pip install matplotlib"),
    ],
)
def test_a_missing_package_costs_one_line(tmp_path, monkeypatch, capsys, missing, options, message):
    monkeypatch.setitem(sys.modules, missing, None)
    for module in ("torch.utils.tensorboard", "fastvid.training.plots"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    metrics = open_metrics(tmp_path, **options)
    metrics.log(1, {"loss": 1.0})
    metrics.close()
    assert len(re.findall(message, capsys.readouterr().err)) == 1
    assert steps_in(metrics.path) == [1]


def test_an_unknown_reporter_is_named(tmp_path):
    with pytest.raises(ValueError, match="--report_to neptune: known are tensorboard"):
        open_metrics(tmp_path, report_to=["neptune", "none"])


# The picture


def drawn(monkeypatch, path, name=None):
    """The figure that `draw_loss_curve` saves, and its picture's pixels."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread

    from fastvid.training.plots import draw_loss_curve

    figures, savefig = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *args, **kw: (figures.append(figure), savefig(figure, *args, **kw))
    )
    png = path.with_suffix(".png")
    assert draw_loss_curve(read_metrics(path), png, name)
    return figures[0], imread(png)


def write_lines(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_curve_shows_all_that_was_logged(tmp_path, monkeypatch):
    lines = [
        {"step": step, "loss": 5 / step + 0.2 * (step % 2), "learning_rate": 1e-3 / step} for step in range(1, 101)
    ]
    lines += [{"step": 50, "eval_loss": 0.4}, {"step": 100, "eval_loss": 0.3}, {"step": 101, "loss": None}]
    state = dict(matplotlib.rcParams)
    figure, pixels = drawn(monkeypatch, write_lines(tmp_path / "metrics.jsonl", lines))
    assert dict(matplotlib.rcParams) == state
    assert pixels.shape[:2] == (600, 900)
    losses, rates = figure.axes
    raw, smooth, validation = losses.lines
    assert list(raw.get_xdata()) == list(range(1, 101)) and raw.get_ydata()[99] == 5 / 100
    assert len(smooth.get_ydata()) == 100 and smooth.get_ydata()[0] == raw.get_ydata()[0]
    assert list(validation.get_xdata()) == [50, 100]
    assert list(rates.lines[0].get_ydata()) == [line["learning_rate"] for line in lines[:100]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "metrics.png"]


@pytest.mark.parametrize("last, scale", [(0.5, "linear"), (0.05, "log"), (0.0, "linear")])
def test_a_loss_that_falls_far_is_on_a_log_axis(tmp_path, monkeypatch, last, scale):
    lines = [{"step": step, "loss": value} for step, value in enumerate((2.0, 1.0, last))]
    figure, _ = drawn(monkeypatch, write_lines(tmp_path / "metrics.jsonl", lines))
    assert figure.axes[0].get_yscale() == scale


@pytest.mark.filterwarnings("error")
def test_the_picture_names_its_run_and_cuts_no_label(tmp_path, monkeypatch):
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lines = [{"step": step, "loss": 2.0, "learning_rate": 0.00019} for step in (1, 2)]
    path = write_lines(tmp_path / "metrics.jsonl", lines)
    figure, _ = drawn(monkeypatch, path, "$\\frac$ \udce9")  # no formula; a byte that is no UTF-8
    assert r"\$\\frac\$ \udce9" in figure.texts[0].get_text()
    figure, _ = drawn(monkeypatch, path, "stage_2 of $x$")
    title = figure.texts[0]
    assert title.get_text().replace("\\", "") == "Training loss of stage_2 of $x$"
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in (title, *(axis.yaxis.label for axis in figure.axes)):
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.x1 <= 900


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("line", [{"loss": 2.0, "learning_rate": 0.0}, {"loss": 2.0}, {"eval_loss": 2.0}])
def test_one_point_is_a_picture(tmp_path, monkeypatch, line):
    figure, pixels = drawn(monkeypatch, write_lines(tmp_path / "metrics.jsonl", [{"step": 1, **line}]))
    assert len(figure.axes) == 1 + ("learning_rate" in line) and pixels.min() < 0.5
    assert figure.axes[0].lines[0].get_marker() == "o"


@pytest.mark.slow
def test_close_draws_over_resumes_and_nothing_without_a_loss(tmp_path, monkeypatch):
    open_metrics(tmp_path).close()
    assert not (tmp_path / "loss_curve.png").exists()
    metrics = open_metrics(tmp_path)
    for step in (10, 20, 30):
        metrics.log(step, {"loss": 1.0})
    metrics = open_metrics(tmp_path, start_step=20)
    metrics.log(25, {"loss": 0.5})
    metrics.close()
    metrics.close()
    assert (tmp_path / "loss_curve.png").exists()
    figure, _ = drawn(monkeypatch, metrics.path)
    assert list(figure.axes[0].lines[0].get_xdata()) == [10, 20, 25]


def test_a_picture_that_does_not_fit_is_told_by_name(tmp_path, monkeypatch, capsys):
    def savefig(figure, path, **options):
        path.write_bytes(b"part")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", savefig)
    metrics = open_metrics(tmp_path)
    metrics.log(1, {"loss": 1.0})
    metrics.close()
    assert f"No space left on device: '{tmp_path}/loss_curve.png'" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_smoothing_starts_at_the_first_value_and_keeps_a_constant():
    from fastvid.training.plots import smoothed

    assert smoothed([4.0, 4.0, 4.0], 10) == pytest.approx([4, 4, 4])
    assert smoothed([1.0, 3.0, 8.0, 6.0], 3) == pytest.approx([1, 4, 17 / 3, 6])
    assert smoothed([1.0, 3.0, 8.0, 6.0, 2.0], 5.9) == pytest.approx([1, 4, 4, 16 / 3, 2])
    assert smoothed([1.0, 3.0, 5.0], 2.9) == [1, 3, 5] and smoothed([], 9) == []


def test_memory_is_told_against_the_estimate(monkeypatch, caplog):
    monkeypatch.setattr(metrics_module, "peak_memory", lambda: 3 * 2**29)
    assert metrics_module.memory_taken(2**30) == (
        "memory: estimated 1.0 GiB, peak 1.5 GiB resident, Python and its libraries included"
    )
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 2**31)
    for retries in (0, 3):
        monkeypatch.setattr(torch.cuda, "memory_stats", lambda: {"num_alloc_retries": retries})
        assert metrics_module.memory_taken(2**30) == (
            "memory: estimated 1.0 GiB, peak 1.5 GiB allocated, 2.0 GiB reserved"
        )
        assert ("GPU memory was short 3 times" in caplog.text) == bool(retries)
