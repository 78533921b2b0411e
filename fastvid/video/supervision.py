"""A process that may crash, below one that does nothing but watch it: it hears it out and hands signals on to it.

The child is a fork that goes on where its parent was. So the parent must have no threads, and no CUDA, when it forks:
neither outlives a fork. (Those of NumPy's OpenBLAS may be there; it ends them before each fork.)
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, Self

from fastvid.signals import STOPPING

_PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>


def can_fork() -> bool:
    """Whether this thread is the only one of Python's: another's locks would stay locked in a fork."""
    return sys.platform == "linux" and threading.active_count() == 1


class Offspring:
    """The children of this process, one after another. To be used as a context by the main thread.

    A child has a process group of its own: what a terminal sends to the group reaches the parent, which hands it on
    once. It is killed when the parent dies, however that comes.

    Attributes:
        stopped: the first signal that asked this process to stop; None without one.
    """

    def __init__(self):
        self.stopped: int | None = None
        self._pid: int | None = None
        self._reader: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (*STOPPING, signal.SIGTSTP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                self._before[number] = signal.signal(number, self._pause if number == signal.SIGTSTP else self._hand_on)
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def fork(self) -> int | None:
        """Make a child, unless this process was asked to stop.

        Returns:
            in the child: the file number on which it tells its parent what it does (`tell`); in the parent: None.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        reader, writer = os.pipe()
        # A signal waits until it is clear whom to hand it on to. Those that came before have been handled by then.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._before)
        parent, self._reader = os.getpid(), reader
        if not self.stopped:
            self._pid = os.fork()
            if self._pid == 0:
                os.close(reader)
                _die_with(parent)
                os.setpgid(0, 0)
                signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # a group in the background may write to the terminal
                self.__exit__()
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                return writer
            with contextlib.suppress(PermissionError, ProcessLookupError):  # it is past an exec, or gone
                os.setpgid(self._pid, self._pid)  # whichever of the two comes first
        os.close(writer)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return None

    def hear_out(self, heard: Callable[[dict[str, Any]], object]) -> int | None:
        """Call ``heard(message)`` for all that a child tells, until it is gone.

        Returns:
            how it ended, as `os.waitpid` puts it; None if there was none. Nothing of it is left then.
        """
        assert self._reader is not None, "fork comes first"
        with open(self._reader, "rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # a crash may have torn the last one
                    heard(json.loads(line))
        if (pid := self._pid) is None:
            return None
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        self._pid = None  # before its number can be another's, to whom a signal would be handed on
        return os.waitpid(pid, 0)[1]

    def _hand_on(self, number, frame):
        self.stopped = self.stopped or number
        if self._pid is not None:
            os.kill(self._pid, number)

    def _pause(self, number, frame):
        """Ctrl-Z: the child and its own processes stop, and go on when this process does."""
        if self._pid is not None:
            os.killpg(self._pid, signal.SIGSTOP)
        os.kill(os.getpid(), signal.SIGSTOP)
        if self._pid is not None:
            os.killpg(self._pid, signal.SIGCONT)


def tell(writer: int, message: object) -> None:
    """Send the parent a message, anything that JSON takes. Not from several threads at once."""
    content = json.dumps(message).encode() + b"\n"
    while content:
        content = content[os.write(writer, content) :]


def end_as(status: int) -> int:
    """End like a child that ended so: the exit code, or by the same signal."""
    if os.WIFEXITED(status):
        return os.WEXITSTATUS(status)
    number = os.WTERMSIG(status)
    sys.stdout.flush()
    sys.stderr.flush()
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))  # one core is enough
    if number != signal.SIGKILL:
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), number)
    return 128 + number  # a container's first process takes no signal from itself


def _die_with(parent):
    """Have the kernel kill this process when its parent's thread ends that made it."""
    if ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) or os.getppid() != parent:
        os._exit(1)
