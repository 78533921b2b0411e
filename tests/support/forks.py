"""Processes that begin at once: forks of one server, which has imported what they need, and nothing else has run there.

To import torch, transformers and the product takes seconds of a processor for every process. `FORKS` is
multiprocessing's context for functions; `Popen` starts Python programs as that of `subprocess` does, which the fixture
`forked` replaces.
"""

import atexit
import contextlib
import fcntl
import functools
import gc
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import threading
import time
import types
import warnings
from multiprocessing import forkserver, popen_forkserver, process, reduction, resource_tracker
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# For all tests: there is one server in a process, and it starts with the list that was set last.
FORKS.set_forkserver_preload(
    [
        "torch.distributed.run",
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
        "torch._dynamo",
        "torch.utils.tensorboard",
        "transformers.models.llama.modeling_llama",
        "transformers.models.clip.modeling_clip",
        "fastvid.train",
        "fastvid.extract",
        "fastvid.chat",
        "fastvid.evaluate",
        "matplotlib.backends.backend_agg",
        "matplotlib.figure",
        "hypothesis",
        "pytest",
        "tqdm.contrib.logging",
    ]
)
LAUNCHER = ["-m", "torch.distributed.run"]


class Popen(subprocess.Popen):
    """As `subprocess.Popen`; a program in Python is a fork, with streams, environment, folder and session of its own.

    It differs in what has been imported and in its parent, which is the server. What torchrun starts are forks too;
    what other children start are none: one that is killed while it asks the server takes that along.
    """

    _fork = None  # a program of another kind

    def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest):
        shell, pipes, (_restore, _gid, _gids, _uid, _umask, new_session, *_) = rest[2], rest[3:9], rest[9:]
        if shell or preexec_fn or isinstance(args, (str, os.PathLike)) or args[0] != sys.executable:
            return super()._execute_child(args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *rest)
        theirs = {number: number if end == -1 else end for number, end in enumerate((pipes[0], pipes[3], pipes[5]))}
        streams = {number: _Descriptor(end) for number, end in (theirs | {each: each for each in pass_fds}).items()}
        environment, folder = dict(os.environ if env is None else env), os.getcwd() if cwd is None else os.fspath(cwd)
        begin = FORKS.Process(
            target=_become, args=(list(map(os.fspath, args[1:])), streams, environment, folder, new_session)
        )
        if multiprocessing.parent_process() is not None:
            forkserver._forkserver.ensure_running = lambda: None  # it is no child of this process
        with _no_main():
            self._fork = popen_forkserver.Popen(begin)  # not in the list of those that multiprocessing waits for
        self.pid, self._child_created = self._fork.pid, True
        self._close_pipe_fds(*pipes)
        # Whoever kills the group at once relies on it: `subprocess` returns when the session is there.
        with contextlib.suppress(ProcessLookupError):
            while new_session and os.getsid(self.pid) != self.pid and self._fork.poll() is None:
                time.sleep(0.001)

    def _internal_poll(self, *arguments, **options):
        if self._fork is None:
            return super()._internal_poll(*arguments, **options)
        if self.returncode is None:
            self.returncode = self._fork.poll()
        return self.returncode

    def _try_wait(self, wait_flags):
        if self._fork is None:
            return super()._try_wait(wait_flags)
        if (code := self._fork.poll(wait_flags)) is None:
            return 0, 0
        return self.pid, -code if code < 0 else code << 8


class Streams:
    """Standard output and error of this process, for a function of `FORKS` that calls `use`: the server has others.

    A test that captures file descriptors reads then what the function writes.
    """

    def __init__(self):
        self._streams = {number: _Descriptor(number) for number in (1, 2)}

    def use(self):
        for number, copy in self._streams.items():
            os.dup2(copy, number)
            os.close(copy)


