"""A run whose videos have features of two poolings."""

import json
import shutil

import numpy as np
import pytest
from clips import draw
from PIL import Image
from towers import write_tower
from training_run import CHANNELS, write_run

from fastvid import extract
from fastvid.config import ExtractConfig
from fastvid.config.pooling import RECIPE

FRAMES, SIDE = 6, 4  # frames per video, patches of the tower
GRID, SLOW_FAST = "grid:3x2x2", f"slow-fast:2x3x3+{FRAMES}x1x1"
OTHER = "pllava-attn"  # of another program
ROWS = {RECIPE: FRAMES + SIDE**2, GRID: 12, SLOW_FAST: 18 + FRAMES}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run whose four videos have features of two poolings, beside an image and text alone."""
    folder = write_run(tmp_path_factory.mktemp("pooling"), max_position_embeddings=2048)
    shutil.rmtree(folder / "feats")
    write_tower(folder / "tower", image_size=14 * SIDE, hidden_size=CHANNELS, heads=2)
    for name, frames in (("a", 11), ("b", 4), ("c", 9), ("d", 6)):
        group = folder / ("grids" if name in "ab" else "recipe")
        group.mkdir(exist_ok=True)
        draw(group / f"{name}.mp4", frames)
    (folder / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "e.png")
    for group, options in (("grids", {"pooling": GRID}), ("recipe", {}), ("images", {"pooling": GRID, "images": True})):
        assert extract.extract(job(folder, folder / group, folder / "feats", **options)).exit_code == 0
    records = json.loads((folder / "train.json").read_text())[:6]
    for record, media in zip(records, ("a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.png", None)):
        del record["video"]
        turn = record["conversations"][0]
        if media is None:
            turn["value"] = turn["value"].replace("<video>", "").strip()
        elif media.endswith("png"):
            turn["value"], record["image"] = turn["value"].replace("<video>", "<image>"), media
        else:
            record["video"] = media
    (folder / "train.json").write_text(json.dumps(records))
    return folder


def job(made, videos, output, **options):
    settings = {"vision_tower": str(made / "tower"), "num_frames": FRAMES, "device": "cpu", "decode_workers": 1}
    return ExtractConfig(str(videos), str(output), **settings | options)
