"""What an extraction does about crashes of its own process: a new process tries the videos at hand, one at a time.

A GPU's decoder, DALI and the tower run within the process, so a fault of the driver ends it; after some of CUDA's
errors, every further call fails. Therefore the command extracts in a child (`fastvid.video.supervision`), which says
which videos it is at. Of those that a crash met, each is decoded alone in a new child; one that crashes it again, by
PyAV; one that crashes it even so is a failure.
"""

import contextlib
import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from fastvid.config import ExtractConfig
from fastvid.features.manifest import Manifest, when
from fastvid.files import shown
from fastvid.video.decode.kinds import KINDS
from fastvid.video.listing import Video
from fastvid.video.summary import Summary
from fastvid.video.supervision import Offspring, can_fork, end_as, tell

_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP, signal.SIGSYS)
_OUT_OF_MEMORY = "SIGKILL, as when memory runs out"  # the kernel's, a daemon's that frees memory, or somebody's
_BROKEN = re.compile(r"CUDA (driver )?error|cuDNN error|Triton Error \[CUDA\]", re.IGNORECASE)
_DRIVER = ("/dev/nvidiactl", "/proc/driver/nvidia/version", "/dev/dxg")  # the last one under WSL
_LOST = 75  # the exit code of a child that told why it ended
_MOST_IN_A_ROW = 20  # crashes between which nothing was extracted
_MOST_KILLED = 20  # times that a child is ended by SIGKILL, whatever was extracted between them
_NAMED = 5  # videos that a line names
AGAIN, BY_PYAV = "alone", "alone, by PyAV"  # how a suspect is tried next


def may_crash(config: ExtractConfig) -> bool:
    """Whether an extraction may crash its process. CUDA is not asked: what is forked afterwards could not use it."""
    on_gpu = config.device.startswith("cuda") if config.device else any(map(os.path.exists, _DRIVER))
    return on_gpu or KINDS[config.decoder].may_crash


