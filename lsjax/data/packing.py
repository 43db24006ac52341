"""Packs the documents of a block into sequences in ArrayRecord files, and reports what it packed.

Every block is packed by itself, so its bytes depend on its documents alone: not on the number of processes, hosts or
interruptions. This module imports neither JAX nor Grain, because the processes that pack start with it.
"""

import os
import secrets
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lsjax.config import DataConfig
from lsjax.data.corpus import Block, Skipped
from lsjax.data.documents import Document, digest_of, is_held_out, read_documents
from lsjax.data.examples import Example, all_learned, encode_chat, encode_completions
from lsjax.data.packers import Packer, WholePacker
from lsjax.data.parts import Part, SplitPart, write_part
from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError
from lsjax.files import in_bucket, path_of

_BATCH_CHARACTERS = 1 << 20  # tokenized at once


class Job(NamedTuple):
    """The settings of all blocks of a corpus. folder: receives the files. vocab_size: rows of the embedding."""

    folder: str
    data: DataConfig
    sequence_length: int
    vocab_size: int


def pack_block(block: Block, job: Job, tokenizer: Tokenizer) -> Part:
    """Packs one block, writes its files and its report into job.folder, and returns the report.

    Each file appears whole or not at all, the report last. Raises UserError for text that cannot be read.
    """
    skipped = Skipped()
    names = {split: f"{split}-{block.unit:06d}-{block.part:04d}.arrayrecord" for split in block.splits}
    writers = {split: _Writer(job, name) for split, name in names.items()}
    size = digest_sum = 0
    try:
        for documents in _batches(read_documents(block.pieces, job.data, skipped)):
            for document, example in zip(documents, _examples(documents, job, tokenizer), strict=True):
                content = document.content()
                digest = digest_of(content)
                second = len(block.splits) > 1 and is_held_out(digest, job.data.held_out_fraction)
                writers[block.splits[second]].add(example)
                size += len(content)
                digest_sum += int.from_bytes(digest, "big")
        packed = {split: writer.close() for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.discard()
    part = Part(block.unit, block.part, block.is_last, size, digest_sum % 2**256, packed, skipped.to_dict())
    write_part(path_of(job.folder), part)
    return part


def _examples(documents: Sequence[Document], job: Job, tokenizer: Tokenizer) -> Iterator[Example]:
    if job.data.token_separator >= 0:
        return (_checked(document, job.vocab_size) for document in documents)
    if job.data.format == "text":
        return map(all_learned, tokenizer.encode_documents([document.text for document in documents]))
    if job.data.format == "completion":
        return encode_completions([document.row or {} for document in documents], tokenizer)
    return (encode_chat(document.row or {}, tokenizer, document.place) for document in documents)


def _checked(document: Document, vocab_size: int) -> Example:
    """Returns a document of tokens as an example. Raises UserError when the embedding lacks one of them."""
    assert document.tokens is not None
    largest = int(document.tokens.max())
    if largest >= vocab_size:
        raise UserError(f"{document.place}: token {largest} is beyond config.model.vocab_size ({vocab_size})")
    return all_learned(document.tokens)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch, size = [], 0
    for document in documents:
        batch.append(document)
        size += len(document.text) if document.tokens is None else len(document.tokens)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes one split of a block. The file gets its name when it is complete; without records there is no file."""

    def __init__(self, job: Job, name: str):
        self._folder, self._name = path_of(job.folder), name
        self._packer = (Packer if job.data.format == "text" else WholePacker)(job.sequence_length)
        scratch = Path(tempfile.gettempdir()) if in_bucket(self._folder) else self._folder
        self._temporary = scratch / f".{name}.{secrets.token_hex(4)}"
        self._records: ArrayRecordWriter | None = None

    def add(self, example: Example) -> None:
        """Packs one document."""
        self._write(self._packer.add(example))

    def close(self) -> SplitPart:
        """Completes the file and returns what it holds."""
        self._write(self._packer.finish())
        packer = self._packer
        if self._records is None:
            return SplitPart("", packer.documents, 0, 0, 0)
        try:
            self._records.close()
            _move(self._temporary, self._folder / self._name)
        except (OSError, RuntimeError) as error:
            raise _unwritable(self._folder, error) from None
        return SplitPart(self._name, packer.documents, packer.sequences, packer.padding, packer.cut)

    def discard(self) -> None:
        """Removes an incomplete file."""
        self._temporary.unlink(missing_ok=True)

    def _write(self, windows: Iterator[np.ndarray]) -> None:
        for window in windows:
            try:
                # group_size:1 makes every record readable without its neighbours.
                records = self._records or ArrayRecordWriter(str(self._temporary), "group_size:1")
                records.write(window.tobytes())
                self._records = records
            except (OSError, RuntimeError) as error:  # ArrayRecord has no error of its own for a full disk
                raise _unwritable(self._folder, error) from None


def _move(file: Path, target: Path) -> None:
    """Moves a complete file to where it belongs, beside it or in a bucket."""
    if in_bucket(target):
        target.upload(file)
        return
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    os.replace(file, target)


def _unwritable(folder: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
    return UserError(f"cannot write data folder {folder}: {reason}; the same command goes on where it was")
