"""``--tokens_per_batch auto``: batches that fill the cards, the same on all ranks and as long as a run goes on."""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from fastvid.checkpoints import checkpoint, folders
from fastvid.config import TrainConfig, older_names
from fastvid.dist import parallel
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
    begun, before = world.gather_objects(_begun(config) if world.is_main else (False, None))[0]
    if begun:
        log.info("batches are those that the run began with: %s", _told(before, config))
        return replace(config, tokens_per_batch=before)
    memory = given_memory(config) or min(world.gather_objects(_card(world.device)))
    budget = next((tokens for size, tokens in BUDGETS if memory >= size), None)
    if budget is not None:
        budget = max(budget, config.model_max_length)  # every sample fits
        log.info("batches for cards of %.0f GiB: %s", memory / 2**30, _told(budget, config))
    return replace(config, tokens_per_batch=budget)


def _told(budget, config):
    if budget is None:
        return f"{config.per_device_train_batch_size} samples each"
    return f"{budget:,} tokens each"


def _begun(config) -> tuple[bool, int | None]:
    """(Whether there is a run to go on from, the budget of its batches)."""
    output = Path(config.output_dir)
    if config.resume == "never" or not output.is_dir():
        return False, None
    for step in sorted(folders.steps(output), reverse=True):
        try:
            saved = checkpoint.read_state(output / f"checkpoint-{step}")["config"]
        except (ValueError, OSError, LookupError, TypeError):  # damaged or another program's: resuming tells
            continue
        older = older_names(TrainConfig)
        budget = {older.get(name, name): value for name, value in saved.items()}.get("tokens_per_batch")
        return True, budget if isinstance(budget, int) else None
    return False, None


def _card(device: torch.device) -> int:
    """Bytes of a GPU's memory; 0 of a CPU."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0