def is_broken(error: BaseException) -> bool:
    """Whether an exception says that the GPU's context may be of no use any more."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    return isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and _BROKEN.match(str(error)) is not None
    )


class Watch:
    """What an extraction tells the process that watches it. This one has none, and whatever it tells has no effect.

    Attributes:
        suspects: names of the videos that come first, each of them alone.
        code: in the process that watches, the exit code of it all; None in one that extracts.
    """

    suspects: frozenset[str] = frozenset()
    code: int | None = None

    def begin(self, shares: list[list[Video]], rank: int, summary: Summary) -> tuple[list[list[Video]], float]:
        """Set-up is over: (shares without what was settled before, seconds of `time.perf_counter` at the first start).

        What was settled before is added to the summary.
        """
        return shares, time.perf_counter()

    def decodes(self, counts: Counter[str]) -> None:
        """The decoders are there, and will count what decoded how many; what did before is added."""

    def failed_since(self, manifest: Manifest) -> None:
        """Have the manifest know the videos that failed elsewhere since the first start."""

    @contextlib.contextmanager
    def at(self, doing: str, *names: str, on: bool = False) -> Iterator[None]:
        """Within this context, a thread does something with some videos that may crash the process.

        Args:
            on: it goes on afterwards, until the videos are in another such context.
        """
        yield

    def options(self, name: str) -> dict[str, bool]:
        """How a video is decoded, as further arguments of `VideoFeatures.prepare`."""
        return {}

    def settled(
        self, name: str, failure: str | None = None, *, frames: int = 0, padded: bool = False, damaged: bool = False
    ) -> None:
        """A video has its features, or a reason why there are none."""

    def lost(self, why: str, names: Iterable[str]) -> None:
        """The process has to end because of some videos. It returns where no other takes its place."""

    def done(self, code: int) -> None:
        """All is said and done; whatever happens from now on, this is the exit code."""


@dataclass
class History:
    """What has become of the videos so far, over all children.

    Attributes:
        since, began: when the first child was made, in the time of day; when it set out, of `time.perf_counter`.
        settled: of each video that is done, the message that said so.
        decoded: how many videos what decoded.
        suspects: how each video is tried next that a crash met.
        given_up: why, of each that crashed even with PyAV.
        crashes: how often, by what it was.
        tried: videos that were suspects at any time, and whether PyAV came to it.
    """

    since: float = field(default_factory=time.time)
    began: float | None = None
    settled: dict[str, dict] = field(default_factory=dict)
    decoded: dict[str, int] = field(default_factory=dict)
    suspects: dict[str, str] = field(default_factory=dict)
    given_up: dict[str, str] = field(default_factory=dict)
    crashes: Counter = field(default_factory=Counter)
    tried: dict[str, bool] = field(default_factory=dict)

    def crashed(self, how: str, at: Sequence[str], late: Sequence[str] = ()) -> str:
        """Note a crash; what is done about it, in words.

        Args:
            how: the signal or the error.
            at: the names of the videos that it met.
            late: those of them whose decoder does not answer. To wait for it once more would take as long again.
        """
        self.crashes[how] += 1
        again = len(at) == 1 and at[0] in self.suspects
        for name in late or at:
            if name in late or (again and self.suspects[name] == AGAIN):
                self.suspects[name] = BY_PYAV
            elif again:
                del self.suspects[name]
                self.given_up[name] = (
                    f"the process that extracts it alone, by PyAV, was ended from outside ({how})"
                    if how == _OUT_OF_MEMORY
                    else f"crashes the process that extracts it, by PyAV as well ({how})"
                )
            else:
                self.suspects.setdefault(name, AGAIN)
            self.tried[name] = self.tried.get(name, False) or self.suspects.get(name) == BY_PYAV
        if again and at[0] in self.given_up:
            return "it is given up"
        if again or late:
            return f"a new process has PyAV decode {_listed(late or at)} alone"
        return "a new process tries each of them alone" if at else "a new process goes on"

    def notes(self) -> list[str]:
        """A line for the summary, if there were crashes."""
        if not self.crashes:
            return []
        what = ", ".join(f"{how} × {count}" for how, count in self.crashes.items())
        line = f"the process that extracts crashed and was started anew ({what})"
        if self.tried:
            line += f"; tried again alone: {_listed(self.tried)}"
        if by_pyav := [name for name, came in self.tried.items() if came]:
            line += f"; by PyAV: {_listed(by_pyav)}"
        return [line]


class _Watched(Watch):
    """Of a process that extracts, below one that watches it."""

    def __init__(self, history, writer):
        self._history, self._writer, self._lock = history, writer, threading.Lock()
        self.suspects, self._counts = frozenset(history.suspects), history.decoded

    def begin(self, shares, rank, summary):
        history = self._history
        own = {video.name for video in shares[rank]}
        history.began = history.began or time.perf_counter()
        self._tell({"began": history.began})
        for name, message in history.settled.items():
            if name not in own:
                summary.total, summary.taken_over = summary.total + 1, summary.taken_over + 1
            if message["failure"]:
                summary.fail(name, message["failure"])
            else:
                summary.extracted += 1
                summary.frames += message["frames"]
                summary.padded += message["padded"]
                summary.damaged += message["damaged"]
        summary.notes = [*summary.notes, *history.notes()]
        left = [
            [
                replace(video, fault=history.given_up.get(video.name, video.fault))
                for video in share
                if video.name not in history.settled
            ]
            for share in shares
        ]
        return left, history.began

    def decodes(self, counts):
        counts.update(self._history.decoded)
        self._counts = counts

    def failed_since(self, manifest):
        """Others' failures are not tried again, as they are not by a process that saw them come."""
        history = self._history
        manifest.failed_elsewhere |= {
            name
            for name, entry in manifest.entries.items()
            if entry.get("status") == "failed"
            and when(entry) >= history.since
            and not any(name in own for own in (history.settled, history.suspects, history.given_up))
        }

    @contextlib.contextmanager
    def at(self, doing, *names, on=False):
        for name in names:
            self._tell({"at": name, "doing": doing})
        try:
            yield
        except Exception as error:
            if is_broken(error):
                self.lost(str(error).strip().splitlines()[0], ())
            raise
        finally:
            for name in names * (not on):
                self._tell({"left": name})

    def options(self, name):
        return {"hardware": False} if self._history.suspects.get(name) == BY_PYAV else {}

    def settled(self, name, failure=None, *, frames=0, padded=False, damaged=False):
        self._tell(
            {
                "settled": name,
                "failure": failure,
                "frames": frames,
                "padded": padded,
                "damaged": damaged,
                "decoded": dict(self._counts),
            }
        )

    def lost(self, why, names):
        self._tell({"lost": why, "late": list(names)})
        os._exit(_LOST)

    def done(self, code):
        self._tell({"done": code})

    def _tell(self, message):
        with self._lock:
            tell(self._writer, message)


