"""Fixtures for tests of extraction: a tower, three videos, and the configuration of a job on them.

A test file names those it uses: ``made, job = extraction_job.made, extraction_job.job``.
"""

import os
import subprocess
import sys

import pytest
from clips import draw
from conftest import ROOT
from towers import write_tower

from fastvid.config import ExtractConfig

ROWS = 6 + 4  # frames per video, patches of the tower


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a tower and three videos, one in a sub-folder."""
    folder = tmp_path_factory.mktemp("extract")
    write_tower(folder / "tower")
    (folder / "videos" / "sub").mkdir(parents=True)
    for name, frames in (("a.mp4", 12), ("b.c.mkv", 4), ("sub/a.mp4", 9)):
        draw(folder / "videos" / name, frames)
    return folder


@pytest.fixture
def job(made, tmp_path):
    """Makes the configuration of a job on `made`, or on the videos given."""

    def config(videos=made / "videos", **options):
        settings = {"vision_tower": str(made / "tower"), "num_frames": 6, "device": "cpu", **options}
        return ExtractConfig(str(videos), str(tmp_path / "features"), **settings)

    return config


@pytest.fixture
def mixed(made, tmp_path):
    """A folder of three good videos and a broken one."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for name in ("a", "b", "d"):
        draw(folder / f"{name}.mp4", 5)
    (folder / "c.mp4").write_text("no video")
    return folder


def written(folder):
    """When each file below a folder was written."""
    files = [path for path in folder.rglob("*.*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}


def start(job, videos, *flags):
    """The reference's script in a process of its own, on a checkout that is not installed."""
    config = job(videos)
    command = [
        sys.executable,
        str(ROOT / "scripts" / "save_spatio_temporal_clip_features.py"),
        "--video_dir_path",
        config.video_dir_path,
        "--clip_feat_path",
        config.clip_feat_path,
        "--vision_tower",
        config.vision_tower,
        "--num_frames",
        "6",
        "--device",
        "cpu",
        *flags,
    ]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
