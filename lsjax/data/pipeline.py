"""Packed records -> batches, with Grain: shuffled, endless, exactly resumable, the same on any number of hosts."""

import functools
from collections.abc import Sequence
from pathlib import Path

import grain
import jax
import numpy as np

from lsjax.data.batch import Batch
from lsjax.data.packing import record_path


def training_batches(
    directory: Path,
    batch_size: int,
    sequence_length: int,
    seed: int,
    *,
    first_batch: int = 0,
    rows: Sequence[int] | None = None,
    separate_documents: bool = True,
) -> grain.DatasetIterator:
    """Endless batches from batch `first_batch` on: those of their B rows that this host holds (None: all).

    Row r of global batch t is record t*B + r of one shuffled stream, whichever host reads it. The step number
    is therefore the whole state of the pipeline, and a run resumes exactly on any number of hosts.
    """
    records = _records(directory, "train").shuffle(seed=seed).repeat()
    mine = _HostRows(records, batch_size, rows, first_batch)
    return iter(_batched(mine, sequence_length, separate_documents).to_iter_dataset(_READ_OPTIONS))


def held_out_batches(
    directory: Path,
    batch_size: int,
    sequence_length: int,
    max_batches: int,
    rows: Sequence[int] | None = None,
    separate_documents: bool = True,
) -> list[Batch]:
    """Held-out sequences spread evenly over the files, always the same, in whole batches (at least one: rows
    repeat if they must). `max_batches` 0 means all."""
    records = _records(directory, "held_out")
    batches = max(1, len(records) // batch_size)
    batches = min(batches, max_batches) if max_batches else batches
    stride = max(1, len(records) // (batches * batch_size))
    records = records[::stride] if len(records) >= batch_size else records.repeat()
    mine = _HostRows(records[: batches * batch_size], batch_size, rows)
    return list(_batched(mine, sequence_length, separate_documents))


# Records are small and in the page cache: a few threads keep ahead of any step without crowding the compute.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class _HostRows(grain.MapDataset):
    """This host's rows of every global batch."""

    def __init__(
        self, parent: grain.MapDataset, batch_size: int, rows: Sequence[int] | None = None, first_batch: int = 0
    ):
        super().__init__(parent)
        self.rows = [int(row) for row in (range(batch_size) if rows is None else rows)]
        self._batch_size, self._first_batch = batch_size, first_batch

    def __len__(self) -> int:
        return len(self._parent) // self._batch_size * len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, len(self.rows))
        return self._parent[(batch + self._first_batch) * self._batch_size + self.rows[row]]


def _records(directory: Path, split: str) -> grain.MapDataset:
    return grain.MapDataset.source(grain.sources.ArrayRecordDataSource(str(record_path(directory, split))))


def _batched(mine: _HostRows, sequence_length: int, separate_documents: bool) -> grain.MapDataset:
    read = functools.partial(unpack, sequence_length=sequence_length, separate_documents=separate_documents)
    return mine.map(read).batch(len(mine.rows), drop_remainder=True, batch_fn=_stack)


def unpack(record: bytes, sequence_length: int, separate_documents: bool = True) -> Batch:
    """One record -> a Batch without its batch axis. A target from the next document gets weight 0."""
    tokens, owners = np.frombuffer(record, np.int32).reshape(2, sequence_length + 1)
    index = np.arange(sequence_length, dtype=np.int32)
    starts = np.concatenate([[True], owners[1:-1] != owners[:-2]])
    text = Batch(tokens[:-1], tokens[1:], (owners[1:] == owners[:-1]).astype(np.float32))
    if not separate_documents:
        return text
    return text._replace(
        positions=index - np.maximum.accumulate(np.where(starts, index, 0)),
        segment_ids=(np.cumsum(starts) - 1).astype(np.int32),
    )


def _stack(rows: list[Batch]) -> Batch:
    return jax.tree.map(lambda *column: np.stack(column), *rows)
