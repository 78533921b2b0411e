"""The loss over a validation set."""

import contextlib
import math

import torch

from fastvid.dist import parallel
from fastvid.training.state import TrainState


@torch.no_grad()
def evaluate(state: TrainState) -> float | None:
    """Loss per supervised token over the validation set, the same on every rank; NaN if it has no such token.

    None where a rank is to stop: who sends SIGTERM does not wait for the rest.
    """
    world = state.world
    assert state.evaluation is not None
    total, supervised = torch.zeros((), dtype=torch.float64, device=world.device), 0
    parallel.reshard(state.model)
    with state.averaged(), contextlib.closing(state.evaluation.iterate(0, lambda: state.stop_signal)) as steps:
        for batches, _ in steps:
            halted = world.sum_on_host([state.stop_signal or batches is None])[0]
            if batches is None or halted:
                return None
            for batch in state.staging.copies(batches):
                total += state.model(batch)
                supervised += batch.num_supervised
    parallel.reshard(state.model)
    total, supervised = world.sum_on_host([total.item(), supervised])
    return total / supervised if supervised else math.nan
