"""Measure fastvid on this machine's GPU, whatever crashes or hangs on the way: python -m bench.gpu

Results go to FOLDER/results.jsonl, one by one. The last lines printed are a table of what was measured, what failed,
and what was left out. Without a GPU the same tasks run at tiny sizes, which shows that they work, and measures nothing.
"""

import argparse
import os
import sys
import time
from pathlib import Path

from bench.gpu import results
from bench.gpu.check import Check, table
from bench.gpu.stages import STAGES, has_gpu, tasks_of
from bench.harness import environment


def main(argv=None):
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.split("\n")[0])
    parser.add_argument("--stages", default=",".join(STAGES), help=f"in the order given, of {', '.join(STAGES)}")
    parser.add_argument("--minutes", type=float, default=15.0, help="for everything; what does not fit is left out")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT") or "gpu_check"),
        help="folder for results.jsonl and log.txt ($OUT, else gpu_check)",
    )
    parser.add_argument("--tasks", help="of these stages, tasks whose names hold one of these words, with commas")
    arguments = parser.parse_args(argv)
    stages = arguments.stages.split(",")
    if unknown := [stage for stage in stages if stage not in STAGES]:
        parser.error(f"no stage is called {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if arguments.minutes <= 0:
        parser.error(f"--minutes {arguments.minutes:g}: give more than 0")
    on_gpu = has_gpu()
    if not on_gpu:
        print("no GPU: tiny sizes, which show that everything runs and measure nothing", file=sys.stderr)
    tasks = tasks_of(stages, small=not on_gpu)
    if arguments.tasks:
        words = arguments.tasks.split(",")
        if unknown := [word for word in words if not any(word in task.name for task in tasks)]:
            parser.error(
                f"no task of these stages has {', '.join(unknown)} in its name; there are "
                + ", ".join(sorted({task.name for task in tasks}))
            )
        chosen = [task for task in tasks if any(word in task.name for word in words)]
        needed = {(task.stage, name) for task in chosen if task.stage != "sweep" for name in task.after}
        tasks = [task for task in tasks if task in chosen or (task.stage, task.name) in needed]
    arguments.out.mkdir(parents=True, exist_ok=True)
    begin, out = time.monotonic(), arguments.out.resolve()
    results.append(
        out,
        {
            "stage": "run",
            "task": "run",
            "status": "ok",
            "row": "environment",
            "small": not on_gpu,
            "stages": stages,
            **environment(),
        },
    )
    check = Check(
        tasks,
        out,
        seconds=60 * arguments.minutes,
        ahead=max(1, (os.cpu_count() or 1) // 3),
        say=lambda line: print(line, flush=True),
    )
    outcomes = check.run()
    print(f"\n{table(outcomes)}\n{out / results.NAME}; {time.monotonic() - begin:.0f} s")
    return 0 if all(outcome[0].startswith(("ok", "absent")) for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
