"""What a training run consists of, and what one step of it gave."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastvid.checkpoints.saver import Saver
from fastvid.config import TrainConfig
from fastvid.data.loader import Loader, TrainingOrder
from fastvid.data.order.stream import EvaluationOrder
from fastvid.data.tokenizer import ModelTokenizer
from fastvid.dist import parallel
from fastvid.model.lora import draw_dropout
from fastvid.model.noise import Noise
from fastvid.model.video_llava import VideoLlava
from fastvid.training import flops, planning
from fastvid.training.average import Average
from fastvid.training.optimizer import Optimizer
from fastvid.training.staging import Staging


@dataclass
class TrainState:
    """Everything that a step touches.

    Attributes:
        evaluation: loader of the validation set, or None.
        tasks: benchmarks that are asked at validations (`fastvid.evaluation.beside_training.EvalTask`).
        plan: what was decided before the first step.
        average: of what is trained, over the steps; None without ``--ema_decay``.
        step: optimizer steps done.
        loss_sum: float64 scalar on the device, sum of the losses of the steps since the last log line.
        logged_step: the step of that line.
        stop_signal: signal that asked this rank to stop, or 0. SIGPIPE: nobody reads what it prints any more.
        skipped_before: samples that were skipped, on all ranks, before the run was resumed.
        run: by which checkpoints of this run are known, however often it is resumed.
        content: on rank 0 what the run is made of (`fastvid.training.content`), once that was asked.
    """

    config: TrainConfig
    world: parallel.World
    tokenizer: ModelTokenizer
    model: VideoLlava
    optimizer: Optimizer
    loader: Loader[TrainingOrder]
    evaluation: Loader[EvaluationOrder] | None
    formula: flops.Formula
    loss_sum: torch.Tensor
    saver: Saver
    staging: Staging
    plan: planning.Plan
    average: Average | None = None
    tasks: Sequence[Any] = ()
    step: int = 0
    logged_step: int = 0
    stop_signal: int = 0
    skipped_before: int = 0
    run: str | None = None
    content: dict[str, Any] | None = None

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within it the model is the average of its steps, if there is one."""
        return contextlib.nullcontext() if self.average is None else self.average.in_place()

    @property
    def order(self) -> TrainingOrder:
        """Which samples each step takes (`fastvid.data.order.stream`)."""
        return self.loader.order

    def draw(self, step: int, micro_batch: int) -> None:
        """Draw anew what is random in this rank's micro-batch of a step: what LoRA's dropout leaves out, and NEFTune's
        noise. It is the same whenever a run computes it."""
        lora, alpha = self.config.trainable.lora, self.config.neftune_noise_alpha
        numbers = self.config.seed, step, micro_batch * self.world.size + self.world.rank
        if lora is not None and lora.dropout:
            draw_dropout(self.model, numbers)
        if alpha is not None:
            self.model.noise = Noise(alpha, numbers)

    def end_draws(self) -> None:
        """From now on nothing is random."""
        draw_dropout(self.model, None)
        self.model.noise = None


@dataclass(frozen=True)
class StepResult:
    """One step over all ranks. Loss and gradient norm stay on the device; the counts are known to the host.

    Attributes:
        loss, gradient_norm: fp32 scalars; the norm before clipping.
        learning_rate: that the update used.
        counts: samples, rows, operations and so on.
        waited: seconds that a rank waited for data before it, on average.
        stop_signal: the signal that asked any rank to stop, or 0.
        drawn: samples drawn since this process began, on all ranks; `skipped` of them could not be used.
    """

    loss: torch.Tensor
    gradient_norm: torch.Tensor
    learning_rate: float
    counts: flops.StepCounts
    waited: float
    stop_signal: int
    drawn: int
    skipped: int
