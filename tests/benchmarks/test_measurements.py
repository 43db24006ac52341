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


def test_the_matching_share_is_what_comes_before_the_first_difference():
    """Counted by hand: 2 of 4, all, 0 of 2 and, where one text is longer, 1 of 3."""
    texts = [[[1, 2, 3, 4]], [[1, 2]], [[1, 2], [1]]]
    others = [[[1, 2, 9, 4]], [[1, 2]], [[9, 2], [1, 5, 6]]]
    stats = {"ms_per_token": 1.0, "seconds": 1.0, "tokens_per_second": 1.0, "time_to_first_token_ms": 1.0}
    stats |= dict.fromkeys(("drafted", "rounds", "accepted", "new_tokens"), 0)
    stats |= {"drafted_by_position": [], "accepted_by_position": []}
    stats |= dict.fromkeys(("strategy", "exit_layer", "num_speculations", "draft_weights", "draft_vocabulary"))
    stats |= dict.fromkeys(("lookup", "batch_size"))

    def measured(batches):
        return Measurements([[GenerateResult(tokens, [], [stats] * len(tokens))] for tokens in batches])

    summary = measured(others).summary(measured(texts))
    assert summary["matching_share"] == pytest.approx((2 / 4 + 1 + 0 + 1 / 3) / 4)
    assert summary["matches_autoregressive"] is False
    assert measured(texts).summary(measured(texts))["matching_share"] == 1
    assert measured(others).summary(measured(texts), greedy=False)["matching_share"] is None


@pytest.mark.parametrize("batch_size", [1, 3])
def test_the_report_counts_new_tokens_alone(varied, varied_params, batch_size):
    model = Model(varied, varied_params, NoTokenizer())
    report = benchmark(model, PROMPTS, [EarlyExit(1)], max_new_tokens=24, batch_size=batch_size, repeats=1)
    early = generate(model, PROMPTS, 24, EarlyExit(1)).tokens
    expected = sum(brute_force(tokens, 4) for tokens in early) / len(PROMPTS)
    assert report["runs"][1]["repetition"] == pytest.approx(expected, abs=1e-12)
