"""What a run tells about itself: metrics.jsonl, TensorBoard, a progress bar, rates, and floating-point operations.

Nothing here waits for a device: callers hand over numbers that are on the host already.
"""

import contextlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

REPORTERS = ("tensorboard", "none")


class Metrics:
    """Counts, rates and logs of one training run. Only rank 0 writes and prints; on the others calls only count.

    Attributes:
        path: ``output_dir/metrics.jsonl``, one JSON object per line: ``step``, the values given to `log` in full
            precision (a non-finite one as null), and on training lines, over the steps since the last of them:
            ``samples_per_second``; ``tokens_per_second`` (packed rows, those of videos included);
            ``supervised_per_second``; ``data_wait_share`` (of the time, 0 to 1); ``peak_memory_gib`` (rank 0's GPU
            memory, without a GPU its resident set, since the process began); ``tflops_per_second`` (if counted) and
            ``mfu`` (if a peak was stated).
    """

    def __init__(self, output_dir, *, total_steps: int, start_step: int = 0, report_to=("tensorboard",),
                 progress: bool = True, rank: int = 0, peak_flops: float | None = None):
        """Start the clock.

        Args:
            output_dir: made if missing.
            total_steps: steps of the whole run, those before a resume included.
            start_step: steps done before; lines after it are dropped from metrics.jsonl (0: all lines).
            report_to: "tensorboard" or "none"; metrics.jsonl is always written.
            progress: show a bar where stderr is a terminal; otherwise a plain line per `log`.
            rank: of this process.
            peak_flops: floating-point operations per second of all devices together, to state `mfu` against.

        Raises:
            ValueError: an unknown reporter.
        """
        if unknown := set(report_to) - set(REPORTERS):
            raise ValueError(f"--report_to {' '.join(sorted(unknown))}: known are {' and '.join(REPORTERS)}")
        self.path = Path(output_dir) / "metrics.jsonl"
        self.total_steps, self.start_step, self.rank, self.peak_flops = total_steps, start_step, rank, peak_flops
        self._bar = self._file = self._tensorboard = None
        self._loss = math.nan
        self._run = self._window = _Counts()
        if rank == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            losses = [line["loss"] for line in _keep_lines(self.path, start_step) if line.get("loss") is not None]
            self._loss = losses[-1] if losses else math.nan
            self._file = open(self.path, "a", encoding="utf-8")
            if "tensorboard" in report_to:
                self._tensorboard = self._open_tensorboard()
            if progress and sys.stderr.isatty():
                form = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
                self._bar = tqdm(total=total_steps, initial=start_step, dynamic_ncols=True, bar_format=form)
        self._run, self._window = _Counts(), _Counts()

    def count(self, samples: int, rows: int, supervised: int, flops: float = 0.0) -> None:
        """One optimizer step is done: its samples, packed rows, supervised rows and operations, over all ranks."""
        for counts in (self._run, self._window):
            counts.add(samples, rows, supervised, flops)
        if self._bar is not None:
            self._bar.update()

    def wait(self, seconds: float) -> None:
        """The step loop has waited for data."""
        self._window.waited += seconds

    @contextlib.contextmanager
    def paused(self):
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
            values: host numbers by name, such as epoch, loss, learning_rate, grad_norm; or eval_loss.

        Returns:
            The line, on every rank.
        """
        line = {"step": step, **values}
        if "loss" in values:
            self._loss = values["loss"]
            line |= self._window.rates(self.peak_flops)
            self._window = _Counts()
        if self.rank == 0:
            self._file.write(json.dumps({name: _finite(value) for name, value in line.items()}, allow_nan=False) + "\n")
            self._file.flush()
            if self._tensorboard is not None:
                for name, value in line.items():
                    tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
                    self._tensorboard.add_scalar(tag, value, step)
            self._show(line)
        return line

    def message(self, text: str) -> None:
        """Print a line on rank 0's stderr, above the bar."""
        if self.rank == 0 and self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        elif self.rank == 0:
            print(text, file=sys.stderr, flush=True)

    def summary(self) -> str:
        """The run so far (since a resume) in one line."""
        run, rates = self._run, self._run.rates(None)
        steps = f"{run.steps:,} steps" + (f" (after {self.start_step:,})" if self.start_step else "")
        return (f"{steps}, {run.samples:,} samples in {tqdm.format_interval(run.seconds)} "
                f"({rates['samples_per_second']:,.2f} samples/s), final loss {self._loss:.4f}, "
                f"peak memory {rates['peak_memory_gib']:.2f} GiB")

    def close(self) -> None:
        """End the bar and the files, and draw ``loss_curve.png`` beside them."""
        if self._file is None:
            return
        if self._bar is not None:
            self._bar.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._file.close()
        self._file = self._bar = self._tensorboard = None
        try:
            from fastvid.plots import draw_loss_curve
        except ImportError as error:
            self.message(f"no loss_curve.png: {error}; pip install matplotlib")
            return
        draw_loss_curve(self.path, self.path.with_name("loss_curve.png"))

    def _open_tensorboard(self):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            self.message(f"no TensorBoard: {error}; pip install tensorboard, or --report_to none")
            return None
        return SummaryWriter(self.path.parent / "tensorboard", purge_step=self.start_step + 1, flush_secs=10)

    def _show(self, line):
        rates = f"{line.get('samples_per_second', 0):,.1f} samples/s, {line.get('tokens_per_second', 0):,.0f} tokens/s"
        if self._bar is not None and "loss" in line:
            self._bar.set_postfix_str(f"loss {line['loss']:.4f}, {rates}")
            return
        shown = [f"{name} {line[name]:.4g}" for name in ("epoch", "loss", "eval_loss", "learning_rate") if name in line]
        if "loss" in line:
            left = self.total_steps - line["step"]
            eta = self._run.seconds / self._run.steps * left if self._run.steps else 0
            shown += [rates, f"ETA {tqdm.format_interval(eta)}"]
        self.message(", ".join([f"step {line['step']:,}/{self.total_steps:,}", *shown]))


