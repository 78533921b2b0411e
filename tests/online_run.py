"""A training run whose videos have no features yet, and a quick start for its encoder."""

import json
import os
import shutil
from multiprocessing.reduction import DupFd

from clips import draw
from ranks import FORKS
from towers import write_tower
from training_run import CHANNELS, flags, write_run

from fastvid.online import encoder, process

VIDEOS = tuple(f"clip{i}.mp4" for i in range(6)) + tuple(f"sub/clip{i}.mp4" for i in range(6, 12))
FRAMES, ROWS = 4, 4 + 4  # frames per video; with the patches of the tower
FORKS.set_forkserver_preload(["fastvid.video_features", "fastvid.earlier_features", "transformers", "online_run"])


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
    return flags(run, output, "--video_folder", str(run / "videos"), "--vision_tower", str(run / "tower"),
                 "--num_frames", str(FRAMES), "--num_train_epochs", "1", *more)


def start_quickly(patch):
    """Have encoders begin as forks of a process that has imported what they need, which they else do in seconds."""
    patch.setattr(encoder, "launch", _launch)


class _Process:
    """As `subprocess.Popen`."""

    def __init__(self, process):
        self.process, self.pid, self.kill = process, process.pid, process.kill

    def wait(self, timeout=None):
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise encoder.subprocess.TimeoutExpired("encoder", timeout)
        return self.process.exitcode


def _launch(*files):
    forked = FORKS.Process(target=_main, args=[DupFd(file) for file in files], daemon=True)
    forked.start()
    return _Process(forked)


def _main(*files):
    os._exit(process.main(*(file.detach() for file in files)))
