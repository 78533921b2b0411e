"""Chains of elementwise operations in plain torch, block of rows by block of rows: what lies between stays in the
cache."""

import functools
from collections.abc import Callable

from torch import Tensor

# Numbers of a block of one operand: 1 MiB in fp32, shared by the cores. Smaller blocks would spend the time on calls.
BLOCK_NUMBERS = 2**18


def row_blocks(x: Tensor) -> list[slice]:
    """Slices that cut the rows of x into blocks of at most `BLOCK_NUMBERS` numbers, but of at least one row.

    Of a meta tensor, which has no numbers, the first two: no more of them are in memory at once.
    """
    rows, columns = x.shape[0], x[:1].numel()
    size = max(1, BLOCK_NUMBERS // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)][: 2 if x.is_meta else None]


def over_rows(chain: Callable[..., None]) -> Callable[..., None]:
    """Decorator for a chain that treats every row by itself and writes its results into some of its tensors.

    Calls `chain(*tensors, **others)` for block after block of the tensors' rows, as many as `row_blocks` gives the
    first of them; None stays None, and `others` go to every block whole.
    """

    @functools.wraps(chain)
    def call(*tensors, **others):
        for rows in row_blocks(tensors[0]):
            chain(*(tensor if tensor is None else tensor[rows] for tensor in tensors), **others)

    return call


__all__ = ["BLOCK_NUMBERS", "over_rows", "row_blocks"]
