"""What a batch is: of ``--tokens_per_batch auto``, and where no flag says.

Batches are the same on all ranks, and as long as a run goes on.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from fastvid.checkpoints import checkpoint, folders
from fastvid.config import TrainConfig, older_names
from fastvid.data.dataset import SampleSet
from fastvid.data.loader import Loader, TrainingOrder, groups_of, training_loader
from fastvid.dist import parallel
from fastvid.model.attention import Attention
from fastvid.model.config import ModelConfig, Precision
from fastvid.training import planning
from fastvid.training.checks import given_memory

log = logging.getLogger("fastvid")

# (bytes that a card has at least, tokens): cards of 141 and of 80 GB; multiples of 64 rows on 132 multiprocessors.
BUDGETS = ((128 * 2**30, 16896), (70 * 2**30, 8448))


def settled_budget(config: TrainConfig, world: parallel.World) -> TrainConfig:
    """The configuration with what "auto" means: a number of tokens, or None for samples.

    A run that goes on has the batches that it began with, on other cards too. Otherwise the smallest card decides, of
    those of all ranks. Every rank calls it.
    """
    if config.tokens_per_batch != "auto":
        return config
    begun = world.gather_objects(_begun(config) if world.is_main else None)[0]
    if begun is not None:
        config = replace(config, tokens_per_batch=begun.tokens_per_batch)
        log.info("batches are those that the run began with: %s", _told(config.token_budget, begun.samples))
        return config
    memory = given_memory(config) or min(world.gather_objects(_card(world.device)))
    budget = next((tokens for size, tokens in BUDGETS if memory >= size), None)
    if budget is not None:
        budget = max(budget, config.model_max_length)  # every sample fits
        log.info("batches for cards of %.0f GiB: %s", memory / 2**30, _told(budget, config.batch_size))
    return replace(config, tokens_per_batch=budget)


def micro_batches(config: TrainConfig, begun: "Begun | None" = None) -> Iterator[TrainConfig]:
    """The configuration with each number of samples a micro-batch that it leaves to the plan, most first.

    Steps take the same samples, and losses weigh each supervised token alike, in however many micro-batches. Where they
    do not, there is one choice: the reference's mean of means, NEFTune's bound and LoRA's dropout depend on the
    micro-batch. So there is where flags say how many samples or tokens a micro-batch has.

    Args:
        begun: of the run that goes on, whose micro-batches are the largest if a step has as many samples.
    """
    step = config.batch_size * config.gradient_accumulation_steps
    samples = config.batch_size
    if begun is not None and _open(config) and begun.samples * begun.accumulation == step:
        samples = begun.samples
    yield replace(config, per_device_train_batch_size=samples, gradient_accumulation_steps=step // samples)
    lora = config.trainable.lora
    drops = lora is not None and lora.dropout > 0
    if not _open(config) or config.policy.mean_of_means or config.neftune_noise_alpha is not None or drops:
        return
    while samples > 1:
        samples = next(fewer for fewer in range(samples // 2, 0, -1) if step % fewer == 0)
        yield replace(config, per_device_train_batch_size=samples, gradient_accumulation_steps=step // samples)


def planned(
    config: TrainConfig,
    precision: Precision,
    model_config: ModelConfig,
    samples: SampleSet,
    world: parallel.World,
    attention: Attention,
) -> tuple[TrainConfig, Loader[TrainingOrder], planning.Plan]:
    """(configuration, batches, plan) of the first of `micro_batches` that fits, or of the last one.

    Args:
        samples: that fit the model (`SampleSet.fit`).
        (others: as of `planning.plan`.)

    Raises:
        ValueError: as `training_loader` and `planning.plan`.
    """

    groups = groups_of(config, samples)

    def plan_of(config):
        loader = training_loader(config, samples, world, groups)
        return config, loader, planning.plan(config, precision, model_config, loader, world, attention)

    begun = None
    if _open(config):
        begun = world.gather_objects(_begun(config) if world.is_main else None)[0]
    if begun is not None and begun.ended:
        begun = None  # goes on with no step, or is another run's
    most = config.batch_size
    first, *smaller = micro_batches(config, begun)
    config, loader, plan = plan_of(first)
    for each in smaller:
        if not plan.lacks:
            break
        config, loader, plan = plan_of(each)
    if config.batch_size < most:
        number, size = config.gradient_accumulation_steps, config.batch_size
        why = f"{first.batch_size} do not fit" if size < first.batch_size else "the run began with them"
        instead = f" in place of {first.gradient_accumulation_steps}" * (size < first.batch_size)
        said = f"micro-batches of {size} sample{'s' * (size > 1)} ({number} per step{instead}): {why}"
        plan = replace(plan, told=f"{plan.told}; {said}")
    return config, loader, plan


@dataclass(frozen=True)
class Begun:
    """What batches a run has that there is to go on from.

    Attributes:
        tokens_per_batch: a number, or None.
        samples: of a micro-batch.
        accumulation: micro-batches of a step.
        ended: whether all its steps are done, as far as flags tell.
    """

    tokens_per_batch: int | None
    samples: int
    accumulation: int
    ended: bool


def _open(config):
    """Whether no flag says how many samples a micro-batch has, or tokens."""
    return config.per_device_train_batch_size is None and config.tokens_per_batch in (None, "auto")


def _told(budget, samples):
    if budget is None:
        return f"{samples} samples each"
    return f"{budget:,} tokens each"


def _begun(config) -> Begun | None:
    """What batches the run has that there is to go on from."""
    output = Path(config.output_dir)
    if config.resume == "never" or not output.is_dir():
        return None
    for step in sorted(folders.steps(output), reverse=True):
        try:
            state = checkpoint.read_state(output / f"checkpoint-{step}")
            older = older_names(TrainConfig)
            named = {older.get(name, name): value for name, value in state["config"].items()}
            budget = named.get("tokens_per_batch")
            as_long = all(named.get(name) == getattr(config, name) for name in ("num_train_epochs", "max_steps"))
            return Begun(
                budget if isinstance(budget, int) else None,
                int(named["per_device_train_batch_size"]),
                int(named["gradient_accumulation_steps"]),
                as_long and state["step"] == state.get("total_steps"),
            )
        except (ValueError, OSError, LookupError, TypeError, AttributeError):  # damaged or another's: resuming tells
            continue
    return None


def _card(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
