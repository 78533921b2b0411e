"""Samples that have a video in common: who shares rows with whom, and how they stay together.

A group is samples whose prompts are the same up to the end of their (last) video: in a batch, `pack` computes those
rows once. In the reference's data every other question stands before its video, and shares it with none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import numpy as np

from fastvid.data.conversation import ordered
from fastvid.data.names import VIDEO
from fastvid.data.prefetch import Prefetcher
from fastvid.data.styles import record_videos
from fastvid.data.table import RecordTable

_CHUNK = 4096  # records that a process looks at together


@dataclass(frozen=True, eq=False)
class Groups:
    """Which samples share a video.

    Attributes:
        of: [n] int64, the number of each sample's group; a sample that shares with none has one of its own.
    """

    of: np.ndarray

    @staticmethod
    def of_records(records: RecordTable | Sequence[dict[str, Any]], question_order: str, processes: int = 0) -> Groups:
        """The groups of training records, from their text, of which memory holds 16 bytes each.

        Args:
            question_order: as `fastvid.data.conversation.ordered` takes it.
            processes: as many look at the records; 0: this one.
        """
        count = len(records)

        def digests(number):
            some = range(number * _CHUNK, min(count, (number + 1) * _CHUNK))
            return b"".join(_digest(_beginning(records[index], question_order), index) for index in some)

        chunks = range(-(-count // _CHUNK))
        found = b"".join(Prefetcher(digests, min(processes, len(chunks) // 2)).map(chunks))
        halves = np.frombuffer(found, np.uint64).reshape(-1, 2)
        order = np.lexsort(halves.T)  # of a group, the first sample comes first
        begins = np.diff(halves[order], axis=0, prepend=~halves[order][:1]).any(axis=1)
        of = np.empty(count, np.int64)
        of[order] = np.argsort(np.argsort(order[begins]))[np.cumsum(begins) - 1]
        return Groups(of)  # numbered as their first samples come

    def without(self, apart: np.ndarray) -> Groups:
        """The same groups, but that those of the samples in `apart` ([n] bool) are dissolved."""
        return Groups(np.where(apart, self.of.max(initial=0) + 1 + np.arange(len(self.of)), self.of))

    def together(self, indices: np.ndarray) -> np.ndarray:
        """`indices` with those of a group next to each other, in the order of each group's first."""
        if not len(indices):
            return indices
        _, first, group = np.unique(self.of[indices], return_index=True, return_inverse=True)
        return indices[np.argsort(first[group], kind="stable")]

    def runs(self, indices: np.ndarray) -> list[np.ndarray]:
        """`indices` cut wherever the group changes."""
        return np.split(indices, np.flatnonzero(np.diff(self.of[indices])) + 1) if len(indices) else []

    def spread(self, indices: np.ndarray, capacities: Sequence[int]) -> list[list[int]]:
        """Fill batches of given sizes, cutting a group only where no batch has room for it.

        Args:
            indices: as many samples as the capacities add up to, groups next to each other.
            capacities: samples of each batch.

        Returns:
            One list of indices per batch.
        """
        batches, room = [[] for _ in capacities], np.array(capacities)
        assert room.sum() == len(indices)
        for run in sorted(self.runs(indices), key=len, reverse=True):
            run = run.tolist()
            while run:
                fitting = np.flatnonzero(room >= len(run))
                batch = fitting[room[fitting].argmin()] if len(fitting) else room.argmax()
                taken = min(len(run), room[batch])
                batches[batch] += run[:taken]
                room[batch] -= taken
                run = run[taken:]
        return batches


def _digest(beginning, index):
    """16 bytes that are the same for samples with the same beginning; its own for the sample `index` without one."""
    if beginning is None:
        return b"alone\0\0\0" + index.to_bytes(8, "little")
    return blake2b(repr(beginning).encode(), digest_size=16).digest()


def _beginning(record, question_order):
    """What a record's prompt says up to the end of its last video; None where that holds an answer, or no video."""
    videos = record_videos(record)
    texts = [turn["value"] for turn in record["conversations"]]
    if not videos or not texts:
        return None
    texts = texts[record["conversations"][0]["from"] == "gpt" :]
    question = ordered(texts[0], question_order) if texts else ""
    if VIDEO not in question or any(VIDEO in text for text in texts[1:]):
        return None
    return tuple(videos), question[: question.rindex(VIDEO)]
