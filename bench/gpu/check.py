"""How the GPU check runs its tasks, whatever crashes or hangs on the way.

Every task runs in a process of its own (some share one, where they share a model), with a limit of its own. Every
result is appended to FOLDER/results.jsonl when it exists. A task that fails, hangs or kills its process costs its own
rows alone.
"""

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from bench.gpu import results
from bench.harness import ROOT

LOG_CHARACTERS = 6000  # of what a failed process wrote last


@dataclass(frozen=True)
class Task:
    """One entry of the check.

    Attributes:
        stage, name: together they name it.
        module, call: generator function that yields its rows.
        seconds: limit.
        arguments: of the call.
        process: tasks that follow one another and name the same process share it; None: a process of its own.
        background: others go on while it runs.
        untimed: it may run beside others like it; what is timed waits for all of them.
        after: names of background tasks of the same stage that must have ended.
    """

    stage: str
    name: str
    module: str
    call: str
    seconds: float
    arguments: dict = field(default_factory=dict)
    process: str | None = None
    background: bool = False
    untimed: bool = False
    after: tuple[str, ...] = ()


class Failed(Exception):
    """Why a task ended early."""


class Worker:
    """A process that has imported a task's module, or is about to."""

    def __init__(self, module, folder, scratch):
        self.module, self.said = module, queue.SimpleQueue()
        self.log = open(tempfile.mkstemp(dir=scratch, suffix=".log")[1], "w+", errors="replace")
        paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "bench.gpu.worker", module, str(folder)],
            cwd=ROOT,
            text=True,
            start_new_session=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "FASTVID_CHECK_SCRATCH": str(scratch)},
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.ready = False

    def _listen(self):
        for line in self.process.stdout:
            self.said.put(json.loads(line))
        self.said.put(None)

    def run(self, task, seconds, seen):
        """Run a task; `seen` gets every row.

        Raises:
            Failed: it raised, ran past its limit, or took its process along; the process is gone then.
        """
        deadline = time.monotonic() + seconds
        try:
            if not self.ready:
                self._hear(deadline)
                self.ready = True
            order = {"stage": task.stage, "task": task.name, "call": task.call, "arguments": task.arguments}
            print(json.dumps(order), file=self.process.stdin, flush=True)
            while "done" not in (answer := self._hear(deadline)):
                if "failed" in answer:
                    raise Failed(answer["failed"])
                seen(answer["row"])
        except BrokenPipeError:
            raise Failed(self._ending()) from None
        except Failed:
            self.stop()
            raise

    def _hear(self, deadline):
        try:
            answer = self.said.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            raise Failed("ran past its limit") from None
        if answer is None:
            raise Failed(self._ending())
        return answer

    def _ending(self):
        code = self.process.wait()
        return f"its process was killed by signal {-code}" if code < 0 else f"its process ended with code {code}"

    def written(self):
        """What it wrote last to stderr."""
        self.log.flush()
        self.log.seek(0)
        return self.log.read()[-LOG_CHARACTERS:]

    def stop(self):
        """Kill it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Check:
    """A run of tasks.

    Args:
        tasks: in the order in which they matter.
        folder: where results.jsonl and log.txt go.
        seconds: for all of them.
        ahead: processes that import their modules before their turn comes.
        say: takes lines for the reader.
    """

    def __init__(self, tasks, folder, *, seconds, ahead=1, say=print):
        self.tasks, self.folder, self.ahead, self.say = tasks, Path(folder), ahead, say
        self.deadline = time.monotonic() + seconds
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outcomes = {}  # {(stage, task): (what became of it, seconds, rows)}
        self.running = {}  # {(stage, task): future of a background task}
        self.waiting = []  # (module of a process group, its tasks, its worker or None)

    def run(self):
        """{(stage, task): (outcome, seconds, rows)}; outcomes: "ok", "absent: …", "failed: …", "left out: …"."""
        with (
            tempfile.TemporaryDirectory(dir=scratch_folder()) as scratch,
            ThreadPoolExecutor(64) as pool,
            ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 4)) as untimed,
        ):
            self.scratch, side_by_side = scratch, []
            groups = [[tasks, None] for tasks in _groups(self.tasks)]
            try:
                while groups:
                    self._warm(groups)
                    tasks, worker = groups.pop(0)
                    if tasks[0].background:
                        (task,) = tasks
                        self.running[task.stage, task.name] = pool.submit(self._run_group, tasks, worker)
                    elif tasks[0].untimed:
                        side_by_side.append(untimed.submit(self._run_group, tasks, worker, wait=True))
                    else:
                        while side_by_side:
                            side_by_side.pop().result()
                        self._wait_for(tasks[0])
                        self._warm(groups)
                        self._run_group(tasks, worker)
                for future in (*self.running.values(), *side_by_side):
                    future.result()
            finally:
                for _, worker in groups:
                    if worker:
                        worker.stop()
        return self.outcomes

    def _warm(self, groups):
        for group in groups[: self.ahead]:
            if group[1] is None and time.monotonic() < self.deadline:
                group[1] = Worker(group[0][0].module, self.folder, self.scratch)

    def _wait_for(self, task):
        for name in task.after:
            if future := self.running.get((task.stage, name)):
                future.result()

    def _run_group(self, tasks, worker, wait=False):
        try:
            for task in tasks:
                if wait:
                    self._wait_for(task)
                left = self.deadline - time.monotonic()
                lacking = [
                    name
                    for name in task.after
                    if not self.outcomes.get((task.stage, name), ("ok",))[0].startswith(("ok", "absent"))
                ]
                if left < min(5.0, task.seconds):
                    self._note(task, "left out: no time", 0.0, [])
                    continue
                if lacking and not _helps_only(lacking):
                    self._note(task, f"left out: {', '.join(lacking)} did not end well", 0.0, [])
                    continue
                worker = worker or Worker(task.module, self.folder, self.scratch)
                begin, rows = time.monotonic(), []
                try:
                    worker.run(task, min(task.seconds, left), rows.append)
                    outcome = "ok"
                except Failed as error:
                    outcome = f"failed: {error}"
                    self._keep_log(task, outcome, worker.written())
                    worker = None
                self._note(task, outcome, time.monotonic() - begin, rows)
        finally:
            if worker:
                worker.stop()

    def _note(self, task, outcome, seconds, rows):
        bad = [row for row in rows if row.get("status") != "ok"]
        if outcome == "ok" and rows and all("absent" in row for row in rows):
            outcome = f"absent: {rows[0]['absent']}"
        if outcome == "ok" and bad:
            outcome = "failed: " + "; ".join(str(row.get("error", row.get("row", ""))) for row in bad)[:500]
        self.outcomes[task.stage, task.name] = outcome, seconds, rows
        status = outcome.partition(":")[0].replace("left out", "left_out")
        results.append(
            self.folder,
            {
                "stage": task.stage,
                "task": task.name,
                "status": status,
                "row": "end",
                "seconds": round(seconds, 2),
                **({} if outcome == "ok" else {"error": outcome}),
            },
        )
        shown = outcome if len(outcome) < 160 else outcome[:157] + "…"
        self.say(f"{task.stage} {task.name}: {shown} ({seconds:.1f} s)")
        for row in rows:
            self.say("  " + line_of(row))

    def _keep_log(self, task, outcome, text):
        with open(self.folder / "log.txt", "a") as file:
            file.write(f"=== {task.stage} {task.name}: {outcome}\n{text}\n")


def _helps_only(names):
    """Whether what these tasks prepare is done anew by who needs it."""
    return all(name.startswith("compile") for name in names)


def _groups(tasks):
    """Lists of tasks that share a process."""
    groups = []
    for task in tasks:
        last = groups[-1][-1] if groups else None
        if last and task.process is not None and (task.stage, task.process) == (last.stage, last.process):
            groups[-1].append(task)
        else:
            groups.append([task])
    return groups


def scratch_folder():
    """Where models of random weights go: memory, if it has room for them, else TMPDIR."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return None
    return "/dev/shm" if status.f_bavail * status.f_frsize > 40 * 2**30 else None


def line_of(row):
    """A row as a line: what tells it from others, then its figures."""
    hidden = {"stage", "task", "status", "at", "versions", "environment", "seconds_each"}
    words = []
    for key, value in row.items():
        if key not in hidden:
            words.append(f"{key} {value:.5g}" if isinstance(value, float) else f"{key} {value}")
    line = ("" if row["status"] == "ok" else row["status"].upper() + " ") + ", ".join(words)
    return line if len(line) < 300 else line[:297] + "…"


def table(outcomes):
    """What was measured, what this machine has not, what failed, and what was left out."""
    kinds = {"ok": "measured", "absent": "not to be had here", "failed": "failed", "left out": "left out"}
    found = {kind: [] for kind in kinds}
    for (stage, name), (outcome, _, rows) in outcomes.items():
        kind, _, why = outcome.partition(": ")
        text = f"{stage} {name}" + (
            f" ({len(rows)} rows)" if kind == "ok" else f": {why.splitlines()[0][:120] if why else ''}"
        )
        found[kind].append(text)
    lines = [
        f"{kinds[kind]}: {len(found[kind])} of {len(outcomes)}" + "".join(f"\n  {text}" for text in found[kind])
        for kind in kinds
        if found[kind]
    ]
    return "\n".join(lines)
