"""Makes batches from packed records with Grain: shuffled, endless, exactly resumable, equal on any number of hosts."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import grain
import jax
import numpy as np

from lsjax.data.batch import Batch
from lsjax.data.corpus import HELD_OUT, TRAIN
from lsjax.data.mixture import Interleaving
from lsjax.data.packed import MANIFEST, NO_DOCUMENT, check_records, damaged_data, local_data, read_manifest
from lsjax.data.sources import Source, mixture_sources, train_split
from lsjax.errors import UserError


def training_batches(
    directory: Path,
    batch_size: int,
    sequence_length: int,
    seed: int,
    *,
    mixture: str = "",
    first_batch: int = 0,
    rows: Sequence[int] | None = None,
    separate_documents: bool = True,
) -> grain.DatasetIterator:
    """Yields batches without end, starting with batch `first_batch`.

    mixture: config.data.mixture, of which `directory` holds all sources.
    rows: the rows of each global batch, of B rows, that this host holds; None means all.
    separate_documents: whether positions and attention start anew at each document.

    Row r of global batch t is record t*B + r of one shuffled stream, whichever host reads it. The step number is
    therefore the whole state of the pipeline, and a run resumes exactly on any number of hosts.
    """
    if mixture:
        records = _mixed(directory, mixture_sources(mixture), seed)
    else:
        records = read_records(directory, TRAIN).shuffle(seed=seed).repeat()
    mine = _HostRows(records, batch_size, rows, first_batch)
    return iter(_batched(mine, sequence_length, separate_documents).to_iter_dataset(_READ_OPTIONS))


def held_out_batches(
    directory: Path,
    batch_size: int,
    sequence_length: int,
    max_batches: int,
    rows: Sequence[int] | None = None,
    separate_documents: bool = True,
    split: str = HELD_OUT,
) -> list[Batch[np.ndarray]]:
    """Returns held-out sequences spread evenly over the records, always the same ones, in whole batches.

    split: "held_out", a source of config.data.mixture, or a set of config.data.validation.
    max_batches: the most batches to return; 0 means all. There is at least one batch; its rows repeat if there are
    fewer sequences than rows.
    """
    records = read_records(directory, split)
    batches = max(1, len(records) // batch_size)
    batches = min(batches, max_batches) if max_batches else batches
    stride = max(1, len(records) // (batches * batch_size))
    records = records[::stride] if len(records) >= batch_size else records.repeat()
    mine = _HostRows(records[: batches * batch_size], batch_size, rows)
    return list(_batched(mine, sequence_length, separate_documents))


def _mixed(directory: Path, sources: Mapping[str, Source], seed: int) -> grain.MapDataset:
    """Returns the endless sequences of all sources in their proportions, each source shuffled by itself."""
    streams = [
        # Grain adds 1 to the seed at each epoch. Sources of equal length must not be shuffled alike.
        read_records(directory, train_split(name)).shuffle(seed=(seed + (number << 20)) % 2**32).repeat()
        for number, name in enumerate(sources)
    ]
    weights = [source.weight for source in sources.values()]
    return grain.MapDataset.select_from_datasets(streams, Interleaving(weights))


# Records are small and in the page cache: two threads stay ahead of the steps without taking cores from them.
_READ_OPTIONS = grain.ReadOptions(num_threads=2, prefetch_buffer_size=8)


class _HostRows(grain.MapDataset):
    """The rows of every global batch that this host holds."""

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


def read_records(directory: Path, split: str) -> grain.MapDataset:
    """Opens the records of a split. Raises UserError when the files are not what the manifest describes."""
    directory = local_data(directory, [split])
    manifest = read_manifest(directory)
    if manifest is None:
        raise UserError(f"{directory} holds no packed data: it has no {MANIFEST}")
    files = manifest["files"][split]
    try:
        source = _open_records([directory / name for name in files])
        sound = len(source) == sum(files.values())
    except Exception:  # ArrayRecord raises several types for a damaged file
        source, sound = None, False
    if source is None or not sound:
        check_records(directory, {split: files})
        raise damaged_data(directory / MANIFEST, f"its {split} files cannot be read")
    return grain.MapDataset.source(source)


def _open_records(paths: Sequence[Path]) -> "grain.sources.RandomAccessDataSource[bytes]":
    source = grain.sources.ArrayRecordDataSource([str(path) for path in paths])
    # The checker cannot see the class that this one inherits its length from: Grain imports it under a condition.
    return cast("grain.sources.RandomAccessDataSource[bytes]", source)


def _batched(mine: _HostRows, sequence_length: int, separate_documents: bool) -> grain.MapDataset:
    read = functools.partial(unpack, sequence_length=sequence_length, separate_documents=separate_documents)
    return mine.map(read).batch(len(mine.rows), drop_remainder=True, batch_fn=_stack)


def unpack(record: bytes, sequence_length: int, separate_documents: bool = True) -> Batch[np.ndarray]:
    """Returns one record as a Batch without its batch axis.

    A target gets weight 0 if it is from the next document, padding, or a part of an example that is not learned.
    """
    tokens, owners, *masks = np.frombuffer(record, np.int32).reshape(-1, sequence_length + 1)
    index = np.arange(sequence_length, dtype=np.int32)
    starts = np.concatenate([[True], owners[1:-1] != owners[:-2]])
    learned = (owners[1:] == owners[:-1]) & (owners[1:] != NO_DOCUMENT)
    if masks:
        learned &= masks[0][1:] == 1
    text = Batch(tokens[:-1], tokens[1:], learned.astype(np.float32))
    if not separate_documents:
        return text
    return text._replace(
        positions=index - np.maximum.accumulate(np.where(starts, index, 0)),
        segment_ids=(np.cumsum(starts) - 1).astype(np.int32),
    )


def _stack(rows: Sequence[Batch[np.ndarray]]) -> Batch[np.ndarray]:
    return jax.tree.map(lambda *column: np.stack(column), *rows)
