"""Reading ahead in processes of their own, in the order in which the steps come."""

import errno
import gc
import io
import logging
import mmap
import os
import pickle
import select
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from multiprocessing.context import ForkContext, ForkProcess
from multiprocessing.reduction import DupFd
from typing import Generic, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

log = logging.getLogger("fastvid")

R = TypeVar("R")

AHEAD = 2  # steps that each process is ahead
_LARGE = 1 << 20  # bytes from which on a tensor is not pickled but laid beside the pickle
_ALIGNED = 64  # bytes, of a tensor's place
_SIGN_OF_LIFE = (2.0, 8.0, 30.0)  # seconds that a new process has for it, each time one is started in its place
_LOOKS_UP = 1.0  # seconds that the one who waits takes to see that a process is dead, or that it should stop
_TO_END = 2.0  # seconds that processes have to end by themselves


class Stopped(Exception):
    """Who waits for a result was asked to stop."""


class _Calls(Dataset):
    """`function` of a number, as a process sends it. Nothing is raised: torch would send it in a thread that may fail
    unseen."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, number):
        try:
            return _Parcel(self.function(number))
        except Exception as error:
            return _Failure(error)


class Prefetcher(Generic[R]):
    """Calls a function in processes ahead of the one who waits for its results.

    Args:
        function: of a number; what it returns can be pickled, tensors in it are on the CPU.
        processes: how many; 0 calls in line. The results and their order are the same for any number.
        pin: have large tensors in page-locked memory.
    """

    def __init__(self, function: Callable[[int], R], processes: int, *, pin: bool = False):
        self.function, self.processes = function, processes
        self._numbers: list[int] = []
        self._loader = (
            None
            if not processes
            else DataLoader(
                _Calls(function),
                batch_size=None,
                sampler=self._numbers,
                num_workers=processes,
                prefetch_factor=AHEAD,
                collate_fn=_as_it_is,
                pin_memory=pin,
                worker_init_fn=_live_with_the_job,
                timeout=_LOOKS_UP,
                multiprocessing_context=_Fork(),  # which shares the records with this process
                generator=torch.Generator(),
            )
        )  # a draw from the global one would depend on the number of processes

    def map(self, numbers: Iterable[int], stopped: Callable[[], object] = lambda: False) -> Generator[R]:
        """Yield `function` of each of `numbers`, in order; the processes live until the last, or until the caller ends
        it.

        Args:
            stopped: asked now and then during a long wait; true ends it.

        Raises:
            ChildProcessError: a process has died, cannot send what it has, or cannot be started.
            Stopped: a wait was ended.
        """
        if self._loader is None:
            yield from map(self.function, numbers)
            return
        self._numbers[:] = numbers
        results = self._start(self._loader)
        try:
            for _ in range(len(self._numbers)):
                parcel = _next(results, stopped)
                try:
                    value = parcel.opened()
                except _Gone as error:
                    raise _dead(results, error) from error
                yield value
        finally:
            # Not left to the garbage collector: the traceback of an error keeps the iterator until the interpreter's
            # exit, which would wait for processes that heed no signal.
            _end(results)

    @staticmethod
    def _start(loader):
        try:
            _Fork().Queue().close()  # torch prints a traceback of its own where it fails to make one
            results = iter(loader)
        except OSError as error:
            raise ChildProcessError(
                f"no process to read data with can be started ({error}){_about_shared_memory(error)}; "
                "--dataloader_num_workers 0 needs none"
            ) from error
        # torch would raise the death of a process wherever the main thread happens to be.
        signal_handling._remove_worker_pids(id(results))
        results._worker_pids_set = False
        return results


class _ForkedProcess(ForkProcess):
    """A process that has run: one that hangs before it does is replaced.

    Up to Python 3.11 a child waits for ever, inside of fork, for the interpreter's list of threads, when another thread
    of its parent was just entering it. So do threads of gloo, which take the interpreter's lock to let go of a tensor.
    """

    begun: int  # descriptor that the process writes to when it runs

    @staticmethod
    def _Popen(process):
        for seconds in _SIGN_OF_LIFE:
            sign, process.begun = os.pipe()
            try:
                child = ForkProcess._Popen(process)
                came = select.poll()  # select.select takes no descriptor from 1024 on
                came.register(sign, select.POLLIN)
                if came.poll(1000 * seconds):
                    return child
            finally:
                os.close(process.begun)
                os.close(sign)
            child.kill()
            child.wait()
            log.info("a process to read data hung before it began, and is replaced")
        raise ChildProcessError(
            f"{len(_SIGN_OF_LIFE)} processes to read data with hung before they began, the last for {seconds:g} s"
        )

    def run(self):
        os.write(self.begun, b".")
        os.close(self.begun)
        super().run()


class _Fork(ForkContext):
    Process = _ForkedProcess


def _next(results, stopped):
    """The next `_Parcel` or `_Failure` of a DataLoader's iterator."""
    while True:
        try:
            return next(results)
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            if "timed out" in str(error):
                if stopped():
                    raise Stopped from None
                continue
            raise _dead(results, error) from error


def _dead(results, error):
    """What to say of a process of a DataLoader's iterator that is dead, as `error` shows."""
    deadline = time.monotonic() + _LOOKS_UP
    while not (codes := {process.exitcode for process in results._workers if process.exitcode}):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    died = f"exit code {', '.join(map(str, sorted(codes)))}" if codes else " ".join(str(error).split())
    return ChildProcessError(
        f"a process that reads data has died ({died}); it may have run out of memory: fewer --dataloader_num_workers "
        "need less, 0 needs none. Start the same command again to go on from the last checkpoint"
    )


