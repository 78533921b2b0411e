"""Chains of elementwise operations in plain torch, block of rows by block of rows: what lies between stays in the
cache."""

import functools

# Numbers of a block of one operand: 1 MiB in fp32, shared by the cores. Smaller blocks would spend the time on calls.
BLOCK_NUMBERS = 2**18


def row_blocks(rows: int, columns: int) -> list[slice]:
    """Slices that cut `rows` into blocks of at most `BLOCK_NUMBERS` numbers, but of at least one row."""
    size = max(1, BLOCK_NUMBERS // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def over_rows(chain):
    """Decorator for a chain that treats every row by itself and writes its results into some of its tensors.

    Calls `chain(*tensors, **others)` for block after block of the tensors' rows, as many as `row_blocks` gives the
    first of them; None stays None, and `others` go to every block whole.
    """

    @functools.wraps(chain)
    def call(*tensors, **others):
        for rows in row_blocks(tensors[0].shape[0], tensors[0][:1].numel()):
            chain(*(tensor if tensor is None else tensor[rows] for tensor in tensors), **others)

    return call


__all__ = ["BLOCK_NUMBERS", "over_rows", "row_blocks"]
