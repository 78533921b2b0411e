"""Where a run reports its figures beside metrics.jsonl: TensorBoard, trackio, wandb, MLflow. A small class each.

A class takes a `Run`, then lines of figures. What it needs to know again when the run goes on, it keeps in
``output_dir/reporters.json``. None of their packages is imported before a run reports to it.
"""

import contextlib
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

KEPT = "reporters.json"


class Run(NamedTuple):
    """What a run tells of itself.

    Attributes:
        folder: its ``--output_dir``.
        flags: all of its flags.
        name: of the run.
        project: it belongs to; None: what the reporter's own variable says, else "fastvid".
        start_step: steps that were done before.
    """

    folder: Path
    flags: dict
    name: str
    project: str | None = None
    start_step: int = 0

    def project_or(self, variable: str) -> str:
        return self.project or os.environ.get(variable) or "fastvid"

    def kept(self) -> dict:
        """What reporters kept of the run; empty where there is nothing that can be read."""
        with contextlib.suppress(ValueError, TypeError, OSError):
            return dict(json.loads((self.folder / KEPT).read_text()))
        return {}

    def keep(self, **values: object) -> None:
        (self.folder / KEPT).write_text(json.dumps(self.kept() | values) + "\n")


class TensorBoard:
    """Event files in ``output_dir/tensorboard``: scalars, the flags as text, and as hyperparameters."""

    package = "tensorboard"

    def __init__(self, run: Run):
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(run.folder / "tensorboard", purge_step=run.start_step + 1, flush_secs=10)
        rows = [f"| {name} | {value} |" for name, value in run.flags.items()]
        self.writer.add_text("flags", "\n".join([f"| {run.name} | |", "|---|---|", *rows]), run.start_step)
        plain = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in run.flags.items()
        }
        assert self.writer.file_writer is not None, "it was just made"
        for summary in hparams(plain, {"train/loss": 0}):
            self.writer.file_writer.add_summary(summary)

    def log(self, step: int, values: dict) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class Trackio:
    """trackio's local store (``TRACKIO_DIR``)."""

    package = "trackio"

    def __init__(self, run: Run):
        import trackio  # pyright: ignore[reportMissingImports]  # of the extra `reporters`

        self.trackio = trackio
        with contextlib.redirect_stdout(sys.stderr):
            trackio.init(
                project=run.project_or("TRACKIO_PROJECT"),
                name=run.name,
                config=_plain(run.flags),
                resume="allow" if run.start_step else "never",
                embed=False,
            )

    def log(self, step: int, values: dict) -> None:
        self.trackio.log(values, step=step)

    def close(self) -> None:
        with contextlib.redirect_stdout(sys.stderr):
            self.trackio.finish()


class Wandb:
    """Weights & Biases; ``WANDB_MODE=offline`` needs neither an account nor a network."""

    package = "wandb"

    def __init__(self, run: Run):
        import wandb  # pyright: ignore[reportMissingImports]  # of the extra `reporters`

        self.run = wandb.init(
            project=run.project_or("WANDB_PROJECT"),
            name=run.name,
            dir=str(run.folder),
            config=_plain(run.flags),
            id=run.kept().get("wandb"),
            resume="allow",
        )
        run.keep(wandb=self.run.id)
        # wandb drops what is logged for a step below its last one, which a run that goes on from a checkpoint has.
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, values: dict) -> None:
        self.run.log({**values, "step": step})

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """MLflow's server (``MLFLOW_TRACKING_URI``), or without one ``output_dir/mlflow.db``."""

    package = "mlflow"

    def __init__(self, run: Run):
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]  # of the extra `reporters`
        from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]  # as before

        self.metric = Metric
        folder = run.folder.resolve()
        own = None if os.environ.get("MLFLOW_TRACKING_URI") else f"sqlite:///{folder}/mlflow.db"
        self.client = MlflowClient(tracking_uri=own, registry_uri=own)
        self.run_id = run.kept().get("mlflow")
        if self.run_id is None:
            project = run.project_or("MLFLOW_EXPERIMENT_NAME")
            found = self.client.get_experiment_by_name(project)
            experiment = (
                found.experiment_id
                if found
                else self.client.create_experiment(
                    project, artifact_location=(folder / "mlartifacts").as_uri() if own else None
                )
            )
            self.run_id = self.client.create_run(experiment, run_name=run.name).info.run_id
            self.client.log_batch(
                self.run_id,
                params=[
                    Param(name, str(value)[:500]) for name, value in run.flags.items() if value not in (None, "", [])
                ],
            )
            run.keep(mlflow=self.run_id)
        else:
            self.client.update_run(self.run_id, status="RUNNING")

    def log(self, step: int, values: dict) -> None:
        now = int(time.time() * 1000)
        self.client.log_batch(self.run_id, [self.metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        self.client.set_terminated(self.run_id)


REPORTERS = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb, "mlflow": MLflow}


def chosen(names: Iterable[str]) -> list[str]:
    """The reporters that ``--report_to`` means: none, those named, or with "all" those that are installed.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    names = [name.lower() for name in names]
    if unknown := [name for name in names if name not in (*REPORTERS, "all", "none")]:
        raise ValueError(f"--report_to {' '.join(unknown)}: known are {', '.join(REPORTERS)}, all and none")
    names = [name for name in names if name != "none"]  # beside others it means nothing
    if "all" in names:
        return [name for name, reporter in REPORTERS.items() if _installed(reporter.package)]
    for name in names:
        # TensorBoard is what a run reports to that was told nothing: `open_reporters` goes on without it.
        if name != "tensorboard" and not _installed(REPORTERS[name].package):
            package = REPORTERS[name].package
            raise ValueError(
                f"--report_to {name}: {package} is not installed; pip install {package}, or choose --report_to none"
            )
    return list(dict.fromkeys(names))


def open_reporters(names: Iterable[str], run: Run, say: Callable[[str], object]) -> dict[str, Any]:
    """{name: reporter} of those chosen.

    Args:
        say: called with a line for the user, where TensorBoard is missing.

    Raises:
        ValueError: as `chosen`; or a reporter that cannot begin, such as one that wants an account.
    """
    opened = {}
    if not run.start_step:
        (run.folder / KEPT).unlink(missing_ok=True)  # of a run before this one
    for name in chosen(names):
        try:
            opened[name] = REPORTERS[name](run)
        except ImportError as error:
            if name != "tensorboard":
                raise ValueError(f"--report_to {name}: {error}; pip install {REPORTERS[name].package}") from error
            say(f"no TensorBoard: {error}; pip install tensorboard, or --report_to none")
        except Exception as error:  # each has errors of its own, and none of them is a defect of the run
            offline = ", or set WANDB_MODE=offline" if name == "wandb" else ""
            raise ValueError(
                f"--report_to {name} cannot begin: {' '.join(str(error).split())}; mend that{offline}, or "
                "choose --report_to none"
            ) from error
    return opened


def figures(line: dict[str, Any]) -> dict[str, float]:
    """{"train/…" or "eval/…": finite number} of a line of metrics.jsonl, its step apart."""
    return {
        f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}": value
        for name, value in line.items()
        if name != "step" and isinstance(value, int | float) and math.isfinite(value)
    }


def _installed(package):
    return (package in sys.modules and sys.modules[package] is not None) or (
        package not in sys.modules and importlib.util.find_spec(package) is not None
    )


def _plain(flags):
    return {name: value for name, value in flags.items() if value is not None}
