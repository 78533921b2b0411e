"""Two folders of features: of two vision towers that look at the same videos.

Dimensions: R rows of one video, C channels; R_1, C_1 of the first tower, R_2, C_2 of the second.
"""

import contextlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fastvid.batch import Channels, FeaturePair, Features
from fastvid.features.folder import FeatureFolder
from fastvid.files import shown


class FolderPair(FeatureFolder):
    """`FeatureFolder` whose videos have features in two folders, under the same names.

    Args:
        first, second: a `FeatureFolder` of each tower, also one where features are still to be made.

    Attributes:
        towers: both.
    """

    def __init__(self, first: FeatureFolder, second: FeatureFolder):
        self.folder, self.towers = first.folder, (first, second)

    @property
    def empty(self) -> bool:
        return all(each.empty for each in self.towers)

    def resolve(self, name: str) -> Path:
        """The first tower's file that `name` means.

        Raises:
            MissingFeatures, ValueError: as `FeatureFolder.resolve`, of either folder; both mean the same file.
        """
        first, second = (each.resolve(name) for each in self.towers)
        if first == second or (os.path.exists(first) and os.path.exists(second) and os.path.samefile(first, second)):
            raise ValueError(
                f"video {name!r}: {shown(first)} would be the features of both towers; give the second one's folder "
                "with --video_folder_2"
            )
        return first

    def load(self, name: str) -> tuple[FeaturePair, dict[str, Any]]:
        """The `FeaturePair` of a name, and what `header` gives.

        Raises:
            ValueError, OSError: as `FeatureFolder.load`, of either folder.
        """
        return _joined(each.load(name) for each in self.towers)

    def shape(self, name: str) -> tuple[int, tuple[int, int]]:
        """(R_1 + R_2, (C_1, C_2)); otherwise as `FeatureFolder.shape`."""
        rows, channels = zip(*(each.shape(name) for each in self.towers))
        return sum(rows), channels

    def dtype(self, name: str) -> torch.dtype:
        """The wider one of the dtypes in which the two files store their values."""
        return max((each.dtype(name) for each in self.towers), key=lambda dtype: dtype.itemsize)

    def header(self, name: str) -> dict[str, Any]:
        """{"towers": the headers of both files}."""
        return {"towers": [each.header(name) for each in self.towers]}

    # Where features are still to be made, by a process for each tower.

    @property
    def unmade(self) -> Sequence[Any]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return [video for each in self.towers for video in each.unmade]

    def settle(self) -> None:
        for each in self.towers:
            each.settle()

    def check_channels(self, channels: Channels) -> None:
        if isinstance(channels, tuple):
            for each, own in zip(self.towers, channels):
                each.check_channels(own)

    def video_of(self, name: str) -> Any:
        return next((video for each in self.towers if (video := each.video_of(name)) is not None), None)

    def made_otherwise(self, before: dict[str, Any]) -> list[str]:
        return list(dict.fromkeys(line for each in self.towers for line in each.made_otherwise(before)))

    def is_made(self, name: str) -> bool:
        return all(each.is_made(name) for each in self.towers)

    def await_made(self, name: str) -> None:
        for each in self.towers:
            each.await_made(name)

    def stand_in(self, name: str) -> tuple[Features, dict[str, Any]]:
        return _joined(each.stand_in(name) for each in self.towers)

    def begin(self, names: Iterable[str]) -> None:
        for each, same in zip(self.towers, itertools.tee(names)):
            each.begin(same)

    @contextlib.contextmanager
    def made_ahead(self, names: Iterable[str], stopped: Callable[[], object] = lambda: False) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for each, same in zip(self.towers, itertools.tee(names)):
                stack.enter_context(each.made_ahead(same, stopped))
            yield

    def told(self) -> str:
        """A line for the user before the first step."""
        folders = f"features: of two vision towers, in {' and '.join(shown(each.folder) for each in self.towers)}"
        return "; ".join([folders, *filter(None, (each.told() for each in self.towers))])


def _joined(found):
    """(`FeaturePair`, headers) of what each tower's folder gives."""
    features, headers = zip(*found)
    return FeaturePair(*features), {"towers": list(headers)}
