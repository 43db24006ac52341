"""`generate` and `benchmark` refuse bad inputs, and their statistics add up."""

import re
import sys

import numpy as np
import pytest
import tokenizers

from lsjax.benchmarks.decoding import benchmark
from lsjax.benchmarks.measurements import Measurements
from lsjax.benchmarks.transformers_baseline import TransformersModel
from lsjax.cli.main import main
from lsjax.data.tokenizer import Tokenizer, train_tokenizer
from lsjax.decoding.model import Model
from lsjax.decoding.results import GenerateResult
from lsjax.decoding.strategies import Autoregressive, EarlyExit, Sampling, SelfSpeculative
from lsjax.errors import UserError
from lsjax.generation import generate
from tests.helpers.prompts import PROMPTS, NoTokenizer


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@pytest.mark.parametrize(
    ("prompts", "new", "strategy", "message"),
    [
        ([], 4, Autoregressive(), "at least one"),
        (b"bytes, not texts", 4, Autoregressive(), "must be a list"),
        ([[1], []], 4, Autoregressive(), "prompt 1 is empty"),
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


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"max_new_tokens": 4.0}, "max_new_tokens must be a whole number, got 4.0"),
        ({"max_new_tokens": "4"}, "max_new_tokens must be a whole number, got '4'"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number, got None"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5"),
        ({"batch_size": "1"}, "batch_size must be a whole number, got '1'"),
        ({"seed": -1}, "seed must be in 0.."),
        ({"seed": 2**64}, "seed must be in 0.."),
        ({"seed": "7"}, "seed must be a whole number, got '7'"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"sampling": Sampling("0.8")}, "temperature must be a number, got '0.8'"),
        ({"sampling": Sampling(True)}, "temperature must be a number, got True"),
        ({"sampling": Sampling(0.8, 2.5)}, "top_k must be a whole number, got 2.5"),
        ({"sampling": Sampling(0.8, None)}, "top_k must be a whole number, got None"),
        ({"sampling": Sampling(0.8, -1)}, "top_k must be 0 (all tokens) or positive"),
        ({"sampling": Sampling(0.8, 0, "0.9")}, "top_p must be a number, got '0.9'"),
        ({"sampling": Sampling(0.8, 0, float("nan"))}, "top_p must be at least"),
        ({"sampling": Sampling(0.8, 0, 1e-300)}, "top_p must be at least"),
        ({"sampling": None}, "sampling must be Sampling(...), got None"),
        ({"stop": None}, "stop must be non-empty texts, got None"),
        ({"stop_tokens": None}, "stop_tokens must be token ids, got None"),
        ({"stop_tokens": 257}, "stop_tokens must be token ids, got 257"),
        ({"strategy": "auto"}, "strategy must be Autoregressive()"),
        ({"strategy": None}, "strategy must be Autoregressive()"),
        ({"strategy": Autoregressive}, "strategy must be Autoregressive()"),
        ({"strategy": SelfSpeculative(1, 4.0)}, "num_speculations must be a number"),
        ({"strategy": SelfSpeculative("1", 4)}, "exit_layer must be a number"),
        ({"strategy": SelfSpeculative(True, 4)}, "exit_layer must be a number"),
        ({"strategy": SelfSpeculative(1, None)}, "num_speculations must be a number"),
    ],
)
def test_a_setting_of_the_wrong_type_or_size_is_named(model, keywords, message):
    with pytest.raises(UserError, match=re.escape(message)):
        generate(model, [[1]], **({"max_new_tokens": 4} | keywords))


@pytest.mark.parametrize("prompt", [b"abc", None, 3, ["a"], [1.0], [True], {1: 2}, {1}])
def test_a_prompt_that_is_neither_text_nor_ids_is_named(model, prompt):
    with pytest.raises(UserError, match="prompt 0 must be a text or a list of token ids"):
        generate(model, [prompt], 4)


def test_numpy_numbers_are_numbers(model):
    prompt = np.array([1, 2], np.int64)
    assert generate(model, [prompt], np.int32(4)).tokens == generate(model, [[1, 2]], 4).tokens


def test_every_bit_of_a_seed_counts(model):
    """JAX keeps the lower 32 bits of a seed; two seeds that agree in them must differ all the same."""
    hot = Sampling(2.0)
    seeds = [5, 5 + 2**32, 5 + 2**63]
    texts = [tuple(generate(model, [[1, 2, 3]], 12, sampling=hot, seed=seed).tokens[0]) for seed in seeds]
    assert len(set(texts)) == len(seeds)


def test_an_empty_text_is_a_prompt_if_a_token_opens_texts(tiny, tiny_params):
    tokenizer = train_tokenizer(["some text"], 300)
    assert tokenizer.begin is not None
    model = Model(tiny, tiny_params, tokenizer)
    assert generate(model, "", 4).tokens == generate(model, [[tokenizer.begin]], 4).tokens
    bare = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="b")), stop=(0,))
    with pytest.raises(UserError, match="prompt 0 is empty, and this tokenizer has no token that opens a text"):
        generate(Model(tiny, tiny_params, bare), "", 4)
    with pytest.raises(UserError, match="half of a surrogate pair"):
        generate(model, "\ud83d", 4)


def test_a_model_and_a_result_print_in_one_short_line(model):
    assert repr(model).startswith("Model(4 layers, ")
    assert len(repr(model)) < 200
    assert len(repr(generate(model, PROMPTS, 4))) < 200


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
    """The stop token comes first for one prompt only: its time per token does not exist, that of the others does."""
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
    """The times are set by hand: ratios 2, 4 and 3 have the median 3, which no ratio of medians or of sums gives."""

    def measured(milliseconds):
        stats = {
            "strategy": "", "exit_layer": 1, "num_speculations": 2, "draft_weights": None, "batch_size": 1,
            "new_tokens": 5,
            "drafted": 4, "accepted": 2, "drafted_by_position": [2, 2], "accepted_by_position": [1, 1], "rounds": 2,
            "tokens_per_second": None, "time_to_first_token_ms": 1.0, "lookup": 0,
            "draft_vocabulary": None,
        }  # fmt: skip
        # Three repeats around each time: the median is the time itself.
        results = [
            [GenerateResult([[1]], [""], [stats | {"ms_per_token": t and t * f, "seconds": 1.0}]) for f in (0.5, 1, 9)]
            for t in milliseconds
        ]
        return Measurements(results)

    summary = measured([1.0, 1.0, 3.0, None]).summary(measured([2.0, 4.0, 9.0, 7.0]))
    assert summary["speedup"] == 3.0
    assert summary["acceptance_rate"] == 0.5
    assert summary["acceptance_by_position"] == [0.5, 0.5]
    assert summary["tokens_per_round"] == 2.0


def test_comparing_without_transformers_says_what_to_install(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match="comparing with transformers needs torch: run `make parity`, or pip install"):
        TransformersModel(model)


def test_comparing_without_llama_cpp_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert main(["decode", "--model=python-20m", "--prompt=x", "--compare=llama_cpp"]) == 2
    told = capsys.readouterr().err
    assert "comparing with llama.cpp needs xllamacpp: run `make parity`, or pip install xllamacpp" in told
    assert told.count("\n") == 1
