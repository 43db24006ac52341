"""The repetition in a report is the mean over the prompts, from the first repeat of every batch."""

import pytest

from lsjax.benchmarks.decoding import benchmark
from lsjax.benchmarks.measurements import Measurements
from lsjax.decoding.model import Model
from lsjax.decoding.results import GenerateResult
from lsjax.decoding.strategies import EarlyExit
from lsjax.generation import generate
from tests.helpers.ngrams import brute_force
from tests.helpers.prompts import PROMPTS, NoTokenizer


def test_repetition_is_the_mean_over_the_prompts():
    """Counted by hand: 4 of 5 4-grams, none of 3, and a text too short to have one, which does not count."""
    first, second = [[7] * 8, [1, 2, 3, 4, 5, 6]], [[1, 2]]
    measured = Measurements([[GenerateResult(tokens, [], [])] for tokens in (first, second)])
    assert measured.repetition() == pytest.approx((0.8 + 0) / 2)
    assert Measurements([[GenerateResult(second, [], [])]]).repetition() is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_report_counts_new_tokens_alone(varied, varied_params, batch_size):
    model = Model(varied, varied_params, NoTokenizer())
    report = benchmark(model, PROMPTS, [EarlyExit(1)], max_new_tokens=24, batch_size=batch_size, repeats=1)
    early = generate(model, PROMPTS, 24, EarlyExit(1)).tokens
    expected = sum(brute_force(tokens, 4) for tokens in early) / len(PROMPTS)
    assert report["runs"][1]["repetition"] == pytest.approx(expected, abs=1e-12)
