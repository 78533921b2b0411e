"""A process that watches another one: what it hears, whom signals reach, and how either ends."""

import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT

from fastvid.dist.processes import started

# A child says that it is there, counts signals until it has one and a moment longer, and tells how many there were.
COUNTING = """
    import os, signal, sys, time
    from fastvid.video.supervision import Offspring, end_as, tell

    with Offspring() as children:
        writer = children.fork()
        if writer is None:
            got = []
            status = children.hear_out(lambda message: print(message, flush=True))
    if writer is None:
        print("stopped by", children.stopped, flush=True)
        os._exit(end_as(status))
    counted = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: counted.append(number))
    tell(writer, os.getpid())
    end = time.monotonic() + 20
    while not counted and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(0.3)
    tell(writer, counted)
    os._exit(7)
"""


def start(script, **options):
    """(process of its own group, number of the child that it says it has)."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
        **options,
    )
    return process, int(process.stdout.readline())


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_a_signal_reaches_the_child_once(send, number):
    """Whether it comes to the parent or, as from a terminal, to its group."""
    process, _ = start(COUNTING)
    send(process.pid, number)
    output, _ = process.communicate(timeout=30)
    assert output.splitlines() == [str([int(number)]), f"stopped by {int(number)}"] and process.returncode == 7


@pytest.mark.slow
def test_nohup_stays():
    process, child = start(COUNTING, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    os.kill(process.pid, signal.SIGHUP)
    os.kill(child, signal.SIGHUP)
    time.sleep(0.2)
    process.terminate()
    assert process.communicate(timeout=30)[0].splitlines()[0] == str([int(signal.SIGTERM)])


def test_the_child_dies_with_its_parent():
    process, child = start(COUNTING)
    assert started(child) is not None
    process.kill()
    process.wait(30)
    end = time.monotonic() + 5
    while started(child) is not None and time.monotonic() < end:
        time.sleep(0.01)
    assert started(child) is None


@pytest.mark.slow
def test_ctrl_z_stops_both_and_they_go_on_together():
    def states():
        return {open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] == "T" for pid in (process.pid, child)}

    process, child = start(COUNTING)
    for number, stopped in ((signal.SIGTSTP, True), (signal.SIGCONT, False)):
        os.kill(process.pid, number)
        end = time.monotonic() + 10
        while states() != {stopped} and time.monotonic() < end:
            time.sleep(0.01)
        assert states() == {stopped}
    process.terminate()
    assert process.communicate(timeout=30)[0].splitlines()[0] == str([int(signal.SIGTERM)])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_the_parent_ends_as_its_child(number):
    process, child = start(COUNTING)
    os.kill(child, number)
    assert process.communicate(timeout=30)[0] == "stopped by None\n" and process.returncode == -number


def test_what_a_child_tells_is_heard_and_nothing_is_left_of_it():
    process, _ = start("""
        import os
        from fastvid.video.supervision import Offspring, tell

        heard, files = [], os.listdir("/proc/self/fd")
        print(0, flush=True)
        with Offspring() as children:
            for number in range(3):
                if (writer := children.fork()) is not None:
                    tell(writer, {"child": number, "long": "x" * 100_000})
                    os.write(writer, b'{"torn": ')
                    os._exit(number)
                assert os.waitstatus_to_exitcode(children.hear_out(heard.append)) == number
        assert [message["child"] for message in heard] == [0, 1, 2] and len(heard[0]["long"]) == 100_000
        try:
            os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            os._exit(42 if os.listdir("/proc/self/fd") == files else 1)
    """)
    process.communicate(timeout=30)
    assert process.returncode == 42


def test_none_is_made_after_a_signal():
    process, _ = start("""
        import os, signal
        from fastvid.video.supervision import Offspring

        with Offspring() as children:
            os.kill(os.getpid(), signal.SIGTERM)
            writer = children.fork()
            print(0, flush=True)
            os._exit(children.stopped if writer is None and children.hear_out(print) is None else 1)
    """)
    process.communicate(timeout=30)
    assert process.returncode == signal.SIGTERM
