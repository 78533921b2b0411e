"""The same, of videos that have features only (--clip_feature_path): `fastvid convert` under the reference's name."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if __name__ == "__main__":
    from fastvid.cli import run

    run("convert")
