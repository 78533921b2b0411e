"""Reading ahead in processes of their own, in the order in which the steps come."""

import gc
import io
import logging
import os
import pickle
import select
import signal
from multiprocessing.context import ForkContext, ForkProcess

import torch
from torch.utils.data import DataLoader, Dataset

log = logging.getLogger("fastvid")

AHEAD = 2  # steps that each process is ahead
_LARGE = 1 << 20  # bytes from which on a tensor has shared memory of its own
_SIGN_OF_LIFE = (2.0, 8.0, 30.0)  # seconds that a new process has for it, each time one is started in its place


class _Calls(Dataset):
    """`function` of a number, as a process sends it."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, number):
        return _pickled(self.function(number))


class Ahead:
    """Calls a function in processes ahead of the one who waits for its results.

    Args:
        function: of a number; what it returns can be pickled, tensors in it are on the CPU.
        processes: how many; 0 calls in line. The results and their order are the same for any number.
        pin: have large tensors in page-locked memory.
    """

    def __init__(self, function, processes, *, pin=False):
        self.function, self.processes, self._numbers = function, processes, []
        self._loader = None if not processes else DataLoader(
            _Calls(function), batch_size=None, sampler=self._numbers, num_workers=processes, prefetch_factor=AHEAD,
            collate_fn=_as_it_is, pin_memory=pin, worker_init_fn=_live_with_the_job,
            multiprocessing_context=_Fork(),  # which shares the records with this process
            generator=torch.Generator())  # a draw from the global one would depend on the number of processes

    def map(self, numbers):
        """Yield `function` of each of `numbers`, in order; the processes live until the last, or until the caller ends
        it.

        Raises:
            ChildProcessError: a process has died, or none could be started.
        """
        if self._loader is None:
            yield from map(self.function, numbers)
            return
        self._numbers[:] = numbers
        results = iter(self._loader)
        try:
            while (result := _next(results)) is not None:
                yield _unpickled(*result)
        finally:
            # Not left to the garbage collector: the traceback of an error keeps the iterator until the interpreter's
            # exit, which would wait for processes that heed no signal.
            results._shutdown_workers()


class _ForkedProcess(ForkProcess):
    """A process that has run: one that hangs before it does is replaced.

    Up to Python 3.11 a child waits for ever, inside of fork, for the interpreter's list of threads, when another thread
    of its parent was just entering it. So do threads of gloo, which take the interpreter's lock to let go of a tensor.
    """

    @staticmethod
    def _Popen(process):
        for seconds in _SIGN_OF_LIFE:
            sign, process.begun = os.pipe()
            try:
                child = ForkProcess._Popen(process)
                if select.select([sign], [], [], seconds)[0]:
                    return child
            finally:
                os.close(process.begun)
                os.close(sign)
            child.kill()
            child.wait()
            log.info("a process to read data hung before it began, and is replaced")
        raise ChildProcessError(f"{len(_SIGN_OF_LIFE)} processes to read data with hung before they began, the last "
                                f"for {seconds:g} s; --dataloader_num_workers 0 needs none")

    def run(self):
        os.write(self.begun, b".")
        os.close(self.begun)
        super().run()


class _Fork(ForkContext):
    Process = _ForkedProcess


def _next(results):
    """The next result of a DataLoader's iterator, or None after the last."""
    try:
        return next(results, None)
    except (RuntimeError, ConnectionError, EOFError) as error:
        said = str(error).strip()
        if "in DataLoader worker process" in said or (
                isinstance(error, RuntimeError) and "DataLoader worker (pid" not in said):
            raise  # the function's own
        raise ChildProcessError(
            f"a process that reads data has died ({said}); it may have run out of memory or of shared memory "
            "(/dev/shm): fewer --dataloader_num_workers need less, 0 needs none") from error


class _Pickler(pickle.Pickler):
    """Sets large tensors aside, and takes small ones by value: each piece of shared memory costs a file descriptor."""

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


def _pickled(value):
    """(bytes as a tensor, the large tensors in it).

    All of it goes through shared memory: a process could not end before somebody has read what it wrote to a pipe.
    """
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return torch.frombuffer(file.getbuffer(), dtype=torch.uint8), pickler.large


def _unpickled(content, large):
    return _Unpickler(io.BytesIO(content.numpy()), large).load()


def _as_it_is(value):
    return value


def _live_with_the_job(worker):
    """End with the main process, and not before it; collect garbage by itself, whatever the main process does.

    Ctrl-C and a scheduler's SIGTERM reach the whole job: the main process ends its step, and then its workers.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    torch.multiprocessing._prctl_pr_set_pdeathsig(signal.SIGKILL)  # torch's own check comes seconds late
    gc.enable()
