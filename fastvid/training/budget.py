"""What a batch is: of ``--tokens_per_batch auto``, and where no flag says.

Batches are the same on all ranks, and as long as a run goes on.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastvid.checkpoints import checkpoint, folders
from fastvid.config import TrainConfig, older_names
from fastvid.data.dataset import SampleSet
from fastvid.data.loader import Loader, TrainingOrder, training_loader
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

    A run that goes on has the batches that it began with, on other cards too; so has one whose flags say nothing of
    batches, if a step has as many samples. Otherwise the smallest card decides, of those of all ranks. Every rank calls
    it.
    """
    auto = config.tokens_per_batch == "auto"
    if not auto and not _open(config):
        return config
    begun = world.gather_objects(_begun(config) if world.is_main else None)[0]
    if begun is not None:
        if auto:
            config = replace(config, tokens_per_batch=begun["tokens_per_batch"])
        config = _as_begun(config, begun)
        if auto:
            log.info("batches are those that the run began with: %s", _told(config.token_budget, config))
        return config
    if not auto:
        return config
    memory = given_memory(config) or min(world.gather_objects(_card(world.device)))
    budget = next((tokens for size, tokens in BUDGETS if memory >= size), None)
    if budget is not None:
        budget = max(budget, config.model_max_length)  # every sample fits
        log.info("batches for cards of %.0f GiB: %s", memory / 2**30, _told(budget, config))
    return replace(config, tokens_per_batch=budget)


def micro_batches(config: TrainConfig) -> Iterator[TrainConfig]:
    """The configuration with each number of samples a micro-batch that it leaves to the plan, most first.

    Steps take the same samples, and losses weigh each supervised token alike, in however many micro-batches. Where they
    do not, as the reference's mean of means and NEFTune's bound do not, there is one choice. So there is where flags,
    or the run's beginning, say what a batch is.
    """
    samples, yielded = config.batch_size, replace(config, per_device_train_batch_size=config.batch_size)
    yield yielded
    if not _open(config) or config.policy.mean_of_means or config.neftune_noise_alpha is not None:
        return
    while samples > 1:
        samples //= 2
        more = config.gradient_accumulation_steps * (config.batch_size // samples)
        yield replace(config, per_device_train_batch_size=samples, gradient_accumulation_steps=more)


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

    def plan_of(config):
        loader = training_loader(config, samples, world)
        return config, loader, planning.plan(config, precision, model_config, loader, world, attention)

    first, *smaller = micro_batches(config)
    config, loader, plan = plan_of(first)
    for each in smaller:
        if not plan.lacks:
            break
        config, loader, plan = plan_of(each)
    if config.batch_size < first.batch_size:
        most, times = first.batch_size, first.batch_size // config.batch_size
        said = f"micro-batches of {config.batch_size}, {times} times as many, for {most} do not fit"
        plan = replace(plan, told=f"{plan.told}; {said}")
    return config, loader, plan


def _open(config):
    """Whether nothing says how many samples a batch has, or tokens."""
    return config.per_device_train_batch_size is None and config.tokens_per_batch in (None, "auto")


def _as_begun(config, begun):
    """With the run's own micro-batches, if the configuration leaves them open and a step has as many samples."""
    samples, accumulation = begun["per_device_train_batch_size"], begun["gradient_accumulation_steps"]
    if not _open(config) or samples * accumulation != config.batch_size * config.gradient_accumulation_steps:
        return config
    return replace(config, per_device_train_batch_size=samples, gradient_accumulation_steps=accumulation)


def _told(budget, config):
    if budget is None:
        return f"{config.batch_size} samples each"
    return f"{budget:,} tokens each"


def _begun(config) -> dict[str, Any] | None:
    """What batches the run has that there is to go on from, by flag."""
    output = Path(config.output_dir)
    if config.resume == "never" or not output.is_dir():
        return None
    for step in sorted(folders.steps(output), reverse=True):
        try:
            saved = checkpoint.read_state(output / f"checkpoint-{step}")["config"]
            older = older_names(TrainConfig)
            named = {older.get(name, name): value for name, value in saved.items()}
            budget = named.get("tokens_per_batch")
            found = {name: int(named[name]) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
            return {"tokens_per_batch": budget if isinstance(budget, int) else None, **found}
        except (ValueError, OSError, LookupError, TypeError, AttributeError):  # damaged or another's: resuming tells
            continue
    return None


def _card(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
