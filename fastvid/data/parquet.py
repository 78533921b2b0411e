"""Parquet files of records: the home of pyarrow."""

from collections.abc import Iterator
from typing import Any

from fastvid.files import StrPath, shown, wrong_content

MAGIC = b"PAR1"
_BATCH = 1024  # records that are unpacked at a time


def read_parquet(path: StrPath) -> Iterator[dict[str, Any]]:
    """Yield the records of a Parquet file, in order.

    What JSON cannot hold is told apart: bytes become {"bytes": how many}, times and their like become text.

    Raises:
        ValueError: there is no pyarrow, or the file is no whole one.
    """
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise ValueError(
            f"{shown(path)} is a Parquet file: `pip install pyarrow` reads it, or write its records as JSONL"
        ) from error
    if fault := wrong_content(path):
        raise ValueError(f"{shown(path)} {fault}")
    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for record in batch.to_pylist():
                    yield {name: _plain(value) for name, value in record.items()}
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{shown(path)} is no whole Parquet file ({said}); download it again") from error


def _plain(value):
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)
