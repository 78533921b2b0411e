"""What an extraction did, as its command prints it."""

import re
import signal
from collections import Counter
from dataclasses import dataclass, field

_NUMBERS = re.compile(r"\b\d[\d.,]*\b")  # not those of a codec's name
_MOST_KINDS = 5  # of reasons, that are counted by themselves


def _kind(reason):
    """What reasons have in common that differ in their numbers and details."""
    return _NUMBERS.sub("n", re.split(r"[:;(]", reason)[0].strip())


@dataclass
class Summary:
    """What an extraction did (of several ranks: this one).

    Attributes:
        total: videos that it was about: all that were found, or this rank's share and what it took over.
        extracted, skipped: how many were made, or were there already.
        taken_over: videos of other ranks' shares that it took, for they had not finished them.
        padded: videos of fewer than --num_frames frames.
        frames: frames that the tower got, of the videos that this process made.
        damaged: videos that were taken although frames of them are missing or decode with errors.
        failures: (video, reason) of each that could not be extracted.
        notes: what a user should know of the job, a line each.
        seconds: wall time.
        interrupted: the signal that ended it early, or None.
        max_failures: the share of failures that is tolerated.
    """

    total: int
    max_failures: float
    extracted: int = 0
    skipped: int = 0
    padded: int = 0
    damaged: int = 0
    frames: int = 0
    taken_over: int = 0
    notes: list[str] = field(default_factory=list)
    failures: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0
    interrupted: int | None = None

    @property
    def exit_code(self) -> int:
        """128 + signal after an interrupt, 1 with too many failures, else 0."""
        if self.interrupted:
            return 128 + self.interrupted
        return int(len(self.failures) > self.max_failures * self.total)

    def __post_init__(self) -> None:
        self._kinds = Counter(_kind(reason) for _, reason in self.failures)

    def fail(self, video: str, reason: str) -> None:
        """Add a video that could not be extracted."""
        self.failures.append((video, reason))
        self._kinds[_kind(reason)] += 1

    def failed(self) -> str:
        """How many failed for which reason, the most frequent first; "" without failures."""
        common = self._kinds.most_common(_MOST_KINDS)
        rest = len(self.failures) - sum(count for _, count in common)
        return ", ".join(f"{count} × {kind}" for kind, count in common + [("other reasons", rest)] * bool(rest))

    def __str__(self) -> str:
        seconds = max(self.seconds, 1e-9)
        lines = [
            f"{self.extracted} extracted, {self.skipped} there already, {len(self.failures)} failed of "
            f"{self.total} videos in {self.seconds:.1f} s ({self.extracted / seconds:.2f} videos/s"
            + (f", {self.frames / seconds:.0f} frames/s)" if self.frames else ")")
        ]
        if self.taken_over:
            lines.append(
                f"{self.taken_over} of them were taken over from other ranks, which had not begun with them "
                "or were gone"
            )
        lines += self.notes
        if self.padded:
            lines.append(
                f"{self.padded} of them have fewer frames than --num_frames: the rest of their temporal rows is zero"
            )
        if self.damaged:
            lines.append(f"{self.damaged} of them are damaged, and were taken as they are (--allow_damaged)")
        if self.exit_code == 1:
            lines.append(f"more than --max_failures {self.max_failures:g} of them failed: the exit code is 1")
        if self.interrupted:
            lines.append(f"stopped by {signal.Signals(self.interrupted).name}; run it again to go on")
        if self.failures:
            # A name of several lines, or one that would colour the terminal, is shown with its characters escaped.
            named = [(video if video.isprintable() else ascii(video), reason) for video, reason in self.failures]
            width = min(60, max(len(video) for video, _ in named))
            if len(named) > 1:
                lines.append(f"failed, by reason: {self.failed()}")
            lines += ["failed:"] + [f"  {video:<{width}}  {reason}" for video, reason in named]
        return "\n".join(lines)
