"""How a video's patch states become the rows of its features: what ``--pooling`` says, and the rows that follow.

| spec | rows | whose recipe |
|---|---|---|
| ``temporal+spatial`` | frames + patches | Video-ChatGPT (arXiv:2306.05424, section 3.1), PG-Video-LLaVA |
| ``grid:TxHxW`` | T · H · W | PLLaVA (arXiv:2404.16994): ``grid:16x12x12`` of 16 frames |
| ``slow-fast:TxHxW+TxHxW`` | of both grids | SlowFast-LLaVA (arXiv:2407.15841): ``slow-fast:10x24x12+50x4x4`` |

A grid is an adaptive mean over time, height and width. The groups of ``slow-fast`` are few frames at a fine grid, then
all frames at a coarse one; only patches of one frame are averaged. Rows come in the order group, time, height, width.
Those recipes pool behind the projector; here the vision tower's own states are pooled, and the projector comes after.
"""

import math
import re
from dataclasses import dataclass
from typing import Self

__all__ = ["OF_AN_IMAGE", "RECIPE", "Pooling", "check_spec", "is_known"]

RECIPE = "temporal+spatial"  # what a feature file's header means that names none
OF_AN_IMAGE = "spatial"  # what the header of an image says, whatever its extraction was told about videos
_GRID = r"([1-9][0-9]{0,5})x([1-9][0-9]{0,3})x([1-9][0-9]{0,3})"
_SPEC = re.compile(rf"grid:{_GRID}|slow-fast:{_GRID}\+{_GRID}")


@dataclass(frozen=True)
class Pooling:
    """A spec, read.

    Attributes:
        grids: (time, height, width) of each group of rows; none: the recipe's two means.
        over_time: a grid's row is a mean over several frames; otherwise of one of the frames that its group takes.
    """

    grids: tuple[tuple[int, int, int], ...] = ()
    over_time: bool = True

    @classmethod
    def parse(cls, spec: str) -> Self:
        """The pooling that a spec means.

        Raises:
            ValueError: it means none, or its slow group has more frames than its fast one.
        """
        if spec == RECIPE:
            return cls()
        found = _SPEC.fullmatch(spec)
        if found is None:
            raise ValueError(
                f"--pooling {spec!r} is no pooling; give {RECIPE}, grid:TxHxW (such as grid:16x12x12: time, height, "
                "width) or slow-fast:TxHxW+TxHxW (such as slow-fast:10x24x12+50x4x4: few fine frames, many coarse ones)"
            )
        numbers = [int(number) for number in found.groups() if number is not None]
        grids = tuple((t, h, w) for t, h, w in zip(numbers[::3], numbers[1::3], numbers[2::3]))
        pooling = cls(grids, over_time=len(grids) == 1)
        if len(grids) == 2 and grids[0][0] > grids[1][0]:
            turned = cls(grids[::-1], over_time=False)
            raise ValueError(
                f"--pooling {spec} has the slow group, of fewer frames, behind the fast one; give {turned}"
            )
        return pooling

    def __str__(self) -> str:
        """The spec."""
        if not self.grids:
            return RECIPE
        kind = "grid" if self.over_time else "slow-fast"
        return f"{kind}:{'+'.join('x'.join(map(str, grid)) for grid in self.grids)}"

    def rows(self, num_frames: int, patches: int) -> int:
        """Rows of every video, be it as short as it may.

        Args:
            num_frames: most frames of a video.
            patches: of a frame; a square number where there are grids.

        Raises:
            ValueError: the grids do not go with that many frames or patches.
        """
        if not self.grids:
            return num_frames + patches
        most = max(time for time, _, _ in self.grids)
        if most > num_frames or (most < num_frames and not self.over_time):
            raise ValueError(
                f"--pooling {self} {'has' if self.over_time else 'takes'} {most} "
                f"{'steps of time' if self.over_time else 'frames of a video'}, and --num_frames is {num_frames}; "
                f"give --num_frames {most}" + " or more" * self.over_time
            )
        side = math.isqrt(patches)
        if any(max(height, width) > side for _, height, width in self.grids):
            raise ValueError(
                f"--pooling {self} is finer than the vision tower's {side} × {side} patches; give at most {side}x{side}"
            )
        return sum(time * height * width for time, height, width in self.grids)


def check_spec(spec: str) -> None:
    """Refuse a spec that means no pooling.

    Raises:
        ValueError: as `Pooling.parse`.
    """
    Pooling.parse(spec)


def is_known(spec: str) -> bool:
    """Whether a spec means a pooling here: another program, or a later version, may know others."""
    try:
        check_spec(spec)
    except ValueError:
        return False
    return True
