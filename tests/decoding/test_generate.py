"""What `generate` and `benchmark` promise beyond the tokens: inputs refused, statistics that add up."""

import sys

import pytest

from lsjax.decoding.benchmark import Trial, benchmark
from lsjax.decoding.generate import GenerateResult, generate
from lsjax.decoding.rivals import TransformersModel
from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative
from lsjax.errors import UserError
from lsjax.loading import Model
from tests.decoding.test_loops import PROMPTS, NoTokenizer


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.mark.parametrize(
    ("prompts", "new", "strategy", "message"),
    [
        ([], 4, Autoregressive(), "at least one"),
        ("a text, not a list", 4, Autoregressive(), "must be a list"),
        ([[1], []], 4, Autoregressive(), "prompt 1 is empty"),
        ([""], 4, Autoregressive(), "prompt 0 is empty"),
        ([[1, 320]], 4, Autoregressive(), "token 320, outside the vocabulary 0..319"),
        ([[1, -1]], 4, Autoregressive(), "token -1, outside"),
        ([[1] * 125], 4, Autoregressive(), "exceeds the model's context of 128"),
        ([[1]], 0, Autoregressive(), "max_new_tokens must be at least 1"),
        ([[1]], 4, EarlyExit(0), "exit_layer 0 is out of range: this model has layers 1..4"),
        ([[1]], 4, SelfSpeculative(5, 2), "exit_layer 5 is out of range"),
        ([[1]], 4, SelfSpeculative(2, 0), "num_speculations 0 is out of range"),
    ],
)
def test_bad_input_is_named(model, prompts, new, strategy, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        generate(model, prompts, new, strategy)


def test_the_longest_prompt_that_fits_the_context_decodes(model):
    assert len(generate(model, [[1] * 124], 4, SelfSpeculative(2, 3)).tokens[0]) == 4


def test_the_benchmark_report_is_consistent(model):
    strategies = [Autoregressive(), EarlyExit(2), SelfSpeculative(2, 3), SelfSpeculative(4, 2)]
    notes = []
    report = benchmark(model, PROMPTS, strategies, max_new_tokens=9, batch_size=2, repeats=2, note=notes.append)
    plain, early, spec, full = report["runs"]
    assert [run["strategy"] for run in report["runs"]] == [
        "autoregressive", "early_exit", "self_speculative", "self_speculative",
    ]  # fmt: skip
    # Three prompts, two at a time.
    assert all(run["new_tokens"] == 3 * 9 and run["batch_size"] == 2 for run in report["runs"])
    assert plain["speedup"] == 1.0
    assert all(run["matches_autoregressive"] for run in (plain, spec, full))
    assert early["matches_autoregressive"] == (
        generate(model, PROMPTS, 9, EarlyExit(2)).tokens == generate(model, PROMPTS, 9).tokens
    )
    assert plain["acceptance_rate"] is None
    assert plain["tokens_per_round"] == 1.0
    assert full["acceptance_rate"] == 1.0
    assert full["acceptance_by_position"] == [1.0, 1.0]
    assert plain["acceptance_by_position"] == []
    assert full["tokens_per_round"] == pytest.approx(8 / 3)
    for run in report["runs"]:
        assert run["ms_per_token"] == pytest.approx(1e3 * run["seconds"] / (3 * 8), rel=1e-6)
    assert len(notes) == 4 + 2


def test_a_text_that_ends_at_once_has_no_speed(varied, varied_params):
    """The stop token comes first for one prompt only: its time a token does not exist, the others' does."""
    plain = Model(varied, varied_params, NoTokenizer())
    firsts = [row[0] for row in generate(plain, PROMPTS, 1).tokens]
    assert len(set(firsts)) > 1
    model = Model(varied, varied_params, NoTokenizer([firsts[0]]))
    report = benchmark(model, PROMPTS, [SelfSpeculative(2, 3)], max_new_tokens=9, repeats=1)
    assert report["runs"][1]["speedup"] > 0
    report = benchmark(model, PROMPTS[:1], [SelfSpeculative(2, 3)], max_new_tokens=9, repeats=1)
    assert report["runs"][1]["speedup"] is None
    assert report["runs"][1]["new_tokens"] == 1


def test_speedup_is_the_median_ratio_over_the_same_prompts():
    """Times by hand: ratios 2, 4 and 3 have the median 3, which no ratio of medians or of sums gives."""

    def trial(milliseconds):
        made = Trial.__new__(Trial)
        made.strategy, made.batches, made.compile_seconds = SelfSpeculative(1, 2), [None] * 4, 0.0
        stats = {
            "strategy": "", "exit_layer": 1, "num_speculations": 2, "draft_weights": None, "batch_size": 1,
            "new_tokens": 5,
            "drafted": 4, "accepted": 2, "drafted_by_position": [2, 2], "accepted_by_position": [1, 1], "rounds": 2,
            "tokens_per_second": None, "time_to_first_token_ms": 1.0, "lookup": 0,
        }  # fmt: skip
        # Three repeats around each time: the median is the time itself.
        made.results = [
            [GenerateResult([[1]], [""], [stats | {"ms_per_token": t and t * f, "seconds": 1.0}]) for f in (0.5, 1, 9)]
            for t in milliseconds
        ]
        return made

    summary = trial([1.0, 1.0, 3.0, None]).summary(trial([2.0, 4.0, 9.0, 7.0]))
    assert summary["speedup"] == 3.0
    assert summary["acceptance_rate"] == 0.5
    assert summary["acceptance_by_position"] == [0.5, 0.5]
    assert summary["tokens_per_round"] == 2.0


def test_comparing_without_transformers_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'lsjax\[parity\]'"):
        TransformersModel(model)
