"""Confidence intervals of figures over examples, by the percentile bootstrap."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

_RESAMPLES = 1000


class Estimate(NamedTuple):
    """A figure with its 95 % confidence interval, low to high."""

    value: float
    low: float
    high: float


def bootstrap(statistic: Callable[..., float], *columns: Sequence[float], seed: int = 0) -> Estimate | None:
    """Returns a statistic over n examples and its interval over 1000 resamples of the examples, with replacement.

    statistic: takes the columns as arrays [n]. columns: the values of each example, at the same place in each column.
    Returns None without examples, and where the statistic of all examples is not finite. Resamples without a finite
    statistic are left out.
    """
    arrays = [np.asarray(column, np.float64) for column in columns]
    count = len(arrays[0])
    with np.errstate(divide="ignore", invalid="ignore"):
        value = float(statistic(*arrays)) if count else np.nan
        if not np.isfinite(value):
            return None
        generator = np.random.default_rng(seed)
        chosen = (generator.integers(count, size=count) for _ in range(_RESAMPLES))
        values = np.array([statistic(*(array[index] for array in arrays)) for index in chosen])
    low, high = np.percentile(values[np.isfinite(values)], [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def mean(values: np.ndarray) -> float:
    """Returns the mean of values [n]."""
    return float(values.mean())


def median(values: np.ndarray) -> float:
    """Returns the median of values [n]."""
    return float(np.median(values))


def ratio(parts: np.ndarray, wholes: np.ndarray) -> float:
    """Returns the sum of `parts` [n] over the sum of `wholes` [n]."""
    return float(parts.sum() / wholes.sum())
