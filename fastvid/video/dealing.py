"""Who begins with which videos, and with what each goes on.

Every process deals all videos the same way and begins with its share, the longest first, so that none is left with a
long one at the end. What others have not finished it takes from the end of their shares, where they come last. Leases
(`fastvid.video.leases`) see to it that no two do the same video; one that another has in hand is looked at again.
"""

import heapq
import os
import re
import time
from collections import deque

# What a video costs beside its bytes, as bytes.
_EACH = 1 << 20
# Seconds between two looks at the videos that others have in hand.
PAUSE = 1.0


def place(shard=None) -> tuple[int, int]:
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
        raise ValueError(f"--shard {shard!a} is no share of the work; give 1/4 to 4/4 for four of them (a Slurm job of "
                         "--array=1-4: --shard $SLURM_ARRAY_TASK_ID/4)")
    return (int(match[1]) - 1) * world + rank, int(match[2]) * world


def deal(videos, world):
    """Shares of about as many bytes each, [[Video]], each with its largest first.

    Bytes stand for duration: to ask each file for that would take as long as half its decoding.
    """
    sizes = {video.name: _size(video) for video in videos}
    shares = [[] for _ in range(world)]
    loads = [(0, rank) for rank in range(world)]
    for video in sorted(videos, key=lambda video: (-sizes[video.name], video.name)):
        load, rank = loads[0]
        shares[rank].append(video)
        heapq.heapreplace(loads, (load + sizes[video.name] + _EACH, rank))
    return shares


def _size(video):
    """Bytes of a video; 0 if it cannot be looked at, which its turn will tell."""
    try:
        return video.size()
    except OSError:
        return 0


class Turns:
    """The order in which a process comes to the videos.

    Args:
        shares: as `deal` gives them.
        rank: whose share comes first.
        take_over: whether others' shares follow.
    """

    def __init__(self, shares, rank, take_over=True):
        world = len(shares)
        self._own = deque(shares[rank])
        self._others = deque(
            video for i in range(1, world) for video in reversed(shares[(rank + i) % world]) if take_over)
        self._later, self._due, self._at = [], deque(), 0.0

    def next(self):
        """(video, whether it is of the own share, whether it comes for the first time); None: none at the moment."""
        if self._own:
            return self._own.popleft(), True, True
        if self._others:
            return self._others.popleft(), False, True
        if not self._due and self._later and time.monotonic() >= self._at:
            self._due.extend(self._later)
            self._later.clear()
            self._at = time.monotonic() + PAUSE
        return (*self._due.popleft(), False) if self._due else None

    def defer(self, video, own):
        """Come to a video again that another process has in hand."""
        self._later.append((video, own))

    @property
    def waits(self) -> bool:
        """Whether there are more to come, now or later."""
        return bool(self._own or self._others or self._due or self._later)