class _Counts:
    """What was done since a moment."""

    def __init__(self):
        self.began = time.perf_counter()
        self.steps = self.samples = self.rows = self.supervised = 0
        self.flops = self.waited = 0.0

    def add(self, samples, rows, supervised, flops):
        self.steps += 1
        self.samples += samples
        self.rows += rows
        self.supervised += supervised
        self.flops += flops

    @property
    def seconds(self):
        return time.perf_counter() - self.began

    def rates(self, peak_flops):
        seconds = max(self.seconds, 1e-9)
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.rows / seconds,
            "supervised_per_second": self.supervised / seconds,
            "data_wait_share": self.waited / seconds,
            "peak_memory_gib": peak_memory() / 2**30,
        }
        if self.flops:
            rates["tflops_per_second"] = self.flops / seconds / 1e12
        if self.flops and peak_flops is not None:
            rates["mfu"] = self.flops / seconds / peak_flops
        return rates


def peak_memory() -> int:
    """Most bytes used so far: allocated on this process's GPU, or without one its resident set (which never falls)."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def model_flops(num_frozen: float, num_trained: float, rows: int, *, pairs: int = 0, width: int = 0,
                layers: int = 0) -> float:
    """Floating-point operations of one training step, as the usual formula counts them.

    ``4 * num_frozen * rows + 6 * num_trained * rows + 12 * pairs * width * layers``: a multiplication and an addition
    per weight and row in the forward pass, as many for the gradient of the input, as many again for the gradient of a
    trained weight (Kaplan et al. 2020, appendix B); in attention two products forward and four backward, of pairs that
    the causal mask lets through only (Chowdhery et al. 2022, appendix B, halved as FlashAttention does).
    Recomputation does not count. Add up calls for parts that see other rows (the head sees supervised rows only).

    Args:
        num_frozen, num_trained: weights of matrices (an embedding table is no matrix product).
        rows: packed rows that pass them.
        pairs: (query, key) pairs attended to, per head and layer; see `causal_pairs`.
        width: heads times head dimension.
        layers: with attention.
    """
    return (4.0 * num_frozen + 6.0 * num_trained) * rows + 12.0 * pairs * width * layers


def causal_pairs(query_lengths, key_lengths=None) -> int:
    """Pairs that a causal mask, aligned at each segment's last row, lets through; keys default to the queries."""
    keys = query_lengths if key_lengths is None else key_lengths
    return sum(q * k - q * (q - 1) // 2 for q, k in zip(query_lengths, keys, strict=True))


def read_metrics(path) -> list[dict]:
    """The lines of a metrics.jsonl; what is no complete line (the process was killed while it wrote) is left out."""
    lines = []
    with open(path, "rb") as file:
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
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return kept


def _finite(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value
