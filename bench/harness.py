"""What every benchmark says of the machine and the code that it measured."""

import datetime
import json
import os
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "numpy",
    "av",
    "safetensors",
    "pillow",
    "bitsandbytes",
    "liger-kernel",
    "quack-kernels",
)


def environment():
    """Device, versions, commit (with "+" where files differ from it) and date, as a dict for a result file."""
    import torch

    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = torch.get_num_threads()
        device = f"{_processor()}, {threads} thread{'s' if threads > 1 else ''}"
    return {
        "device": device,
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "versions": {name: _version(name) for name in PACKAGES},
    }


def write_results(path, rows):
    """Write {"environment": …, "rows": rows} as JSON."""
    Path(path).write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")


def _processor():
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit():
    """Of the checkout; a copy without its history is told in FASTVID_COMMIT."""

    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    if "FASTVID_COMMIT" in os.environ:
        return os.environ["FASTVID_COMMIT"]
    if not shutil.which("git") or not git("rev-parse", "--short", "HEAD"):
        return "unknown"
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
