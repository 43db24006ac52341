"""Mixes the sources of config.data.mixture: which source each sequence of a run is from, and what that comes to."""

import math
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import grain

from lsjax.data.packed import read_manifest
from lsjax.data.sources import mixture_sources, train_split


class Interleaving(grain.transforms.DatasetSelectionMap):
    """Says where each sequence of an endless mixture comes from, for Grain's `select_from_datasets`.

    It spreads every source evenly, as `grain.MapDataset.mix` does. That function rounds the weights to hundredths of
    the smallest one; here they are exact, and the counts are known without reading anything.
    """

    def __init__(self, weights: Sequence[Fraction]):
        common = math.lcm(*(weight.denominator for weight in weights))
        self._weights = [int(weight * common) for weight in weights]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> tuple[int, int]:
        """Returns the source of sequence `index`, and its number in that source."""
        counts = zip(self.counts(index), self.counts(index + 1), strict=True)
        return next((source, before) for source, (before, after) in enumerate(counts) if after > before)

    def counts(self, length: int) -> list[int]:
        """Returns how many of the first `length` sequences each source has.

        The first source takes its share, rounded up; the others share the rest in the same way.
        """
        counts, remaining = [], sum(self._weights)
        for weight in self._weights:
            rest = length * (remaining - weight) // remaining
            counts.append(length - rest)
            length, remaining = rest, remaining - weight
        return counts


class MixtureReport:
    """Says what a run has read of each source of its mixture. Without a mixture its records are empty.

    mixture: config.data.mixture. directory: the packed data. batch_size: sequences of a step, over all hosts.
    """

    def __init__(self, mixture: str, directory: Path, batch_size: int):
        self._sources, self._batch_size = mixture_sources(mixture), batch_size
        self._interleaving = Interleaving([source.weight for source in self._sources.values()])
        manifest = read_manifest(directory) if self._sources else None
        splits = manifest["splits"] if manifest else {}
        self._packed = {name: splits[train_split(name)]["sequences"] for name in self._sources}

    def _read(self, step: int) -> dict[str, int]:
        counts = self._interleaving.counts(step * self._batch_size)
        return dict(zip(self._sources, counts, strict=True))

    def record(self, step: int) -> dict[str, dict[str, float]]:
        """Returns, for metrics.jsonl, each source's share of all sequences up to a step, and how often it was read."""
        if not self._sources:
            return {}
        read = self._read(step)
        return {
            "mixture": {name: count / (step * self._batch_size) for name, count in read.items()},
            "epochs": {name: count / self._packed[name] for name, count in read.items()},
        }

    def describe(self, step: int) -> str:
        """Returns the line about the shares up to a step, or about those to come for step 0."""
        if step == 0:
            total = sum(source.weight for source in self._sources.values())
            shares = {name: float(source.weight / total) for name, source in self._sources.items()}
            parts = [f"{name} {share:.2%} ({self._packed[name]:,} sequences packed)" for name, share in shares.items()]
            return f"mixture: {', '.join(parts)}"
        record = self.record(step)
        parts = [
            f"{name} {record['mixture'][name]:.2%} ({count:,} sequences, {record['epochs'][name]:.2f} epochs)"
            for name, count in self._read(step).items()
        ]
        return f"mixture up to step {step}: {', '.join(parts)}"
