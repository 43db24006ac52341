"""Reads and writes the reports of packed blocks. A preparation that was interrupted goes on from them."""

import dataclasses
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lsjax.data.corpus import Skipped
from lsjax.errors import UserError
from lsjax.files import in_bucket, path_of, read_json, write_atomically

_READ_AT_ONCE = 32


@dataclasses.dataclass(frozen=True)
class SplitPart:
    """One split of a block.

    file: its records, "" where there are none. padding: tokens that only fill a sequence. cut: examples longer than a
    sequence.
    """

    file: str
    documents: int
    sequences: int
    padding: int
    cut: int


@dataclasses.dataclass(frozen=True)
class Part:
    """The report of one block.

    is_last: whether the unit ends here. size: bytes of text. digest: the sum of the SHA-256 of all documents, modulo
    2**256, which does not depend on their order. splits: by name. skipped: see `Skipped.to_dict`.
    """

    unit: int
    number: int
    is_last: bool
    size: int
    digest: int
    splits: dict[str, SplitPart]
    skipped: dict[str, Any]


def write_part(folder: Path, part: Part) -> None:
    """Writes the report of a block whose records are complete."""
    tree = dataclasses.asdict(part) | {"digest": f"{part.digest:064x}"}
    write_atomically(path_of(folder) / f"part-{part.unit:06d}-{part.number:04d}.json", json.dumps(tree))


def read_parts(folder: Path) -> dict[int, dict[int, Part]]:
    """Returns the reports in a folder by unit and number. Raises UserError when one is damaged."""
    parts: dict[int, dict[int, Part]] = {}
    paths = sorted(path_of(folder).glob("part-*.json"))
    with ThreadPoolExecutor(_READ_AT_ONCE) as pool:  # a bucket answers each request after tens of milliseconds
        for part in (pool.map if in_bucket(folder) else map)(_read_part, paths):
            parts.setdefault(part.unit, {})[part.number] = part
    return parts


def is_complete(parts: dict[int, Part]) -> bool:
    """Returns whether the parts of one unit are all there."""
    return any(part.is_last and all(n in parts for n in range(number)) for number, part in parts.items())


def total(parts: Iterable[Part]) -> dict[str, Any]:
    """Returns the sums over all parts as the manifest has them: corpus, splits, files and skipped."""
    parts, skipped = list(parts), Skipped()
    for part in parts:
        skipped.merge(part.skipped)
    by_split: dict[str, list[SplitPart]] = {}
    for part in parts:
        for split, packed in part.splits.items():
            by_split.setdefault(split, []).append(packed)
    counts = {s: {k: sum(getattr(p, k) for p in packed) for k in _COUNTS} for s, packed in by_split.items()}
    return {
        "corpus": {
            "documents": sum(count["documents"] for count in counts.values()),
            "bytes": sum(part.size for part in parts),
            "sha256": f"{sum(part.digest for part in parts) % 2**256:064x}",
        },
        "splits": counts,
        "files": {s: {p.file: p.sequences for p in packed if p.sequences} for s, packed in by_split.items()},
        "skipped": skipped.to_dict(),
    }


_COUNTS = ("documents", "sequences", "padding", "cut")


def _read_part(path: Path) -> Part:
    tree = read_json(path)
    try:
        splits = {split: SplitPart(**counts) for split, counts in tree["splits"].items()}
        part = Part(**tree | {"splits": splits, "digest": int(tree["digest"], 16)})
        counts = [part.unit, part.number, part.size, *(getattr(s, k) for s in splits.values() for k in _COUNTS)]
        if any(type(count) is not int or count < 0 for count in counts) or type(part.is_last) is not bool:
            raise ValueError("a count is no whole number")
        Skipped(part.skipped)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {path.parent} to prepare the corpus anew") from None
    return part
