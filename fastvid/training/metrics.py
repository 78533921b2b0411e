"""What a run tells about itself: metrics.jsonl, reporters, a progress bar, and rates.

Nothing here waits for a device: callers hand over numbers that are on the host already.
"""

import contextlib
import errno
import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fastvid.files import StrPath, atomic_path, naming, shown, wrong_content
from fastvid.training import flops, reporters
from fastvid.training.flops import StepCounts

log = logging.getLogger("fastvid")


class Metrics:
    """Counts, rates and logs of one training run. Only rank 0 writes and prints; on the others calls only count.

    Attributes:
        path: ``output_dir/metrics.jsonl``, one JSON object per line: ``step``, the values given to `log` in full
            precision (a non-finite one as null), and on training lines, over the steps since the last of them and all
            ranks: ``samples_per_second``; ``tokens_per_second`` (packed tokens, those of videos included);
            ``supervised_per_second``; ``tflops_per_second`` (`fastvid.training.flops.Formula`) and ``mfu`` (its share
            of the stated peak, if one was); ``data_wait_share`` (of the time, the mean over ranks of what their loops
            waited: a GPU that still has work queued waits less); ``padding_share`` (tokens that stand for no sample);
            ``shared_token_share`` (tokens saved because samples share them); ``budget_fill`` (of the token budget, if
            there is one); ``checkpoint_stall_seconds`` (that saving stopped the loop, if it did); ``peak_memory_gib``
            (rank 0's GPU memory, without a GPU its resident set, since the process began).
        evaluated_step: the last before `start_step` that has a validation's line, on rank 0; 0: none.
        unheard: whether the reader of stderr (a pipe's other end, a terminal) is gone. Nothing more is printed then.
    """

    def __init__(
        self,
        output_dir: StrPath,
        *,
        total_steps: int,
        start_step: int = 0,
        report_to: Sequence[str] = ("tensorboard",),
        run_name: str | None = None,
        project: str | None = None,
        flags: dict | None = None,
        progress: bool = True,
        rank: int = 0,
        peak_flops: float | None = None,
        token_budget: int | None = None,
    ):
        """Start the clock.

        Args:
            output_dir: made if missing.
            total_steps: steps of the whole run, those before a resume included.
            start_step: steps done before; lines after it are dropped from metrics.jsonl (0: all lines).
            report_to: names of `reporters.REPORTERS`, "all" or "none"; metrics.jsonl is always written.
            run_name: in reports and in the picture; None: the name of `output_dir`.
            project: that reports belong to.
            flags: of the run, for reports.
            progress: show a bar where stderr is a terminal, below the plain line that each `log` prints.
            rank: of this process.
            peak_flops: floating-point operations per second of all devices together, to state `mfu` against.
            token_budget: tokens that one step of all ranks could take, to state `budget_fill` against.

        Raises:
            ValueError: a reporter that cannot be had; something else lies in the place of metrics.jsonl.
        """
        reporters.chosen(report_to)
        self.path = Path(output_dir) / "metrics.jsonl"
        if self.path.exists() and not self.path.is_file():  # a pipe would wait for ever
            raise ValueError(
                f"{shown(self.path)} {wrong_content(self.path)}; move it away, or choose another --output_dir"
            )
        self.name = run_name or Path(output_dir).resolve().name
        self.total_steps, self.start_step, self.rank = total_steps, start_step, rank
        self.peak_flops, self.token_budget = peak_flops, token_budget
        self._bar = self._file = None
        self._reporters, self.unheard = {}, False
        self._loss, self.evaluated_step = math.nan, 0
        self._run = self._window = _Window()
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            kept = _keep_lines(self.path, start_step)
            losses = [line["loss"] for line in kept if line.get("loss") is not None]
            self._loss = losses[-1] if losses else math.nan
            self.evaluated_step = max((line["step"] for line in kept if _validated(line)), default=0)
            self._file = open(self.path, "a", encoding="utf-8")
            run = reporters.Run(self.path.parent, flags or {}, self.name, project, start_step)
            self._reporters = reporters.open_reporters(report_to, run, self.message)
            if progress and sys.stderr.isatty() and _columns():
                form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
                self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, bar_format=form)
        self._run, self._window = _Window(), _Window()

    def count(self, counts: StepCounts) -> None:
        """One optimizer step over all ranks is done."""
        for window in (self._run, self._window):
            window.add(counts)
        if self._bar is not None:
            self._say(self._bar.update)

    def wait(self, seconds: float) -> None:
        """The step loop has waited for data."""
        self._run.waited += seconds
        self._window.waited += seconds

    def stall(self, seconds: float) -> None:
        """Saving a checkpoint has stopped the step loop."""
        self._run.stalled += seconds
        self._window.stalled += seconds

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Around work that is not training (validation): its time does not enter the rates."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._window.began += time.perf_counter() - begin

    def log(self, step: int, values: dict) -> dict:
        """Write a line. With a "loss" it is a training line: rates are added, and counted anew from here.

        Args:
            step: optimizer steps done.
            values: host numbers by name, such as epoch, loss, learning_rate, grad_norm; or eval_loss and
                others that begin with "eval_".

        Returns:
            The line, on every rank.
        """
        line = {"step": step, **values}
        if "loss" in values:
            self._loss = values["loss"]
            line |= self._window.rates(self.peak_flops, self.token_budget)
            self._window = _Window()
        if self.rank == 0:
            assert self._file is not None
            with naming(self.path):
                text = json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False)
                self._file.write(text + "\n")
                self._file.flush()
            self._report(step, line)
            self._show(line)
        return line

    def message(self, text: str) -> None:
        """Print a line on rank 0's stderr, above the bar."""
        if self.rank == 0 and self._bar is not None:
            self._say(self._bar.write, text, file=sys.stderr)
        elif self.rank == 0:
            self._say(print, text, file=sys.stderr, flush=True)

    def _say(self, function, *arguments, **options):
        """Print. A run does not end where it cannot be heard: it learns so, and decides."""
        if self.unheard:
            return
        try:
            function(*arguments, **options)
        except OSError as error:  # another one, such as a full disk behind `2> log`, costs this line
            self.unheard = error.errno in (errno.EPIPE, errno.EIO)

    def summary(self) -> str:
        """The run so far (since a resume) in one line."""
        run, rates = self._run, self._run.rates(self.peak_flops)
        if not run.steps and self.start_step:
            return (
                f"all {self.start_step:,} steps are done already (final loss {self._loss:.4f}): give more "
                "--max_steps or --num_train_epochs to go on, or --resume never to start over"
            )
        steps = f"{run.steps:,} steps" + (f" (after {self.start_step:,})" if self.start_step else "")
        return (
            f"{steps}, {run.counts.samples:,} samples in {tqdm.format_interval(run.seconds)} "
            f"({_readable(rates)}), final loss {self._loss:.4f}, peak memory {rates['peak_memory_gib']:.2f} GiB, "
            f"stopped for checkpoints {run.stalled:.2f} s"
        )

    def close(self) -> None:
        """End the bar and the files, and draw ``loss_curve.png`` beside them."""
        if self._file is None:
            return
        if self._bar is not None:
            self._say(self._bar.close)
        file, self._file, self._bar = self._file, None, None
        try:
            file.close()
        except OSError as error:  # a full disk; not instead of what ends the run, which says more
            self.message(f"{self.path} lacks its last lines: {error}")
        for name in list(self._reporters):
            with self._only_told(name):
                self._reporters[name].close()
        self._reporters = {}
        try:
            from fastvid.training.plots import draw_loss_curve
        except ImportError as error:
            self.message(f"no loss_curve.png: {error}; pip install matplotlib")
            return
        try:
            draw_loss_curve(read_metrics(self.path), self.path.with_name("loss_curve.png"), self.name)
        except OSError as error:  # a full disk: the numbers are in metrics.jsonl
            self.message(f"no loss_curve.png: {error}")

    def _report(self, step, line):
        for name in list(self._reporters):
            with self._only_told(name):
                self._reporters[name].log(step, reporters.figures(line))

    @contextlib.contextmanager
    def _only_told(self, name):
        """A reporter that fails (a lost network, a full disk) is left out from then on; the run goes on."""
        try:
            yield
        except Exception as error:  # each has errors of its own
            del self._reporters[name]
            self.message(f"--report_to {name} has failed and is left out from here on: {' '.join(str(error).split())}")

    def _show(self, line):
        rates = _readable(line)
        if self._bar is not None and "loss" in line:
            self._say(self._bar.set_postfix_str, f"loss {line['loss']:.4f}", refresh=False)
        shown = [f"{name} {line[name]:.4g}" for name in ("epoch", "loss", "eval_loss", "learning_rate") if name in line]
        shown += [f"{name} {value:.4g}" for name, value in line.items() if name.startswith("eval_") and "/" in name]
        if "loss" in line:
            left = self.total_steps - line["step"]
            eta = self._run.seconds / self._run.steps * left if self._run.steps else 0
            shown += [rates, f"ETA {tqdm.format_interval(eta)}"]
        self.message(", ".join([f"step {line['step']:,}/{self.total_steps:,}", *shown]))


