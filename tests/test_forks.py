"""Forks that stand for programs in Python end, speak and stand alone as those do."""

import os
import signal
import subprocess
import sys

import forks
import pytest

PROGRAMS = {
    "streams": "import sys; print(sys.argv[1:], sys.path[0], input()); print('told', file=sys.stderr)",
    "code": "import sys; sys.exit(3)",
    "words": "raise SystemExit('why')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "interrupted": "raise KeyboardInterrupt",
    "last": "import atexit, threading; atexit.register(print, 'bye'); threading.Timer(0.1, print, ['later']).start()",
    "alone": "import os; print(os.getsid(0) == os.getpid(), sorted(os.listdir('/proc/self/fd')), os.getcwd())",
    "family": "import multiprocessing as m; print(m.get_start_method(), m.parent_process(), m.current_process().name)",
    "signals": "import signal as s; print([s.getsignal(n) for n in (s.SIGINT, s.SIGTERM, s.SIGCHLD, s.SIGPIPE)])",
    "environment": "import os; print(sorted(os.environ.items()))",
}


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_fork_is_as_an_interpreter(program, tmp_path, monkeypatch):
    found = []
    for popen in (subprocess.Popen, forks.Popen):
        monkeypatch.setattr(subprocess, "Popen", popen)
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", program, "a", "b"],
            input="heard\n",
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={"PATH": os.environ["PATH"], "LC_CTYPE": "C.UTF-8", "ONLY": "this"},
            start_new_session=True,
        )
        found.append((done.returncode, done.stdout, done.stderr if "Traceback" not in done.stderr else "a traceback"))
    assert found[0] == found[1]


UNHEARD = """
import sys
for _ in range(2):
    try:
        print("x", file=sys.stderr)
        sys.stderr.flush()
    except BrokenPipeError:
        print("said to nobody")
try:
    sys.stderr.flush()
except BrokenPipeError:
    print("kept")
    import os; sys.stdout.flush(); os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_stream_that_nobody_reads(unbuffered, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    found = []
    for popen in (subprocess.Popen, forks.Popen):
        monkeypatch.setattr(subprocess, "Popen", popen)
        reading, writing = os.pipe()
        os.close(reading)
        found.append(subprocess.run([sys.executable, "-c", UNHEARD], stdout=subprocess.PIPE, stderr=writing, text=True))
        os.close(writing)
    assert found[0].stdout == found[1].stdout and "said to nobody" in found[0].stdout


@pytest.mark.slow
def test_a_defect_is_told_with_its_traceback(forked):
    done = subprocess.run([sys.executable, "-c", "raise ValueError('x')"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.endswith("ValueError: x\n") and 'File "<string>", line 1' in done.stderr


@pytest.mark.slow
def test_a_fork_can_be_waited_for_and_killed(forked):
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as process:
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.1)
        assert process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.mark.slow
def test_the_group_of_a_fork_is_there_when_it_begins(forked):
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait(20) == -signal.SIGKILL


def test_other_programs_are_no_forks(forked):
    assert subprocess.run(["sh", "-c", "exit 3"]).returncode == 3
