"""Tasks that are commands: the kernels' unit tests on this device, and a memory checker over tiny launches."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec

from bench.harness import ROOT

DRAWN = "any_shape or any_size or any_packing"  # tests of drawn shapes: each shape is compiled anew on a GPU


def unit_tests(small, kernel, seconds):
    """tests/kernels of one kernel, without those of drawn shapes; at `small`, one that is quick."""
    if missing := [name for name in ("pytest", "pytest_timeout", "hypothesis") if find_spec(name) is None]:
        yield {"row": kernel, "absent": f"{', '.join(missing)} is not installed"}
        return
    chosen = ["-k", f"not ({DRAWN})"] if not small else ["-k", "refuse or unknown or error"]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        *chosen,
        f"tests/kernels/test_{kernel}.py",
    ]
    found = _run(command, seconds)
    last = found.stdout.strip().splitlines()[-1:] or [""]
    counts = {
        word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped|errors?|deselected)", last[0])
    }
    good = found.returncode in (0, 5)
    row = {"row": kernel, **counts, "code": found.returncode, "status": "ok" if good else "failed"}
    said = "\n".join(re.findall(r"^(?:FAILED|ERROR|E  ).*", found.stdout, re.M))
    said = said or found.stdout[-700:] + found.stderr[-700:]
    yield row if good else row | {"error": said[-1500:]}


def sanitizer(small, tool, seconds):
    """compute-sanitizer over `bench.gpu.launch`."""
    found = shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")
    if small or found is None:
        yield {"row": tool, "absent": "no GPU" if small else "no compute-sanitizer on this machine"}
        return
    command = [
        found,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--print-limit",
        "10",
        sys.executable,
        "-m",
        "bench.gpu.launch",
    ]
    done = _run(command, seconds)
    text = done.stdout + done.stderr
    launched = sum(
        line.startswith(
            ("spatio", "frame", "splice", "add_", "rope", "swiglu", "linear", "quantize", "quick", "yuv", "adamw")
        )
        for line in text.splitlines()
    )
    summary = re.findall(r"ERROR SUMMARY.*|RACECHECK SUMMARY.*", text)
    row = {"row": tool, "cases": launched, "summary": summary[-1:] or None, "code": done.returncode}
    yield row | ({"status": "ok"} if done.returncode == 0 else {"status": "failed", "error": text[-1200:]})


def _run(command, seconds):
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        stdin=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}"},
    )
