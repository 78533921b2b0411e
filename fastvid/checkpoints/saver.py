"""Checkpoints that are written while training goes on: on a CPU the loop waits for a copy, on a GPU the update does."""

import errno
import logging
import shutil
import threading
import time
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch.distributed import ProcessGroup

from fastvid.checkpoints import checkpoint
from fastvid.checkpoints.host_copies import HostCopies
from fastvid.dist.collective import gather, rank_and_size
from fastvid.dist.sharding import Held
from fastvid.files import StrPath

log = logging.getLogger("fastvid")

# Of a rank for the others' disks. A rank that dies is noticed at once, by its closed connection.
PATIENCE = timedelta(hours=4)
RETRY_AFTER = 5.0  # seconds until a write that failed is tried again: a file server may have stumbled


class Saver:
    """Saves checkpoints on a thread of its own, one at a time. A context: leaving it waits for the last one.

    A write that fails is tried a second time. `failed` tells, on each rank a little earlier or later, that this failed
    too: `wait` then raises why, on every rank.

    Every rank makes one and calls the same methods in the same order. Its threads speak to each other through a
    process group of their own, so that their messages never mix with the loop's.

    A process that dies during a write leaves what it saved before, whole and valid. The copy takes as much host memory
    as this rank writes, until the end of the run.
    """

    def __init__(self):
        self._group: ProcessGroup | None = None
        if dist.is_initialized():
            group = dist.new_group(backend="gloo", timeout=PATIENCE)
            assert isinstance(group, ProcessGroup), "all ranks are in it"
            self._group = group
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._written: set[int] = set()  # steps
        self._last: int | None = None
        self.failed = False

    def save(
        self,
        output_dir: StrPath,
        step: int,
        *,
        groups: Mapping[str, Mapping[str, Held]],
        state: dict[str, Any],
        total_limit: int | None = None,
    ) -> None:
        """Copy the tensors to the host and begin to write ``checkpoint-<step>``; arguments as `checkpoint.save`'s.

        Waits for the write before this one first; its host memory is used again. A GPU copies while it computes: call
        `hold` before what changes the tensors.

        Raises:
            OSError: on every rank; the write before this one failed, or a rank could not copy.
        """
        self.wait()
        snapshot = checkpoint.snapshot(groups, state, process_group=self._group, copies=self._copies)
        self._last = step
        self._thread = threading.Thread(
            target=self._write, args=(Path(output_dir), step, snapshot, total_limit), name="checkpoint", daemon=True
        )  # who interrupts the wait for it leaves at once
        self._thread.start()

    def hold(self) -> None:
        """Let the GPU make the copies of the last save before what it is given next; nothing waits on the host."""
        self._copies.hold()

    def wait(self) -> None:
        """Wait for the write that is under way, if one is.

        Raises:
            OSError: on every rank, when it failed on any; names rank and reason.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread, error, self._error, self.failed = None, self._error, None, False
        if error is not None:
            raise error

    def has(self, step: int) -> bool:
        """Whether ``checkpoint-<step>`` was written, or is being written, and nothing else since."""
        return self._last == step and not self.failed

    def _write(self, output_dir, step, snapshot, total_limit):
        try:
            for last in (False, True):
                error = self._try(output_dir, step, snapshot, total_limit)
                if error is None:
                    self._written.add(step)
                    return
                # A defect of one rank is an OSError on the others: all try again, or none.
                told = gather((isinstance(error, OSError), snapshot.nbytes), self._group)
                if last or not all(again for again, _ in told):
                    break
                if rank_and_size(self._group)[0] == 0:
                    log.warning(
                        "checkpoint-%s could not be written, and is tried again in %g s: %s", step, RETRY_AFTER, error
                    )
                time.sleep(RETRY_AFTER)
            if isinstance(error, OSError):
                error = OSError(
                    f"checkpoint-{step} of {output_dir} could not be written, and is not there; those "
                    f"before it are. {error}. {_remedy(output_dir, error, sum(size for _, size in told))}"
                )
        except BaseException as other:
            error = other
        self._error, self.failed = error, True

    def _try(self, output_dir, step, snapshot, total_limit):
        """The exception that a write ends with, or None."""
        try:
            checkpoint.write(
                output_dir,
                step,
                snapshot,
                copies=self._copies,
                total_limit=total_limit,
                process_group=self._group,
                written_before=self._written,
            )
        except Exception as error:
            return error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
            return
        try:
            self.wait()
        except Exception as other:  # said, but what ends the run is the error that came first
            log.error("%s", other)


def _remedy(output_dir, error, needed):
    try:
        free = f", {shutil.disk_usage(output_dir).free / 1e6:,.1f} MB are free"
    except OSError:
        free = ""
    full = any(f"Errno {number}]" in str(error) for number in (errno.ENOSPC, errno.EDQUOT)) or "No space" in str(error)
    mend = "free some (a lower --save_total_limit keeps fewer)" if full else "mend this"
    return (
        f"It takes {needed / 1e6:,.1f} MB{free} in {output_dir}: {mend}, then give the same command again: it goes "
        "on from the last checkpoint"
    )
