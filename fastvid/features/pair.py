"""Two folders of feature files: of two vision towers that look at the same videos.

Dimensions: R rows of one video, C channels; R_1, C_1 of the first tower, R_2, C_2 of the second.
"""

from pathlib import Path
from typing import Any

import torch

from fastvid.batch import FeaturePair
from fastvid.features.folder import FeatureFolder
from fastvid.files import StrPath, shown


class FolderPair(FeatureFolder):
    """`FeatureFolder` whose videos have features in two folders, under the same names.

    Args:
        folder: of the first tower's features.
        second: of the second tower's.

    Attributes:
        towers: a `FeatureFolder` of each.

    Raises:
        ValueError: one of them is no folder.
    """

    def __init__(self, folder: StrPath, second: StrPath):
        self.folder, self.towers = Path(folder), (FeatureFolder(folder), FeatureFolder(second, flag="--video_folder_2"))

    @property
    def empty(self) -> bool:
        return all(each.empty for each in self.towers)

    def resolve(self, name: str) -> Path:
        """The first tower's file that `name` means.

        Raises:
            MissingFeatures, ValueError: as `FeatureFolder.resolve`, of either folder.
        """
        first, _ = (each.resolve(name) for each in self.towers)
        return first

    def load(self, name: str) -> tuple[FeaturePair, dict[str, Any]]:
        """The `FeaturePair` of a name, and what `header` gives.

        Raises:
            ValueError, OSError: as `FeatureFolder.load`, of either folder.
        """
        features, headers = zip(*(each.load(name) for each in self.towers))
        return FeaturePair(*features), {"towers": list(headers)}

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

    def told(self) -> str:
        """A line for the user before the first step."""
        return f"features: of two vision towers, in {' and '.join(shown(each.folder) for each in self.towers)}"
