"""A training run whose videos have no features yet, and a quick start for its encoder."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import torch
from clips import draw
from towers import write_tower
from training_run import CHANNELS, flags, write_run

from fastvid.online import encoder, process

VIDEOS = tuple(f"clip{i}.mp4" for i in range(6)) + tuple(f"sub/clip{i}.mp4" for i in range(6, 12))
FRAMES, ROWS = 4, 4 + 4  # frames per video; with the patches of the tower


def write_videos(folder):
    """What `write_run` writes, with videos/ instead of feats/, and tower/."""
    write_run(folder)
    shutil.rmtree(folder / "feats")
    (folder / "videos" / "sub").mkdir(parents=True)
    records = json.loads((folder / "train.json").read_text())
    for i, (name, record) in enumerate(zip(VIDEOS, records)):
        draw(folder / "videos" / name, 3 + i)
        record["video"] = name
    (folder / "train.json").write_text(json.dumps(records))
    write_tower(folder / "tower", hidden_size=CHANNELS, heads=2)
    return folder


def online_flags(run, output, *more):
    """The command line of a run of one epoch on the videos."""
    return flags(
        run,
        output,
        "--video_folder",
        str(run / "videos"),
        "--vision_tower",
        str(run / "tower"),
        "--num_frames",
        str(FRAMES),
        "--num_train_epochs",
        "1",
        *more,
    )


def start_quickly(patch):
    """Have encoders begin as forks of this process, which has imported what they need; else that takes seconds."""
    patch.setattr(encoder, "launch", _launch)


def forked(function, *args, **environment):
    """A forked process that calls `function`; its exit code is what that returns."""
    child = multiprocessing.get_context("fork").Process(target=_in_child, args=(function, args, environment))
    child.start()
    return child


class _Process:
    """As `subprocess.Popen`."""

    def __init__(self, child):
        self.child, self.pid, self.kill = child, child.pid, child.kill

    def wait(self, timeout=None):
        self.child.join(timeout)
        if self.child.exitcode is None:
            raise subprocess.TimeoutExpired("encoder", timeout)
        return self.child.exitcode


def _launch(*files):
    return _Process(forked(process.main, *files))


def _in_child(function, args, environment):
    torch.set_num_threads(1)  # a pool of threads does not outlive a fork
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)
    os.environ |= environment
    code = 1
    try:
        code = function(*args)
    finally:
        sys.stderr.flush()
        os._exit(code)
