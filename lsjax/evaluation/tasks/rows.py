"""Reads the files of data sets: CSV, TSV, JSONL and Parquet, alone or as the splits in a folder."""

import csv
import re
from pathlib import Path

from lsjax.data.jsonl import is_jsonl, read_jsonl
from lsjax.data.parquet import is_parquet, read_parquet
from lsjax.errors import UserError
from lsjax.files import check_not_pointer, path_of

_TABLES = {".csv": ",", ".tsv": "\t"}
_LARGEST_FIELD = 2**24  # characters of one article; the csv module's own limit is 131,072


def read_rows(path: Path, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """Returns the rows of one file, each with a text for every key.

    Raises UserError, with file and line, for a row without them, for another kind of file and for an empty one.
    """
    path = path_of(path)
    if is_jsonl(path.name):
        rows = list(read_jsonl(path))
    elif is_parquet(path.name):
        rows = list(read_parquet(path, keys))
    elif path.suffix.lower() in _TABLES:
        rows = _read_table(path)
    else:
        raise UserError(f"{path} must be a file .csv, .tsv, .jsonl (.gz, .zst) or .parquet, or a folder of them")
    for number, row in rows:
        missing = [key for key in keys if not isinstance(row.get(key), str)]
        if missing:
            raise UserError(f'{path}:{number}: want a text "{missing[0]}", got the keys {sorted(map(str, row))[:8]}')
    if not rows:
        raise UserError(f"{path} holds no examples")
    return [row for _, row in rows]


def read_split(path: Path, split: str, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """Returns the rows of a file, or those of all files in a folder whose names hold `split` as a word."""
    files = split_files(path, split)
    if not files:
        raise UserError(f"{path} holds no file of the split {split!r}, such as {split}.csv or {split}.jsonl")
    return [row for file in files for row in read_rows(file, keys)]


def split_files(path: Path, split: str) -> list[Path]:
    """Returns the files of a split: `path` itself if it is a file, or those in the folder, by name."""
    path = path_of(path)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path} {'is a pipe or a device' if path.exists() else 'does not exist'}")
    word = re.compile(rf"(?:^|[^a-z]){re.escape(split)}(?:[^a-z]|$)")
    known = [file for file in path.iterdir() if _is_known(file)]
    return sorted(file for file in known if word.search(file.name))


def _is_known(file: Path) -> bool:
    return is_jsonl(file.name) or is_parquet(file.name) or file.suffix.lower() in _TABLES


def _read_table(path: Path) -> list[tuple[int, dict[str, str]]]:
    before = csv.field_size_limit(_LARGEST_FIELD)
    try:
        check_not_pointer(path)
        with path.open(encoding="utf-8-sig", newline="") as file:
            quoting = csv.QUOTE_MINIMAL if path.suffix.lower() == ".csv" else csv.QUOTE_NONE
            reader = csv.DictReader(file, delimiter=_TABLES[path.suffix.lower()], quoting=quoting)
            return [(reader.line_num, row) for row in reader]
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    finally:
        csv.field_size_limit(before)
