"""Reads the documents of a corpus, a piece of a file at a time, and decides which of them are held out."""

import contextlib
import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from lsjax.config import DataConfig
from lsjax.data.compressed import READ_ERRORS, open_bytes, unreadable
from lsjax.data.corpus import Piece, Skipped, kind_of
from lsjax.data.examples import COLUMNS, example_text
from lsjax.data.jsonl import count_lines, parse_line, read_lines, text_of
from lsjax.data.parquet import read_parquet
from lsjax.data.token_files import open_tokens, read_token_documents
from lsjax.errors import UserError
from lsjax.files import path_of


class Place(NamedTuple):
    """The place of a document. str() gives FILE or FILE:LINE; only errors need it, so only errors count lines."""

    piece: Piece
    number: int = 0

    def __str__(self) -> str:
        if not self.number:
            return self.piece.path
        before = self.piece.lines_before
        before = count_lines(path_of(self.piece.path), self.piece.start) if before is None else before
        return f"{self.piece.path}:{before + self.number}"


class Document(NamedTuple):
    """One document of a corpus.

    text: what it says; "" for tokens. place: where it stands. row: its example, where the corpus is examples.
    tokens: its tokens, where the corpus is tokens.
    """

    text: str
    place: Place
    row: dict[str, Any] | None = None
    tokens: np.ndarray | None = None

    def content(self) -> bytes:
        """Returns the bytes that identify the document."""
        return self.text.encode() if self.tokens is None else self.tokens.astype(np.int32).tobytes()


def read_documents(pieces: Sequence[Piece], data: DataConfig, skipped: Skipped) -> Iterator[Document]:
    """Yields the documents of pieces of a corpus: rows of JSONL and Parquet files, parts of token files, other files.

    skipped: counts what is left out. Raises UserError that names the file, and the line, that cannot be read.
    """
    for piece in pieces:
        kind = kind_of(piece.name, data)
        if kind == "tokens":
            documents = _read_tokens(piece, data)
        elif kind == "text":
            documents = _read_file(piece, data, skipped)
        else:
            documents = _read_rows(piece, kind, data)
        for document in documents:
            if document.text.strip() if document.tokens is None else len(document.tokens) > 1:
                yield document
            else:
                skipped.documents["without text"] += 1


def _read_rows(piece: Piece, kind: str, data: DataConfig) -> Iterator[Document]:
    try:
        columns = (data.text_key,) if data.format == "text" else COLUMNS[data.format]
        for place, row in _jsonl_rows(piece) if kind == "jsonl" else _parquet_rows(piece, columns):
            if data.format == "text":
                yield Document(text_of(row, data.text_key, place), place)
            else:
                text = example_text(row, data.format, place)
                yield Document(text, place, {key: row[key] for key in columns})
    except UserError as error:
        hint = " (config.data.file_pattern chooses the files)" if piece.name != piece.path else ""
        raise UserError(f"{error}{hint}") from None


def _jsonl_rows(piece: Piece) -> Iterator[tuple[Place, dict[str, Any]]]:
    lines = read_lines(path_of(piece.path), piece.start, piece.end, piece.data, piece.lines_before == 0)
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = Place(piece, number)
            yield place, parse_line(line, place)


def _parquet_rows(piece: Piece, columns: Sequence[str]) -> Iterator[tuple[Place, dict[str, Any]]]:
    for number, row in read_parquet(path_of(piece.path), columns, piece.start, piece.end):
        yield Place(piece, number), row


def _read_tokens(piece: Piece, data: DataConfig) -> Iterator[Document]:
    tokens = open_tokens(path_of(piece.path), data.token_dtype)
    end = len(tokens) if piece.end is None else piece.end
    for begin, document in read_token_documents(tokens, data.token_separator, piece.start, end):
        yield Document("", Place(piece, begin), tokens=document)


def _read_file(piece: Piece, data: DataConfig, skipped: Skipped) -> Iterator[Document]:
    path = path_of(piece.path)
    try:
        with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig") as file:
            text = file.read()
    except UnicodeDecodeError:
        skipped.add_file(piece.name, "not UTF-8")
        return
    except READ_ERRORS as error:
        raise unreadable(path, error) from None
    if "\0" in text:  # such as UTF-16 without a byte order mark
        skipped.add_file(piece.name, "null characters, so no text in UTF-8")
        return
    if _holds_rows(piece.name, text, data.text_key):
        raise UserError(
            f'{piece.path} holds rows with the key "{data.text_key}", and would be read as one plain text: save them '
            "as .jsonl, one JSON object per line, or choose other files with config.data.file_pattern"
        )
    yield Document(text, Place(piece))


def _holds_rows(name: str, text: str, key: str) -> bool:
    """Returns whether a .json file is a list of rows, or one row per line, as some data sets name JSONL."""
    if ".json" not in PurePosixPath(name.lower()).suffixes[-2:]:
        return False
    for part in (text, text.strip().partition("\n")[0]):
        with contextlib.suppress(ValueError, RecursionError):
            found = json.loads(part)
            row = found[0] if isinstance(found, list) and found else found
            return isinstance(row, dict) and isinstance(row.get(key), str)
    return False


def digest_of(content: bytes) -> bytes:
    """Returns the SHA-256 of a document's content."""
    return hashlib.sha256(content).digest()


def is_held_out(digest: bytes, fraction: float) -> bool:
    """Chooses the split of a document by the SHA-256 of its content.

    Adding a document never moves another one, and copies of a document are never in both splits.
    """
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
