"""The share of 4-grams that occurred before, against a count by brute force."""

import numpy as np
import pytest

from lsjax.evaluation.repetition import repetition
from tests.helpers.ngrams import brute_force


@pytest.mark.parametrize("length", [1, 2, 4])
@pytest.mark.parametrize("vocabulary", [1, 2, 3, 50])
def test_every_ngram_is_compared_with_every_earlier_one(length, vocabulary):
    rng = np.random.default_rng(vocabulary)
    for size in (length, length + 1, 17, 64):
        tokens = rng.integers(0, vocabulary, size).tolist()
        assert repetition(tokens, length) == pytest.approx(brute_force(tokens, length), abs=1e-12)


def test_by_hand():
    assert repetition([1, 2, 3, 4, 5, 6]) == 0
    assert repetition([7] * 8) == 4 / 5  # five 4-grams, all but the first seen before
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == 1 / 5
    assert repetition([1, 2, 3]) is None