class _Window:
    """What was done since a moment."""

    def __init__(self):
        self.began = time.perf_counter()
        self.steps, self.counts = 0, StepCounts()
        self.waited = self.stalled = 0.0

    def add(self, counts):
        self.steps += 1
        self.counts = flops.total([self.counts, counts])

    @property
    def seconds(self):
        return time.perf_counter() - self.began

    def rates(self, peak_flops=None, token_budget=None):
        seconds, counts = max(self.seconds, 1e-9), self.counts
        packed = counts.rows - counts.padding_rows
        rates = {
            "samples_per_second": counts.samples / seconds,
            "tokens_per_second": counts.rows / seconds,
            "supervised_per_second": counts.supervised / seconds,
            "tflops_per_second": counts.flops / seconds / 1e12,
            "data_wait_share": self.waited / seconds,
            "padding_share": counts.padding_rows / max(1, counts.rows),
            "shared_token_share": 1 - packed / counts.sample_rows if counts.sample_rows else 0.0,
            "peak_memory_gib": peak_memory() / 2**30,
        }
        if peak_flops is not None:
            rates["mfu"] = counts.flops / seconds / peak_flops
        if token_budget is not None:
            rates["budget_fill"] = counts.rows / max(1, self.steps * token_budget)
        if self.stalled:
            rates["checkpoint_stall_seconds"] = self.stalled
        return rates


