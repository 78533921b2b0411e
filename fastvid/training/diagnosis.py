"""What made a step non-finite: weights or moments, and since when; or the samples of a rank."""

import torch

from fastvid.data.packing import pack
from fastvid.dist.sharding import local_shard
from fastvid.model.finite import not_finite
from fastvid.training.state import TrainState


def broken_by_an_update(state: TrainState) -> str | None:
    """What trained weights and moments are not finite after the steps done, in a line; None if all are finite.

    All ranks call it and get the same.
    """
    found = not_finite({**state.optimizer.parameters, **state.optimizer.state_tensors()})
    names = [name for names in state.world.gather_objects(found) for name in names]
    if not names:
        return None
    config, names = state.config, list(dict.fromkeys(names))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more} not finite since the update of step {state.step}, though its loss and "
        f"gradient were finite: look at --learning_rate {config.learning_rate:g}, --adam_beta1 "
        f"{config.adam_beta1:g}, --adam_beta2 {config.adam_beta2:g} and --adam_epsilon {config.adam_epsilon:g}, "
        "not at the samples. No checkpoint is written of this; those before it stay as they are"
    )


def explain_not_finite(state: TrainState, failed: int) -> str:
    """Name the rank and the samples that made step `failed` non-finite.

    Computes the step's micro-batches again, one at a time over all ranks, with the parameters as they were before it.

    Returns:
        One line, the same on every rank.
    """
    batches, _ = state.loader.read(failed)
    nothing = pack([], state.tokenizer.tokens, state.loader.samples.channels)
    found = []
    for rank in range(state.world.size):
        for i, batch in enumerate(batches):
            state.draw(failed, i)
            mine = batch if rank == state.world.rank else nothing
            loss = state.model(mine.to(state.world.device)) / max(1, batch.num_supervised)
            loss.backward()
            finite = bool(torch.isfinite(loss.detach()))
            gradients = all(
                torch.isfinite(local_shard(p.grad)).all().item()
                for p in state.optimizer.parameters.values()
                if p.grad is not None
            )
            for parameter in state.optimizer.parameters.values():
                parameter.grad = None
            found.append((finite, gradients, batch.sample_ids))
    state.end_draws()
    said = state.world.gather_objects(found)
    lines = []
    for i in range(len(found)):
        rank = i // len(batches)
        finite, _, sample_ids = said[rank][i]
        if not (finite and all(seen[i][1] for seen in said)):
            what = "gradient" if finite else "loss"
            lines.append(f"rank {rank}: non-finite {what}, samples {', '.join(sample_ids)}")
    return "; ".join(lines) or "no micro-batch is non-finite on its own: the sum over ranks and micro-batches is"
