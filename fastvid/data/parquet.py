"""Parquet files of records: the home of pyarrow."""

from collections.abc import Iterator
from typing import Any

from fastvid.files import StrPath, shown, wrong_content

MAGIC = b"PAR1"
_UNREADABLE = (ValueError, OverflowError)  # of a time beyond Python's, of what is no UTF-8, of one field's two values
_BATCH = 1024  # records that are unpacked at a time


def read_parquet(path: StrPath) -> Iterator[dict[str, Any]]:
    """Yield the records of a Parquet file, in order.

    What JSON cannot hold is told apart: bytes become {"bytes": how many}, times and their like become text.

    Raises:
        ValueError: there is no pyarrow, the file is no whole one, or a column of it cannot be read.
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
            names = file.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise ValueError(f"{shown(path)} has several columns named {shown(twice)}; write it with one of them")
            for batch in file.iter_batches(_BATCH):
                for record in _records(batch, path):
                    yield {name: _plain(value) for name, value in record.items()}
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{shown(path)} is no whole Parquet file ({said}); download it again") from error


def _records(batch, path):
    try:
        return batch.to_pylist()
    except _UNREADABLE as error:
        column = next((name for name, values in zip(batch.schema.names, batch.columns) if not _is_readable(values)), "")
        raise ValueError(
            f"{shown(path)}: column {shown(column)} holds what cannot be read ({error}); write the file without that "
            "column, or with text in it"
        ) from error


def _is_readable(values):
    try:
        values.to_pylist()
    except _UNREADABLE:
        return False
    return True


def _plain(value):
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, dict):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return {"bytes": len(value)} if isinstance(value, bytes) else str(value)