def _readable(line):
    """The rates of a training line in a few words."""
    if "samples_per_second" not in line:
        return ""
    peak = f" ({line['mfu']:.1%} of peak)" if "mfu" in line else ""
    return (
        f"{line['samples_per_second']:,.2f} samples/s, {line['tokens_per_second']:,.0f} tokens/s, "
        f"{line['tflops_per_second']:.3g} TFLOP/s{peak}, data wait {line['data_wait_share']:.1%}"
    )


def peak_memory() -> int:
    """Most bytes used so far: allocated on this process's GPU, or without one its resident set (which never falls)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_taken(estimated: int) -> str:
    """The memory that was planned, and the most that was used so far, in a line.

    Warns of a GPU whose allocator had to give back what it kept, and ask again.

    Args:
        estimated: bytes.
    """
    said = f"memory: estimated {estimated / 2**30:.1f} GiB, peak {peak_memory() / 2**30:.1f} GiB"
    if not torch.cuda.is_initialized():
        return f"{said} resident, Python and its libraries included"
    if retries := torch.cuda.memory_stats().get("num_alloc_retries", 0):
        log.warning(
            "GPU memory was short %d times, which costs time: the allocator had to free what it kept. Use "
            "--recompute with more layers, or smaller batches",
            retries,
        )
    return f"{said} allocated, {torch.cuda.max_memory_reserved() / 2**30:.1f} GiB reserved"


def _columns():
    """Of stderr's terminal. Some say 0: on them a bar is nothing."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80


def read_metrics(path: StrPath) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; what is no complete line (the process was killed while it wrote) is left out."""
    lines = []
    with naming(path), open(path, "rb") as file:
        for text in file:
            with contextlib.suppress(ValueError):
                line = json.loads(text)
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    lines.append(line)
    return lines


def _keep_lines(path, last_step):
    """Drop the lines of steps after `last_step`, and any torn one, and return the others; no kill loses a line."""
    lines = read_metrics(path) if path.exists() else []
    kept = [line for line in lines if line["step"] <= last_step] if last_step else []
    with atomic_path(path) as temporary:
        temporary.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    return kept


def _validated(line):
    """Whether a line tells of a validation."""
    return any(name.startswith("eval_") for name in line)


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
