"""A rank's encoder, as the rank and its forked readers see it: started, asked, waited for, ended."""

import contextlib
import json
import os
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict

from fastvid.config import ExtractConfig
from fastvid.data.prefetch import Stopped
from fastvid.dist import processes
from fastvid.online.board import MADE, WAITS, Board
from fastvid.video.listing import Video

_POLL = 0.02  # seconds between looks at the board
_GRACE = 5.0  # seconds that the process has to end by itself
_LINE = 4000  # bytes of a request: a pipe takes so many at once, from several processes
# The longest that a video's decoding may take, in time-outs: see `fastvid.video.decode.worker.limit`.
_MOST_TIMES = 10
_REMEDY = (
    "Start the same command again to go on from the last checkpoint; features that `fastvid extract` has made "
    "before need no encoder beside the training"
)


class Encoder:
    """A process that makes feature files.

    Args:
        config: `ExtractConfig`.
        videos: `fastvid.video.listing.Video`s that may be asked for, by number.
        order: numbers of those that will be, the first one first.
        done: numbers of those of which nothing is to be made.

    Attributes:
        board: `Board` of the videos.
        patience: seconds without any finished video, after which who waits gives up.
    """

    def __init__(self, config: ExtractConfig, videos: Sequence[Video], order: Sequence[int], done: Iterable[int] = ()):
        self.board, self.patience = Board(len(videos)), _MOST_TIMES * config.timeout
        for number in done:
            self.board.finish(number, MADE)
        setup = os.memfd_create("fastvid")
        content = {
            "config": asdict(config),
            "order": order,
            "videos": [[video.source, video.name, video.target] for video in videos],
        }
        with open(setup, "wb", closefd=False) as file:
            file.write(json.dumps(content).encode())
        os.lseek(setup, 0, os.SEEK_SET)
        asked, self._asks = os.pipe()
        try:
            process = launch(self.board.file, setup, asked)
        finally:
            os.close(asked)
            os.close(setup)
        self.pid, self._started = process.pid, processes.started(process.pid)
        self._end = weakref.finalize(self, _end, process, self._asks, os.getpid())

    def first(self, numbers: Iterable[int]) -> None:
        """Have these videos done before all others, in this order. Forked processes may call this, too."""
        lines, line = [], b""
        for number in numbers:
            word = b"%d " % number
            if len(line) + len(word) > _LINE:
                lines.append(line)
                line = b""
            line += word
        for request in reversed([*lines, line]):
            try:
                os.write(self._asks, request + b"\n")
            except BrokenPipeError:  # it is dead, or has done all: who waits sees which
                return

    def wait(self, number: int, stopped: Callable[[], object] = lambda: False) -> None:
        """Return once a video is finished. Forked processes may call this, too.

        Args:
            stopped: asked now and then; true ends the wait.

        Raises:
            Stopped: it was.
            ValueError, OSError: the encoder has ended for this reason.
            ChildProcessError: the encoder has died, or finishes nothing.
        """
        if self.board.state(number) != WAITS:
            return
        self.first([number])
        finished, since = self.board.finished, time.monotonic()
        while True:
            alive = processes.started(self.pid) == self._started is not None
            if self.board.state(number) != WAITS:
                return
            if not alive:
                raise self._why_dead()
            if stopped():
                raise Stopped
            if finished != self.board.finished:
                finished, since = self.board.finished, time.monotonic()
            if time.monotonic() - since > self.patience:
                raise ChildProcessError(
                    f"the process that encodes videos has not finished one for {self.patience:g} s. {_REMEDY}"
                )
            time.sleep(_POLL)

    def _why_dead(self):
        kind, message = self.board.told or ("", "it may have run out of memory")
        if kind in ("ValueError", "OSError"):
            return {"ValueError": ValueError, "OSError": OSError}[kind](message)
        return ChildProcessError(f"the process that encodes videos has died ({message}). {_REMEDY}")

    def close(self) -> None:
        """End the process. What it has made stays."""
        self._end()


def launch(board: int, setup: int, requests: int) -> subprocess.Popen[bytes]:
    """Start `fastvid.online.process`; the arguments are descriptors, the result is as of `subprocess.Popen`."""
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fastvid.online.process", str(board), str(setup)],
        pass_fds=[board, setup],
        stdin=requests,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": paths},
    )


def _end(process, asks, owner):
    if os.getpid() != owner:  # a forked reader's copy
        return
    with contextlib.suppress(BrokenPipeError):
        os.write(asks, b"end\n")
    os.close(asks)
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
