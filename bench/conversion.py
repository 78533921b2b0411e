"""Convert VideoInstruct-sized JSON through the command line: seconds and peak memory of the whole process.

python bench/conversion.py [--records 100000] [--runs 5] [--json bench/results/conversion.json]
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, write_results

WORDS = "the man walks across a wide street and then turns to wave at somebody who waits in front of a café 🙂".split()


def instructions(count):
    """VideoInstruct-style records: questions of 5 to 20 words, answers of 10 to 160, 7.5 to a video."""
    rng = random.Random(0)

    def text(least, most):
        return " ".join(rng.choices(WORDS, k=rng.randint(least, most)))

    return [{"q": text(5, 20) + "?", "a": text(10, 160), "video_id": f"v_{int(i / 7.5):06d}"} for i in range(count)]


def run(source, target):
    """(seconds, peak MiB) of one conversion in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-m", "fastvid.convert", "--input_json_file", source, "--output_json_file", target]
    begin = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, f"{command} failed"
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--records", type=int, default=100_000)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "in.json"
        source.write_text(json.dumps(instructions(arguments.records)))
        figures = [run(source, Path(folder) / "out.json") for _ in range(arguments.runs)]
        size = source.stat().st_size / 1e6
    seconds, memory = zip(*figures)
    row = {
        "records": arguments.records,
        "input_mb": round(size, 1),
        "seconds": statistics.median(seconds),
        "seconds_min": min(seconds),
        "seconds_max": max(seconds),
        "peak_mib": statistics.median(memory),
    }
    print(
        f"{row['records']:,} records ({size:.0f} MB): {row['seconds']:.2f} s "
        f"({row['seconds_min']:.2f}–{row['seconds_max']:.2f}), {row['peak_mib']:.0f} MiB"
    )
    if arguments.json:
        write_results(arguments.json, [row])


if __name__ == "__main__":
    main()
