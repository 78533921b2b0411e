"""What follows a step of the loop: what is due, its line, and the ends that a run may come to."""

from fastvid.training import diagnosis, recovery
from fastvid.training.metrics import Metrics
from fastvid.training.state import StepResult, TrainState

_DRAWN_BEFORE_JUDGED = 64  # samples, before the share of those that are skipped says something


def due(state: TrainState, strategy: str, every: float) -> bool:
    """Whether the step just done is one to save or validate at."""
    if strategy == "steps":
        return state.step % every == 0
    epoch, ends = state.order.epoch_after, state.step == state.order.total_steps  # maybe within an epoch
    return strategy == "epoch" and (ends or int(epoch(state.step)) > int(epoch(state.step - 1)))


def validation_due(state: TrainState) -> bool:
    """Whether the step just done is one to validate at."""
    return bool(state.evaluation or state.tasks) and due(state, state.config.eval_strategy, state.config.eval_steps)


def too_many_skipped(state: TrainState, result: StepResult) -> str | None:
    """Why the run ends, where more samples are skipped than may be; None otherwise."""
    limit = state.config.max_skipped
    if result.drawn < min(_DRAWN_BEFORE_JUDGED, len(state.loader.samples)) or result.skipped <= limit * result.drawn:
        return None
    return (
        f"{result.skipped} of {result.drawn} samples were skipped, more than --max_skipped {limit:g} of them; mend "
        "what the lines above name, or raise --max_skipped"
    )


def log_step(state: TrainState, result: StepResult, metrics: Metrics) -> None:
    """Write the line of the steps since the last one."""
    steps = state.step - state.logged_step
    metrics.log(
        state.step,
        {
            "epoch": state.order.epoch_after(state.step),
            "loss": state.loss_sum.item() / steps,
            "learning_rate": result.learning_rate,
            "grad_norm": result.gradient_norm.item(),
            "skipped_samples": recovery.skipped_samples(state),
        },
    )
    state.loss_sum.zero_()
    state.logged_step = state.step


def stop(state: TrainState, metrics: Metrics) -> int:
    """Keep the state after the last step, and give up as a signal asked; all ranks together."""
    number = max(state.world.gather_objects(state.stop_signal))
    if (failed := int(state.optimizer.failed_step)) >= 0:
        return end_not_finite(state, failed, metrics)
    if broken := diagnosis.broken_by_an_update(state):
        metrics.message(f"training ends after step {state.step}: {broken}")
        return 1
    if not state.saver.has(state.step):
        metrics.stall(recovery.save(state))
    state.saver.wait()
    metrics.message(f"stopped by a signal after step {state.step}; the same command goes on from there")
    return 128 + number


def end_not_finite(state: TrainState, failed: int, metrics: Metrics) -> int:
    """Keep the state before step `failed` (from 0), say what made it non-finite, and give up."""
    state.step = failed
    state.optimizer.failed_step.fill_(-1)
    said = f"step {failed + 1} is not finite; "
    if broken := diagnosis.broken_by_an_update(state):
        metrics.message(said + broken)
        return 1
    if not state.saver.has(state.step):
        recovery.save(state)
    metrics.message(
        f"{said}no parameter or moment has changed since the step before it. "
        + diagnosis.explain_not_finite(state, failed)
    )
    return 1
