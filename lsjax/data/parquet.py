"""Reads Parquet files, a few rows at a time, with pyarrow (the extra `parquet`)."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lsjax.errors import UserError
from lsjax.files import in_bucket

_ROWS_AT_ONCE = 256


def is_parquet(name: str) -> bool:
    """Returns whether a file is Parquet, by its name."""
    return name.lower().endswith(".parquet")


def row_group_count(path: Path) -> int:
    """Returns the number of row groups, the parts that can be read on their own."""
    return _open(path).num_row_groups


def read_parquet(
    path: Path, columns: Sequence[str], start: int = 0, end: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number, from 1, and the named columns of every row in row groups [start, end).

    Raises UserError when the file cannot be read or lacks a column.
    """
    file = _open(path)
    missing = [column for column in columns if column not in file.schema_arrow.names]
    if missing:
        raise UserError(f'{path}: want the column "{missing[0]}", got {file.schema_arrow.names[:8]}')
    repeated = [column for column in columns if file.schema_arrow.names.count(column) > 1]
    if repeated:
        raise UserError(f'{path} has several columns "{repeated[0]}"')
    groups = list(range(start, file.num_row_groups if end is None else end))
    number = sum(file.metadata.row_group(group).num_rows for group in range(start))
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, groups, list(columns), use_threads=False):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except _errors() as error:
        raise _unreadable(path, error) from None


def _open(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path} needs pyarrow to be read: pip install "lsjax[parquet]"') from None
    try:
        return pyarrow.parquet.ParquetFile(path.open("rb") if in_bucket(path) else path)
    except _errors() as error:
        raise _unreadable(path, error) from None


def _errors() -> tuple[type[Exception], ...]:
    import pyarrow

    # The others are of values that Python cannot hold: texts that are not UTF-8, dates of other ages.
    return (pyarrow.ArrowException, OSError, ValueError, OverflowError)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"cannot read {path}: {str(error).splitlines()[0]}")