@contextlib.contextmanager
def _no_main():
    """Else multiprocessing imports in the new process what runs here as ``__main__``."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


class _Descriptor:
    """A file descriptor that travels to the process that is being started."""

    def __init__(self, number):
        self.number = number

    def __reduce__(self):
        return _received, (reduction.DupFd(self.number),)


def _received(copy):
    return copy.detach()


def _become(arguments, streams, environment, folder, new_session):
    """In the fork: run what a fresh interpreter would run for these arguments, and end as that ends."""
    gc.freeze()  # of what was imported no page need be copied
    launches = arguments[: len(LAUNCHER)] == LAUNCHER
    streams = {number: fcntl.fcntl(stream, fcntl.F_DUPFD, 200) for number, stream in streams.items()}
    _forget_multiprocessing(keep_server=launches, kept=streams.values())
    for number, stream in streams.items():
        os.dup2(stream, number)
        os.close(stream)
    if new_session:
        os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = _text(1, "strict", line_buffering=os.isatty(1))
    sys.stderr = sys.__stderr__ = _text(2, "backslashreplace", line_buffering=True)
    if launches:
        from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

        subprocess_handler.Popen = Popen
    _end_with(functools.partial(_main, arguments))


def _text(number, errors, line_buffering):
    if os.environ.get("PYTHONUNBUFFERED"):
        return io.TextIOWrapper(open(number, "wb", 0, closefd=False), errors=errors, write_through=True)
    return io.TextIOWrapper(open(number, "wb", closefd=False), errors=errors, line_buffering=line_buffering)


def _forget_multiprocessing(keep_server, kept):
    """Close what leads to the parent, and be the main process of one's own children."""
    server = {forkserver._forkserver._forkserver_alive_fd, resource_tracker._resource_tracker._fd}
    kept = {*kept, *(server if keep_server else ())}
    for number in map(int, os.listdir("/proc/self/fd")):
        if number > 2 and number not in kept:
            with contextlib.suppress(OSError):  # that of the listing
                os.close(number)
    process.current_process().name = "MainProcess"
    multiprocessing.context._default_context._actual_context = None
    if not keep_server:
        process._parent_process = None
        resource_tracker._resource_tracker._fd = resource_tracker._resource_tracker._pid = None
        forkserver._forkserver.__init__()


def _main(arguments):
    """The interpreter's own command line, as far as tests use it."""
    here = [""]
    while arguments[0] in ("-u", "-P", "-W", "-X"):
        option, *arguments = arguments
        if option == "-P":
            here = []
        elif option == "-W":
            assert arguments[0] == "ignore"
            warnings.simplefilter(arguments.pop(0))
        elif option == "-X":
            assert arguments.pop(0) == "faulthandler=0"
    beside = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    installed = [path for path in sys.path if Path(path).is_relative_to(sys.base_prefix) or "site-packages" in path]
    sys.path[:] = [*here, *beside, *installed, os.path.dirname(__file__)]  # the last for forks of this process
    program, *sys.argv = arguments
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    main.__builtins__ = __builtins__
    if program == "-m":
        sys.modules.pop(sys.argv[0], None)
        runpy._run_module_as_main(sys.argv[0])
    elif program == "-c":
        source, sys.argv[0] = sys.argv[0], "-c"
        exec(compile(source, "<string>", "exec"), main.__dict__)
    else:
        sys.argv.insert(0, program)
        sys.path[0], main.__file__ = os.path.dirname(os.path.abspath(program)), program
        exec(compile(Path(program).read_bytes(), program, "exec"), main.__dict__)


def _end_with(function):
    """Call a function and leave with its exit code, once threads and functions for the exit have ended."""
    code = 0
    try:
        function()
    except SystemExit as exit:
        code = 0 if exit.code is None else exit.code
        if not isinstance(code, int):
            print(code, file=sys.stderr)
            code = 1
    except KeyboardInterrupt:
        code = -signal.SIGINT
        sys.excepthook(*sys.exc_info())
    except BaseException:
        code = 1
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        signal.raise_signal(-code)
    os._exit(code & 0xFF)
