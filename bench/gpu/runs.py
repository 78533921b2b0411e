"""Training runs inside a task: whole ones, and the losses of a run's steps."""

import torch

from fastvid import export, train
from fastvid.config import TrainConfig
from fastvid.dist import parallel
from fastvid.flags import parse

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build(flags):
    """The state of a run of one process on the device that `flags` of a training command describe."""
    quiet = ("--mm_use_vid_start_end", "--report_to", "none", "--disable_tqdm", "True")
    world = parallel.World(0, 1, 0, torch.device(DEVICE), False)
    return train.build(parse(TrainConfig, [*map(str, flags), *quiet]), world)


def run(flags):
    """The state at the end of a whole run.

    Raises:
        RuntimeError: it ended early.
    """
    state = build(flags)
    if code := train.loop(state):
        raise RuntimeError(f"training ended with code {code} after step {state.step}")
    return state


def losses(flags):
    """The loss of every step."""
    state = build(flags)
    found = [train.train_step(state, batches).loss for batches, _ in state.loader.iterate()]
    return torch.stack(found).tolist()


def as_base(checkpoint, folder):
    """Write a whole run's checkpoint as a folder that other runs start from."""
    export.main(["--checkpoint", str(checkpoint), "--format", "llama", "--output", str(folder)])
