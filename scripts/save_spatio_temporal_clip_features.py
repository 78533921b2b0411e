"""Videos to feature files: `fastvid extract` under the reference's name."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

if __name__ == "__main__":
    from fastvid.cli import run

    run("extract")
