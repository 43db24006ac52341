"""Scores of texts against values computed by hand, and confidence intervals."""

import sys

import numpy as np
import pytest

from lsjax.errors import UserError
from lsjax.evaluation.bootstrap import bootstrap, mean, ratio
from lsjax.evaluation.scores import METRICS, contains, exact_match, final_number, rouge, rouge_scorer

REFERENCE = "the cat sat on the mat"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        # 3 of 3 words, which are 3 of 6; 2 of 2 pairs, which are 2 of 5; the longest common subsequence has 3 words
        ("The cat sat.", {"rouge1": 2 / 3, "rouge2": 4 / 7, "rougeL": 2 / 3}),
        # every word; "on the", "the mat" and "the cat" of 5 pairs; "on the mat" is as long as any in common
        ("on the mat sat the cat", {"rouge1": 1.0, "rouge2": 3 / 5, "rougeL": 1 / 2}),
        # "the" counts as often as the reference has it: 2 of 3, and 2 of 6
        ("the, the, the!", {"rouge1": 4 / 9, "rouge2": 0.0, "rougeL": 4 / 9}),
        ("", {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}),
    ],
)
def test_rouge_by_hand(text, expected):
    assert rouge(text, REFERENCE) == pytest.approx(expected)
    for name, value in expected.items():
        assert METRICS[name](text, REFERENCE) == pytest.approx(value)


def test_rouge_drops_case_punctuation_and_what_is_not_ascii():
    assert rouge("THE CAT, sat; on the mat?", REFERENCE)["rouge2"] == 1.0
    assert rouge("naïve", "na ve")["rouge1"] == 1.0


def test_rouge_names_the_extra_when_its_package_is_missing(monkeypatch):
    rouge_scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(UserError, match=r"pip install 'rouge-score>=0.1.2', or install lsjax\[eval\]"):
        rouge("a", "b")


def test_exact_match_and_contains_ignore_white_space_alone():
    assert exact_match(" [IN:A  b ]\n", "[IN:A b ]") == 1.0
    assert exact_match("[in:A b ]", "[IN:A b ]") == 0.0
    assert exact_match("[IN:A b]", "[IN:A b ]") == 0.0
    assert contains("so a  b it is", "a b") == 1.0
    assert contains("so ab it is", "a b") == 0.0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3*400 = 1200\n#### 1,200", "1200"),
        ("#### 7 of 9 pens", "7"),
        ("it is 3, then $1,200.00.", "1200"),
        ("minus -5", "-5"),
        ("2.50 each", "2.50"),
        ("none", None),
        ("5 pens\n#### none", None),
    ],
)
def test_the_answer_of_a_calculation(text, number):
    assert final_number(text) == number


def test_an_interval_of_a_mean_is_that_of_the_normal_distribution_for_many_examples():
    values = np.random.default_rng(3).normal(5.0, 2.0, 400)
    estimate = bootstrap(mean, values)
    assert estimate.value == pytest.approx(values.mean())
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)
    assert bootstrap(mean, values) == estimate
    assert bootstrap(mean, values, seed=1) != estimate


def test_an_interval_takes_whole_examples():
    # accepted and drafted of an example stay together: each example has the share 1/2
    estimate = bootstrap(ratio, [1, 5, 50], [2, 10, 100])
    assert estimate == (0.5, 0.5, 0.5)


def test_there_is_no_interval_of_nothing():
    assert bootstrap(mean, []) is None
    assert bootstrap(ratio, [0, 0], [0, 0]) is None
    assert bootstrap(ratio, [0, 1], [0, 2]).value == 0.5
