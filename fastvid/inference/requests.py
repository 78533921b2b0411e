"""Prompts that are to be continued, from their wait to their end, and the runs of rows that hold their keys and values.

Dimensions: R rows of a video, C channels of the vision tower.
"""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from fastvid.batch import Features


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt to be continued.

    Attributes:
        key: what its answer is returned with.
        token_ids: of the prompt.
        features_RC: of its video; None of a prompt without one.
        video: name of the features: prompts of the same name have the same.
        max_new_tokens: longest answer.
        temperature: 0 is greedy.
        seed: of the draws, which no other request changes.
        top_p: as for `next_token`.
    """

    key: Any
    token_ids: list[int]
    features_RC: Features | None = None
    video: Hashable = None
    max_new_tokens: int = 1024
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0

    @property
    def videos(self) -> list[Features]:
        """The features, as `pack` takes them."""
        return [] if self.features_RC is None else [self.features_RC]


@dataclass(eq=False)
class Waiting:
    """A request, the rows that it needs, and what it may share: the rows up to `end`, of which `beginning` tells."""

    request: Request
    prompt: int
    new_tokens: int
    end: int
    beginning: tuple

    @property
    def rows(self) -> int:
        return self.prompt + self.new_tokens


@dataclass(eq=False)
class Run:
    """Rows [first, stop) of the buffer, which so many answers need."""

    first: int
    stop: int
    users: int = 0


@dataclass(eq=False)
class Running:
    """A prompt in the buffer, and its answer so far.

    Attributes:
        own: its rows: all of them, or those behind the beginning that it has in common with others.
        base: the run that holds its beginning; None of a prompt that can share none.
        length: rows of it that are there, its beginning included; the last token's is not yet.
    """

    waiting: Waiting
    own: Run
    base: Run | None
    length: int
    generator: torch.Generator | None
    answer: list[int] = field(default_factory=list)

    @property
    def behind(self) -> bool:
        """Whether its beginning lies in another's run."""
        return self.base is not None and self.base is not self.own

    @property
    def next_row(self) -> int:
        """Where the next row of it belongs."""
        return self.own.first + self.length - (self.waiting.end if self.behind else 0)


def free_run(runs: Iterable[Run], rows: int, total: int) -> Run | None:
    """The first run of `rows` rows that is free of `runs`, among `total`; None without any."""
    free = 0
    for run in runs:
        if run.first - free >= rows:
            break
        free = run.stop
    return Run(free, free + rows) if free + rows <= total else None
