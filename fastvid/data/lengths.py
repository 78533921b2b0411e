"""How many rows each sample takes: all are tokenized once at start, by all ranks together."""

from typing import Any

import numpy as np
from tqdm import tqdm

from fastvid.data.dataset import SampleSet
from fastvid.data.order.tokens import SampleRows
from fastvid.data.packing import Chain
from fastvid.data.prefetch import Prefetcher
from fastvid.data.sharing import Groups
from fastvid.dist.parallel import World

_CHUNK = 256  # samples that a process takes at a time
_QUIET = 3  # seconds without a progress bar


def measure(
    samples: SampleSet,
    world: World,
    *,
    packing: dict[str, Any],
    groups: Groups | None = None,
    processes: int = 0,
    progress: bool = False,
) -> SampleRows:
    """Rows of all samples.

    Args:
        samples: `fastvid.data.dataset.SampleSet`.
        world: `fastvid.dist.parallel.World`.
        packing: keyword arguments of `fastvid.data.packing.pack`.
        groups: `Groups` of samples that stay together; None where none do.
        processes: as many tokenize on each rank; 0: this one.
        progress: show a bar on rank 0.

    Returns:
        `SampleRows`, the same on every rank.
    """
    mine = range(world.rank, len(samples), world.size)

    def rows_of(number):
        found = []
        for index in mine[number * _CHUNK : (number + 1) * _CHUNK]:
            sample = samples.encode(index)
            found.append((0, 0) if sample.refused else Chain(sample, samples.tokenizer.tokens, **packing).rows)
        return np.array(found, dtype=np.int32)

    chunks = range(-(-len(mine) // _CHUNK))
    with tqdm(
        total=len(mine),
        desc="lengths",
        unit=" samples",
        delay=_QUIET,
        leave=False,
        disable=not progress or world.rank != 0,
    ) as bar:
        found = []
        for chunk in Prefetcher(rows_of, min(processes, len(chunks) // 2)).map(chunks):
            found.append(chunk)
            bar.update(len(chunk))
    table = np.empty((len(samples), 2), dtype=np.int64)
    for rank, rows in enumerate(world.gather_objects(np.concatenate([np.empty((0, 2), np.int32), *found]))):
        table[rank :: world.size] = rows
    own, shared = table.T.copy()
    if groups is not None:
        groups = groups.without(shared == 0)
    base = len(packing["prefix"]) if packing["share"] and not packing["frozen"] else 0
    return SampleRows(own, shared, groups, base)
