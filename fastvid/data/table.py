"""The records of a run's data files, which stay on disk: memory holds a few numbers of each, and each name once.

Dimensions: n records.
"""

from array import array
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from fastvid.data.annotations import Examined, Remarks
from fastvid.data.on_disk import Block, RecordFile
from fastvid.data.records import place
from fastvid.data.scanning import NO_NAME, NOT_PLAIN
from fastvid.data.styles import canonical, record_videos
from fastvid.files import StrPath

if TYPE_CHECKING:
    from fastvid.dist.parallel import World

_SEVERAL = -2  # in `RecordTable.first_video`: see `_several`
_LISTED = 5  # records that cannot be used which are told one by one


class RecordTable:
    """The usable records of data files, in order, each read when it is asked for.

    Args:
        examine: what is made of a record and its number.
        missing: why the features of a video are not to be had; None if they are. Asked once for each name.
        processes: as many look at large files; 0: this one.
        world: ranks that all make this table; None: this process is alone.

    Attributes:
        counts: usable records of each file.
        names: of their videos and images, in the order of their first use.
        remarks: about the usable records.
        unusable: how many records are left out.
        bad: the first of these, a line each.
    """

    def __init__(
        self,
        examine: Callable[[Any, int], Examined],
        missing: Callable[[str], str | None],
        processes: int = 0,
        world: "World | None" = None,
    ):
        self._examine, self._missing, self._processes, self._world = examine, missing, processes, world
        self.counts: list[int] = []
        self.names: list[str] = []
        self.remarks, self.unusable, self.bad = Remarks(), 0, []
        self._files: list[RecordFile] = []
        self._numbers = array("q")  # of the records in their files
        self._first_video = array("i")
        self._several: dict[int, list[int]] = {}
        self._number_of: dict[str, int] = {}  # of a name in `names`
        self._why: dict[str, str | None] = {}  # a name's features are missing
        self._ends = np.zeros(0, np.int64)

    def add(self, path: StrPath) -> None:
        """Add the usable records of a file.

        Raises:
            ValueError: the file cannot be read.
        """
        file, before = RecordFile(path, self._world), len(self)
        self._files.append(file)
        for block in file.scan(self._processes):
            if (block.name_of == NOT_PLAIN).any() or any(self._why_not(name) for name in block.names):
                self._add_one_by_one(file, block)
            else:
                known = np.array([*map(self._number, block.names), NO_NAME], dtype=np.int32)
                self._numbers.frombytes(np.arange(block.first, len(file), dtype=np.int64).tobytes())
                self._first_video.frombytes(known[block.name_of].tobytes())
        self.counts.append(len(self) - before)
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A record in the form of `fastvid.data.styles.canonical`.

        Raises:
            ValueError: its file was changed.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        file, number = self._place(index % len(self))
        return canonical(file[number], number)[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def place(self, index: int) -> str:
        """How messages name where a record stands."""
        file, number = self._place(index)
        return place(file.path, number)

    def videos(self, index: int) -> list[str]:
        """Names of a record's videos and images, in the order of their placeholders."""
        first = self._first_video[index]
        if first == _SEVERAL:
            return [self.names[number] for number in self._several[index]]
        return [] if first == NO_NAME else [self.names[first]]

    def sum_over_videos(self, of_name: np.ndarray) -> np.ndarray:
        """[n]: for each record the sum of what `of_name` holds of its videos, those of `names` in order."""
        total = np.append(of_name, [0, 0])[np.frombuffer(self._first_video, np.int32)]  # 0 for both kinds below
        for index, numbers in self._several.items():
            total[index] = of_name[numbers].sum()
        return total

    def sizes(self) -> np.ndarray:
        """[n] int64, the bytes of each record as it is written."""
        numbers = np.split(np.frombuffer(self._numbers, np.int64), self._ends[:-1])
        return np.concatenate([file.sizes()[mine] for file, mine in zip(self._files, numbers)])

    def _place(self, index):
        return self._files[int(np.searchsorted(self._ends, index, side="right"))], self._numbers[index]

    def _why_not(self, name):
        if name not in self._why:
            self._why[name] = self._missing(name)
        return self._why[name]

    def _number(self, name):
        number = self._number_of.setdefault(name, len(self.names))
        if number == len(self.names):
            self.names.append(name)
        return number

    def _add_one_by_one(self, file: RecordFile, block: Block):
        for number, local in enumerate(block.name_of.tolist(), start=block.first):
            remarks = []
            if local == NOT_PLAIN:
                found = self._examine(file.examined(number), number)
                names = record_videos(found.record) if found.record is not None else []
                fault, remarks = found.fault and found.fault.text, found.remarks
            else:
                names, fault = [] if local == NO_NAME else [block.names[local]], None
            if fault := fault or next(filter(None, map(self._why_not, names)), None):
                self.unusable += 1
                if len(self.bad) < _LISTED:
                    self.bad.append(f"{place(file.path, number)}: {fault}")
                continue
            if len(names) > 1:
                self._several[len(self)] = [self._number(name) for name in names]
            self._first_video.append(_SEVERAL if len(names) > 1 else self._number(names[0]) if names else NO_NAME)
            self._numbers.append(number)
            self.remarks.add(remarks, file.path, number)