class _Heard:
    """What one child has told."""

    def __init__(self, history):
        self.history, self.at, self.lost, self.code = history, {}, None, None
        self.began = self.settled = self.extracted = False

    def __call__(self, message):
        match message:
            case {"began": when}:
                self.began, self.history.began = True, when
            case {"at": name, "doing": doing}:
                self.at[name] = doing
            case {"left": name}:
                self.at.pop(name, None)
            case {"settled": name, "failure": failure}:
                self.settled, self.extracted = True, self.extracted or not failure
                self.history.decoded = message.pop("decoded")
                self.history.settled[name] = message
                self.at.pop(name, None)
                self.history.suspects.pop(name, None)
            case {"lost": _}:
                self.lost = self.lost or message
            case {"done": code}:
                self.code = code


def watched(config: ExtractConfig) -> Watch:
    """What the command extracts with. It returns once in each process that is to extract, and once in their parent.

    The parent has seen it all then, and has the exit code.
    """
    if not (may_crash(config) and can_fork()):
        return Watch()
    history, in_a_row = History(), 0
    with Offspring() as children:
        while True:
            heard = _Heard(history)
            if (writer := children.fork()) is not None:
                return _Watched(history, writer)
            status = children.hear_out(heard)
            in_a_row = 1 if heard.extracted else in_a_row + 1
            how = _crash(status, heard)
            if how is None or not _goes_on(history, heard, how, children.stopped, in_a_row):
                break
    watch = Watch()
    if heard.code is not None:
        if status != heard.code << 8:
            _say(f"the process that extracts ended with {_ending(status)} after all was done")
        watch.code = heard.code
    elif status is None or (children.stopped and how is not None):
        assert children.stopped is not None, "there was no child, for a signal had come before"
        _say(f"stopped by {signal.Signals(children.stopped).name}; run it again to go on")
        watch.code = 128 + children.stopped
    else:
        if os.WIFSIGNALED(status) and how is None and not children.stopped:
            _say(
                f"the process that extracts was ended by {_ending(status)}, which is no crash of its own; "
                "run it again to go on"
            )
        watch.code = 1 if heard.lost else end_as(status)
    return watch


def _ending(status):
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return f"exit code {os.WEXITSTATUS(status)}"


def _crash(status, heard) -> str | None:
    """What a child crashed of; None if it did not."""
    if status is None or heard.code is not None:
        return None
    if os.WIFSIGNALED(status):
        if os.WTERMSIG(status) == signal.SIGKILL:
            return _OUT_OF_MEMORY
        return _ending(status) if os.WTERMSIG(status) in _CRASHES else None
    return heard.lost["lost"] if heard.lost and os.WEXITSTATUS(status) == _LOST else None


def _goes_on(history, heard, how, stopped, in_a_row) -> bool:
    """Say what happened and what is done about it: whether there is to be another child."""
    at = ", ".join(f"{shown(name)} ({doing})" for name, doing in heard.at.items()) or "no video at hand"
    line = f"the process that extracts crashed ({how}): {at}"
    late = [name for name in heard.lost["late"] if name in heard.at] if heard.lost else []
    if stopped:
        _say(line)
    elif not heard.began:
        _say(f"{line}; it had not begun, and is not tried again")
    elif not (heard.at or heard.settled):
        _say(f"{line}; it had done nothing, and is not tried again")
    elif in_a_row > _MOST_IN_A_ROW:
        _say(f"{line}; that was {in_a_row} times without a video extracted, and is not tried again")
    elif how == _OUT_OF_MEMORY and history.crashes[how] >= _MOST_KILLED:
        _say(f"{line}; that was {_MOST_KILLED + 1} times, and is not tried again")
    else:
        _say(f"{line}; {history.crashed(how, list(heard.at), late)}")
        return True
    return False


def _say(line):
    print("\n" * sys.stderr.isatty() + line, file=sys.stderr, flush=True)  # the child's progress bar is in the line


def _listed(names):
    named = [shown(name) for name in list(names)[:_NAMED]]
    return ", ".join(named) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
