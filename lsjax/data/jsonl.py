"""Reads JSONL, one JSON object per line: the one reader for corpora and prompts."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lsjax.data.compressed import READ_ERRORS, open_bytes, plain_name, unreadable
from lsjax.data.tokenizer import check_text
from lsjax.errors import UserError

_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF16_MARKS = (b"\xff\xfe", b"\xfe\xff")
_COUNTED_AT_ONCE = 1 << 20
LONGEST_LINE = 1 << 28  # bytes; a line of a pipe, a device or a small archive may be without end


def is_jsonl(name: str) -> bool:
    """Returns whether a file is JSONL, possibly compressed, by its name."""
    return plain_name(name).lower().endswith(_SUFFIXES)


def read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields the number and the object of every line that is not blank. Lines count from 1.

    Only a line feed ends a line: texts may hold other line separators, such as U+2028. A name that ends in .gz or .zst
    is decompressed. Raises UserError that names FILE:LINE when a line is not UTF-8, not JSON, or not an object.
    """
    for number, line in enumerate(read_lines(path), 1):
        if line.strip():
            yield number, parse_line(line, f"{path}:{number}")


def read_lines(
    path: Path, start: int = 0, end: int | None = None, data: bytes | None = None, is_first: bool = True
) -> Iterator[bytes]:
    """Yields the lines of a file whose first byte lies in [start, end), blank lines included.

    end: None means the end of the file. data: these lines, if they have been read already. is_first: whether they
    begin the file, where a byte order mark is left out.
    """
    try:
        with open_bytes(path) if data is None else io.BytesIO(data) as file:
            if start and data is None:
                file.seek(start - 1)
                read_line(file, path)  # the rest of a line that began before `start`
            position = file.tell() if start and data is None else 0
            while (end is None or position < end) and (line := read_line(file, path)):
                yield line if position or not is_first else without_mark(line, path)
                position += len(line)
    except READ_ERRORS as error:
        raise unreadable(path, error) from None


def read_line(file: BinaryIO, path: Path) -> bytes:
    """Returns the next line of an open file, or b"" at its end. Raises UserError for one over LONGEST_LINE."""
    line = file.readline(LONGEST_LINE)
    if len(line) == LONGEST_LINE:
        raise UserError(f"{path} holds a line of {LONGEST_LINE:,} bytes or more, which is no JSON object of a text")
    return line


def count_lines(path: Path, start: int) -> int:
    """Returns the number of lines of a file before the first that begins at byte `start` or later."""
    if not start:
        return 0
    count, end = 1, start - 1  # the line that holds the byte before `start` is one of them
    with open_bytes(path) as file:
        while end > 0:
            content = file.read(min(end, _COUNTED_AT_ONCE))
            if not content:
                break
            count += content.count(b"\n")
            end -= len(content)
    return count


def without_mark(line: bytes, path: Path) -> bytes:
    """Returns the first line of a file without its byte order mark. Raises UserError when the file is UTF-16."""
    if line.startswith(_UTF16_MARKS):
        raise UserError(f"{path} is UTF-16; save it as UTF-8")
    return line.removeprefix(_BYTE_ORDER_MARK)


def text_of(row: dict[str, Any], key: str, place: object) -> str:
    """Returns the text at `key` of an object that was found at `place`, FILE:LINE, whose str() errors show."""
    if key not in row:
        raise UserError(f'{place}: want a JSON object with a "{key}" string, got the keys {sorted(row)[:8]}')
    try:
        return check_text(row[key], f'"{key}"')
    except UserError as error:
        raise UserError(f"{place}: {error}") from None


def parse_line(line: bytes, place: object) -> dict[str, Any]:
    """Returns the object of a line that was found at `place`, FILE:LINE. Raises UserError when it is none."""
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: byte {error.start + 1} of the line is not UTF-8; save the file as UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: want a JSON object: {error}") from None
    if not isinstance(row, dict):
        raise UserError(f"{place}: want a JSON object, got {type(row).__name__}")
    return row
