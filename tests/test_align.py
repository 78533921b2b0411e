"""A new pair of language model and tower: its projector learns on images, and then on videos, by the launch scripts."""

import json
import os
import socket
import subprocess
import sys
import threading

import forks
import numpy as np
import pytest
from clips import draw
from conftest import ROOT
from family_folders import CHANNELS, write_model
from PIL import Image
from safetensors.torch import load_file, save_file
from towers import write_tower
from training_run import losses
from waiting import LONG

from fastvid.config import ExtractConfig
from fastvid.extract import extract
from fastvid.inference.chat import Chat

# Colours on the left and on the right, which the patches of a picture tell apart.
COLOURS = {"red": (220, 30, 30), "blue": (30, 30, 220)}


def picture(left, right):
    pixels = np.zeros((28, 28, 3), np.uint8)
    pixels[:, :14], pixels[:, 14:] = COLOURS[left], COLOURS[right]
    return pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A language model without a projector, a tower, images with records of LLaVA's kind, and videos."""
    folder = tmp_path_factory.mktemp("align")
    base, tower = write_model(folder / "model", "qwen3"), write_tower(folder / "tower", hidden_size=CHANNELS, heads=2)
    state = load_file(base / "model.safetensors")
    without = {name: tensor for name, tensor in state.items() if "mm_projector" not in name}
    assert len(without) == len(state) - 4
    save_file(without, base / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if not k.startswith("mm_")}))
    (folder / "images" / "00").mkdir(parents=True), (folder / "videos").mkdir()
    records = []
    for i in range(8):
        pair = ("red", "blue")[:: 1 if i % 2 else -1]
        Image.fromarray(picture(*pair)).save(folder / "images" / "00" / f"{i}.png")
        turns = [{"from": "human", "value": "What is it?\n<image>"}, {"from": "gpt", "value": pair[0]}]
        records.append({"id": str(i), "image": f"00/{i}.png", "conversations": turns})
    (folder / "images.json").write_text(json.dumps(records))
    asked = [{"from": "human", "value": "<video>\nWhat is it?"}, {"from": "gpt", "value": "red"}]
    for i in range(2):
        draw(folder / "videos" / f"{i}.mp4", 4)
    videos = [{"id": str(i), "video": f"{i}.mp4", "conversations": asked} for i in range(2)]
    (folder / "videos.json").write_text(json.dumps(videos))
    settings = {"vision_tower": str(tower), "num_frames": 4, "device": "cpu"}
    extract(ExtractConfig(str(folder / "videos"), str(folder / "video_features"), **settings))
    return folder


def free_port():
    with socket.socket() as held:
        held.bind(("localhost", 0))
        return held.getsockname()[1]


# Stands for torchrun: says how it was called, and ends with the code that it is told.
TORCHRUN = """#!/usr/bin/env bash
{ printf '%s\\0' $# "$@"; env -0; } > "$CALLED"
read -r code < "$ENDED"
exit "$code"
"""


def run_called(folder):
    """Run what the stand-in is called with, until its pipe says nothing: the real torchrun, as forks."""
    while called := (folder / "called").read_bytes():
        count, *words = called.decode().split("\0")[:-1]
        arguments, environment = words[: int(count)], dict(word.split("=", 1) for word in words[int(count) :])
        with open(folder / "log", "a") as log:
            command = [sys.executable, "-m", "torch.distributed.run", *arguments]
            done = forks.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
            (folder / "ended").write_text(f"{done.wait(LONG)}\n")


def launch(folder, script, *flags, **variables):
    (folder / "bin").mkdir(exist_ok=True)
    (folder / "bin" / "torchrun").write_text(TORCHRUN)
    (folder / "bin" / "torchrun").chmod(0o755)
    for name in ("called", "ended"):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)
    paths = {
        "PATH": f"{folder / 'bin'}:{sys.prefix}/bin:{os.environ['PATH']}",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "CALLED": str(folder / "called"),
        "ENDED": str(folder / "ended"),
    }
    settings = {"MODEL": "model", "NPROC_PER_NODE": "1", "BATCH": "4", "MAX_RESTARTS": "0", **variables}
    thread = threading.Thread(target=run_called, args=[folder])
    thread.start()
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / script), "--report_to", "none", "--disable_tqdm", *flags],
        cwd=folder,
        env=os.environ | paths | settings,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    (folder / "called").write_text("")
    thread.join()
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()


@pytest.mark.slow
def test_a_new_projector_is_aligned_on_images_and_goes_on_with_videos(folder):
    ports = {"RDZV_ENDPOINT": f"localhost:{free_port()}", "EXTRACT_PORT": str(free_port())}
    images = {"IMAGES": "images", "TOWER": "tower", "DATA": "images.json", "FEATURES": "features", "OUTPUT": "align"}
    launch(folder, "launch_align.sh", "--logging_steps", "1", EPOCHS="8", DECODE_WORKERS="1", **images, **ports)
    learned = losses(folder / "align")
    assert len(learned) == 16 and min(list(learned.values())[-2:]) < learned[1]
    projector = folder / "align" / "mm_projector.bin"
    again = ["--version", "auto", "--mm_projector_type", "mlp2x_gelu", "--pretrain_mm_mlp_adapter", str(projector)]
    videos = {"DATA": "videos.json", "FEATURES": "video_features", "OUTPUT": "stage2", "EPOCHS": "4"}
    launch(folder, "launch_train.sh", *again, "--logging_steps", "1", **videos, **ports)
    assert len(losses(folder / "stage2")) == 2
    chat = Chat(
        model_name_or_path=str(folder / "model"),
        projector=str(folder / "stage2"),
        vision_tower=str(folder / "tower"),
        max_new_tokens=2,
    )
    assert isinstance(chat.ask(str(folder / "videos" / "0.mp4"), "What is it?"), str)