def _end(results):
    """End the processes of a DataLoader's iterator, also those that hang."""

    def kill():
        for process in results._workers:
            process.kill()

    late = threading.Timer(_TO_END, kill)
    late.daemon = True
    late.start()
    try:
        results._shutdown_workers()
    finally:
        late.cancel()


class _Parcel:
    """A value on its way from one process to another.

    Its pickle and, beside it, its large tensors lie in a piece of memory that is handed on as one open file. Such
    memory is not /dev/shm's, which containers keep small. A pipe carries next to nothing: a process could not end
    before somebody has read what it wrote there, nor its reader before a process that died has written all.
    """

    def __init__(self, value):
        content = io.BytesIO()
        pickler = _Pickler(content)
        pickler.dump(value)
        pieces = [content.getbuffer(), *(_bytes_of(tensor) for tensor in pickler.large)]
        self.places, self.size = [], 0
        for piece in pieces:
            self.places.append((self.size, piece.nbytes))
            self.size += -(-piece.nbytes // _ALIGNED) * _ALIGNED
        self.tensors = [(tensor.dtype, tensor.shape) for tensor in pickler.large]
        try:
            with _memory() as file:
                for (begin, _), piece in zip(self.places, pieces):
                    file.seek(begin)
                    file.write(piece)
                file.truncate(self.size)
                file.flush()
                self.file = DupFd(file.fileno())
        except OSError as error:
            raise _cannot_send(error, self.size) from error

    def opened(self, pin=False):
        """The value; its large tensors lie in the parcel's memory, or in page-locked copies."""
        try:
            descriptor = self.file.detach()
        except (OSError, EOFError) as error:
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                raise _cannot_send(error, self.size) from error
            raise _Gone(str(error)) from error
        try:
            memory = mmap.mmap(descriptor, self.size)
        finally:
            os.close(descriptor)
        content, *places = self.places
        large = [
            torch.frombuffer(memory, dtype=torch.uint8, count=size, offset=begin).view(dtype).view(shape)
            for (begin, size), (dtype, shape) in zip(places, self.tensors)
        ]
        if pin:
            large = [tensor.pin_memory() for tensor in large]
        return _Unpickler(io.BytesIO(memory[content[0] : content[0] + content[1]]), large).load()

    def pin_memory(self):
        """Called by torch, in a thread of its own."""
        try:
            return _Opened(self.opened(pin=True))
        except Exception as error:
            return _Failure(error)


class _Gone(Exception):
    """The process that sent a parcel is dead, and its parcel with it."""


class _Opened:
    def __init__(self, value):
        self.value = value

    def opened(self):
        return self.value


class _Failure:
    """An exception on its way: its type and arguments if those can be sent, and where it was raised."""

    def __init__(self, error):
        self.where = "".join(traceback.format_exception(error))
        if isinstance(error, MemoryError):
            error = ChildProcessError(
                "a process that reads data has no memory left: fewer --dataloader_num_workers need less, 0 needs none"
            )
        try:
            self.error = pickle.dumps(error)
            pickle.loads(self.error)
        except Exception:
            self.error = pickle.dumps(RuntimeError("".join(traceback.format_exception_only(error)).strip()))

    def opened(self):
        error = pickle.loads(self.error)
        error.__cause__ = _InProcess(f'\n"""\n{self.where}"""')
        raise error


class _InProcess(Exception):
    """The traceback of an exception that a process raised."""


def _memory():
    """An open file that is nowhere but in memory; where the system has none, one of the temporary folder's."""
    try:
        return open(os.memfd_create("fastvid"), "wb")
    except (AttributeError, OSError) as error:
        if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return tempfile.TemporaryFile()


def _cannot_send(error, size):
    """The error of a process that has `size` bytes and no way to hand them on."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        remedy = "; raise the limit on open files (`ulimit -n`), or give --dataloader_num_workers 0"
    else:
        remedy = f"{_about_shared_memory(error)}; fewer --dataloader_num_workers need less memory, 0 needs none"
    return ChildProcessError(f"a process that reads data cannot send a batch of {size / 1e6:,.1f} MB ({error}){remedy}")


def _about_shared_memory(error):
    """What to know of /dev/shm after an error of which it may be the cause."""
    if error.errno not in (errno.ENOSPC, errno.ENOMEM, errno.ENOENT, errno.EACCES, errno.EROFS):
        return ""
    try:
        size = f"has {shutil.disk_usage('/dev/shm').total / 2**20:,.0f} MiB"
    except OSError:
        size = "is missing"
    return f"; /dev/shm {size} (in a container: `docker run --shm-size 8g`)"


class _Pickler(pickle.Pickler):
    """Sets large tensors aside, and takes small ones by value."""

    def __init__(self, file):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.large = []

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor) and value.nbytes >= _LARGE:
            self.large.append(value)
            return len(self.large) - 1

    def reducer_override(self, value):
        if isinstance(value, torch.Tensor) and value.dtype != torch.bfloat16:  # numpy has none
            return torch.from_numpy, (value.numpy(),)
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, large):
        super().__init__(file)
        self.large = large

    def persistent_load(self, number):
        return self.large[number]


def _bytes_of(tensor):
    return memoryview(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy())


def _as_it_is(value):
    return value


def _live_with_the_job(worker):
    """End with the main process, and not before it; collect garbage by itself, whatever the main process does.

    Ctrl-C, a scheduler's SIGTERM and a hangup reach the whole job: the main process ends its step, and then its
    workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    # torch's own check comes seconds late. Its C++ adds the function to the module.
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # pyright: ignore[reportAttributeAccessIssue]
    gc.enable()
