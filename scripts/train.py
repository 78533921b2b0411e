"""Train, under the reference's name: ``torchrun --nproc_per_node=4 scripts/train.py <flags>``."""

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

from fastvid.cli import run  # noqa: E402  (found through the line above)

run("train")
