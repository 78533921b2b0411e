"""Test the kernels, then benchmark those that pass: python -m bench.check [--small] [--kernels A,B]

Made for a GPU machine that is lent for minutes: every phase has a limit, a kernel that fails or crashes the device
costs its own rows only, and what there is at the end is written. Results go to $OUT, else to bench/results:
kernels-tests-DEVICE.xml (JUnit), kernels-DEVICE.json (pytest-benchmark) and kernels-DEVICE.png.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from bench.harness import ROOT, environment
from bench.report import KERNELS, read, table
from bench.roofline import draw

TOTAL_SECONDS, TEST_SECONDS, ENDING_SECONDS = 520, 240, 15
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]


def heed_interrupts():
    """Have SIGINT interrupt this process and those that it starts: in a shell's background jobs it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def run(command, limit, log):
    """Exit code of a command, or None if it ran past `limit` seconds. Then it is interrupted, so that pytest writes what
    it has, and killed if it goes on.
    """
    with open(log, "w") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
        try:
            return process.wait(max(limit, 1))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(ENDING_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return None


def run_tests(kernels, folder, deadline, workers):
    """{kernel: "passed", or what is wrong}, from one process per kernel."""
    def test(kernel):
        path = ROOT / "tests" / "kernels" / f"test_{kernel}.py"
        if not path.is_file():
            return f"missing ({path.relative_to(ROOT)})"
        log = folder / f"test_{kernel}.log"
        code = run([*PYTEST, str(path), f"--junitxml={folder / kernel}.xml"], deadline - time.monotonic(), log)
        if code == 0:
            return "passed"
        print(f"--- {kernel}\n{log.read_text()[-3000:]}")
        return "ran out of time" if code is None else f"failed (pytest's exit code {code})"

    with ThreadPoolExecutor(workers) as pool:
        return dict(zip(kernels, pool.map(test, kernels)))


def run_benchmark(kernels, folder, deadline, small):
    """pytest-benchmark's content with the rows of `kernels`.

    One process runs all of them. Where it ends before its last kernel, because one of them has broken the device, the
    kernels behind the broken one get another.
    """
    content, waiting = None, list(kernels)
    while waiting and time.monotonic() + ENDING_SECONDS < deadline:
        path, log = folder / f"{len(waiting)}.json", folder / f"{len(waiting)}.log"
        skipped = ",".join(kernel for kernel in KERNELS if kernel not in waiting)
        command = [*PYTEST, "bench", "-k", "kernels", f"--benchmark-json={path}", f"--skip-kernels={skipped}",
                   "--benchmark-columns=median,iqr,rounds", *(["--small"] if small else [])]
        code = run(command, deadline - ENDING_SECONDS - time.monotonic(), log)
        if code != 0:
            print(f"--- benchmark: {'out of time' if code is None else f'exit code {code}'}\n{log.read_text()[-6000:]}")
        found = json.loads(path.read_text()) if path.is_file() and path.stat().st_size else {"benchmarks": []}
        if content is None:
            content = found
        else:
            content["benchmarks"] += found["benchmarks"]
        if code is None or not (code < 0 or "CUDA error" in log.read_text()):
            break
        measured = {row["extra_info"]["kernel"] for row in found["benchmarks"] if row["extra_info"]["way"] == "ours"}
        waiting = [kernel for kernel in waiting if kernel not in measured][1:]
    return content or {"benchmarks": []}


def merge_junit(paths, target):
    suites = ElementTree.Element("testsuites")
    for path in paths:
        suites.extend(ElementTree.parse(path).getroot())
    ElementTree.ElementTree(suites).write(target, encoding="unicode")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--small", action="store_true", help="tiny shapes: shows that the command works")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="those to check, by name, with commas")
    arguments = parser.parse_args(argv)
    heed_interrupts()
    kernels = arguments.kernels.split(",")
    if unknown := set(kernels) - set(KERNELS):
        parser.error(f"no kernel is called {', '.join(sorted(unknown))}; there are {', '.join(KERNELS)}")
    begin, about = time.monotonic(), environment()
    out = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    out.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9]+", "-", about["device"].lower()).strip("-") + ("-small" if arguments.small else "")
    print(json.dumps(about), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        states = run_tests(kernels, folder, begin + TEST_SECONDS, workers=max(1, min(4, os.cpu_count() // 2)))
        merge_junit(sorted(folder.glob("*.xml")), out / f"kernels-tests-{name}.xml")
        print(f"tests took {time.monotonic() - begin:.0f} s", flush=True)
        sound = [kernel for kernel in kernels if states[kernel] == "passed"]
        content = run_benchmark(sound, folder, begin + TOTAL_SECONDS, arguments.small)
    result = out / f"kernels-{name}.json"
    result.write_text(json.dumps(content, indent=1) + "\n")
    rows = read([result])
    print(table(rows))
    if rows:
        draw(rows).savefig(out / f"kernels-{name}.png")
    counts = {kernel: sum(row["extra_info"]["kernel"] == kernel for row in content["benchmarks"]) for kernel in kernels}
    print("\n" + "\n".join(f"{kernel}: tests {states[kernel]}, {counts[kernel]} rows" for kernel in kernels))
    print(f"{result}; {time.monotonic() - begin:.0f} s")
    return 0 if len(sound) == len(kernels) else 1


if __name__ == "__main__":
    raise SystemExit(main())
