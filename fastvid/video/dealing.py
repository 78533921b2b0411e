"""Who begins with which videos, and with what each goes on.

Every process deals all videos the same way and begins with its share, the longest first, so that none is left with a
long one at the end. What others have not finished it takes from the end of their shares, where they come last. Leases
(`fastvid.video.leases`) see to it that no two do the same video; one that another has leased is tried again later.
"""

import heapq
import os
import re
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from fastvid.video.listing import Video

# What a video costs beside its bytes, as bytes.
_EACH = 1 << 20
# Seconds between two tries of the videos that others have leased: at least, at most, and for each of them.
_PAUSE, _LONGEST_PAUSE, _PAUSE_EACH = 1.0, 15.0, 0.05


def place(shard: str | None = None) -> tuple[int, int]:
    """(rank, world) of this process: of torchrun's variables RANK and WORLD_SIZE, within a shard "i/n" if there is one.

    Shards are counted from 1, as "i of n" says.

    Raises:
        ValueError: no such shard.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if shard is None:
        return rank, world
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", shard, flags=re.ASCII)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise ValueError(
            f"--shard {shard!a} is no share of the work; give 1/4 to 4/4 for four of them (a Slurm job of "
            "--array=1-4: --shard $SLURM_ARRAY_TASK_ID/4)"
        )
    return (int(match[1]) - 1) * world + rank, int(match[2]) * world


def deal(videos: Iterable[Video], world: int) -> list[list[Video]]:
    """Shares of about as many bytes each, [[Video]], each with its largest first.

    Bytes stand for duration: to ask each file for that would take as long as half its decoding. The videos come back
    with their sizes, so that nobody has to ask for those again.
    """
    videos = [video if video.known_size is not None else replace(video, known_size=_size(video)) for video in videos]
    shares = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for video in sorted(videos, key=lambda video: (-(video.known_size or 0), video.name)):
        load, rank = loads[0]
        shares[rank].append(video)
        heapq.heapreplace(loads, (load + (video.known_size or 0) + _EACH, rank))
    return shares


def _size(video):
    """Bytes of a video; None if it cannot be looked at, which its turn will tell."""
    try:
        return video.size()
    except OSError:
        return None


class Turns:
    """The order in which a process comes to the videos.

    Args:
        shares: as `deal` gives them.
        rank: whose share comes first.
        take_over: whether others' shares follow.
        first: names of videos that come before all, whose share they are in.
    """

    def __init__(
        self, shares: Sequence[Sequence[Video]], rank: int, take_over: bool = True, first: frozenset[str] = frozenset()
    ):
        world = len(shares)
        self._first = deque(
            (video, share is shares[rank])
            for share in shares
            for video in share
            if video.name in first and (take_over or share is shares[rank])
        )
        shares = [[video for video in share if video.name not in first] for share in shares]
        self._own = deque(shares[rank])
        self._others = deque(
            video for i in range(1, world) for video in reversed(shares[(rank + i) % world]) if take_over
        )
        self._later, self._due, self._at = [], deque(), 0.0

    def next(self) -> tuple[Video, bool, bool] | None:
        """(video, whether it is of the own share, whether it comes for the first time); None: none at the moment."""
        if self._first:
            return *self._first.popleft(), True
        if self._own:
            return self._own.popleft(), True, True
        if self._others:
            return self._others.popleft(), False, True
        if not self._due and self._later and time.monotonic() >= self._at:
            self._due.extend(self._later)
            self._later.clear()
            # Many idle processes that try many leases over and over would be a load on a file server.
            self._at = time.monotonic() + min(max(_PAUSE, _PAUSE_EACH * len(self._due)), _LONGEST_PAUSE)
        return (*self._due.popleft(), False) if self._due else None

    def defer(self, video: Video, own: bool) -> None:
        """Come to a video again that another process has leased."""
        self._later.append((video, own))

    @property
    def waits(self) -> bool:
        """Whether there are more to come, now or later."""
        return self.ready or bool(self._later)

    @property
    def ready(self) -> bool:
        """Whether there is one to come at once."""
        return bool(self._first or self._own or self._others or self._due)

    @property
    def has_first(self) -> bool:
        """Whether there are any to come before all."""
        return bool(self._first)
