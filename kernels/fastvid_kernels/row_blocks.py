"""Chains of elementwise operations in plain torch, block of rows by block of rows: what lies between stays in the cache."""

# Numbers of a block of one operand: 1 MiB in fp32, shared by the cores. Smaller blocks would spend the time on calls.
BLOCK_NUMBERS = 2**18


def row_blocks(rows: int, columns: int, numbers: int = BLOCK_NUMBERS) -> list[slice]:
    """Slices that cut `rows` into blocks of at most `numbers` numbers, but of at least one row."""
    size = max(1, numbers // max(1, columns))
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


__all__ = ["BLOCK_NUMBERS", "row_blocks"]
