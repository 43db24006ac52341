"""A batch may mix settings: each prompt gives what it gives alone with its own, in one program for all of them."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.benchmarks.decoding import benchmark
from lsjax.data.tokenizer import train_tokenizer
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.model import Model
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.sampling import Greedy, filtered_log_probabilities
from lsjax.errors import UserError
from lsjax.tuning import decoded_batch

LIST = tuple(range(0, 320, 2))
STRATEGIES: dict[str, Any] = {
    "autoregressive": lsjax.Autoregressive(),
    "early_exit": lsjax.EarlyExit(2),
    "self_speculative": lsjax.SelfSpeculative(2, 3),
    "with_copies": lsjax.SelfSpeculative(2, 2, lookup=4),
    "draft_vocabulary": lsjax.SelfSpeculative(2, 3, draft_vocabulary=LIST),
    "all_of_it": lsjax.SelfSpeculative(1, 2, draft_weights="int8", lookup=3, draft_vocabulary=LIST),
}
QUICK = ("autoregressive", "self_speculative", "all_of_it")
BY_STRATEGY = pytest.mark.parametrize(
    "strategy",
    [
        pytest.param(strategy, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, strategy in STRATEGIES.items()
    ],
)
COUNTS = ("new_tokens", "rounds", "drafted_by_position", "accepted_by_position", "finish_reason")


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, train_tokenizer(["zwölf Boxkämpfer jagen Viktor über den Deich"], 320))


def random_requests(seed: int, count: int) -> tuple[list[list[int]], list[dict]]:
    """Returns prompts and the settings of each; the first is greedy, the second has a temperature alone."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 320, rng.integers(1, 16)).tolist() for _ in range(count - 1)] + [[5, 6] * 6]
    settings = []
    for index in range(count):
        temperature = float(rng.choice([0.0, 0.2, 0.5, 1.0])) if index > 1 else 0.7 * index
        filters = {"top_k": int(rng.choice([0, 3, 40])), "top_p": float(rng.choice([0.6, 0.95, 1.0]))}
        if not temperature or index == 1:
            filters = {"top_k": 0, "top_p": 1.0}
        settings.append({"temperature": temperature, **filters, "max_new_tokens": int(rng.integers(1, 25))})
    return prompts, settings


def together(settings: list[dict], coupled: bool = False) -> dict:
    """Returns the settings of some prompts as the arguments of one call."""
    columns = {key: [each[key] for each in settings] for key in settings[0]}
    filters = {key: columns.pop(key) for key in ("temperature", "top_k", "top_p")}
    return columns | {"sampling": lsjax.Sampling(**filters, coupled=coupled)}


def alone(settings: dict, coupled: bool = False) -> dict:
    """Returns the settings of one prompt as arguments, none of them a list per prompt."""
    rest = dict(settings)
    filters = {key: rest.pop(key) for key in ("temperature", "top_k", "top_p")}
    return rest | {"sampling": lsjax.Sampling(**filters, coupled=coupled)}


@BY_STRATEGY
@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow), pytest.param(3, marks=pytest.mark.slow)])
def test_each_prompt_of_a_mixed_batch_gives_what_it_gives_alone(model, strategy, seed):
    prompts, settings = random_requests(seed, 6)
    found = lsjax.generate(model, prompts, strategy=strategy, seed=seed, **together(settings))
    for row, (prompt, own) in enumerate(zip(prompts, settings, strict=True)):
        expected = lsjax.generate(model, [prompt], strategy=strategy, seed=seed, **alone(own))
        assert found.tokens[row] == expected.tokens[0], own
        assert found.text[row] == expected.text[0]
        assert [found.stats[row][name] for name in COUNTS] == [expected.stats[0][name] for name in COUNTS]
        assert len(found.tokens[row]) <= own["max_new_tokens"]
    assert sum(stats["accepted"] for stats in found.stats) > 0 or not strategy.max_drafts


@pytest.mark.slow
@pytest.mark.parametrize("strategy", list(STRATEGIES.values())[2:], ids=list(STRATEGIES)[2:])
def test_coupled_drafts_give_the_tokens_of_autoregressive_sampling(model, strategy):
    for seed in range(3):
        prompts, settings = random_requests(seed, 6)
        how = together(settings, coupled=True)
        expected = lsjax.generate(model, prompts, seed=seed, **how)
        found = lsjax.generate(model, prompts, strategy=strategy, seed=seed, **how)
        assert found.tokens == expected.tokens
        accepted, drafted = (sum(stats[key] for stats in found.stats) for key in ("accepted", "drafted"))
        assert 0 < accepted < drafted


@pytest.mark.parametrize("strategy", [STRATEGIES["autoregressive"], STRATEGIES["with_copies"]], ids=lambda s: s.name)
def test_stops_are_those_of_the_prompt(model, strategy):
    """One prompt has a stop text, one a stop token, one both, one none; a text that ends one leaves the others."""
    many, _ = random_requests(0, 12)
    texts = lsjax.generate(model, many, 20)
    long = [row for row in range(12) if len(texts.tokens[row]) == 20 and len(texts.text[row]) > 11]
    prompts = [many[row] for row in long[:4]]
    plain = lsjax.generate(model, prompts, 20)
    text, token = plain.text[0][4:6], plain.tokens[1][5]
    unused = next(t for t in range(3, 320) if t not in plain.tokens[2])
    stop, stop_tokens = [[text], [], [plain.text[2][9:11], "never in it"], []], [[], [token], [unused], []]
    found = lsjax.generate(model, prompts, 20, strategy, stop=stop, stop_tokens=stop_tokens)
    for row, prompt in enumerate(prompts):
        own = {"stop": stop[row], "stop_tokens": stop_tokens[row]}
        expected = lsjax.generate(model, [prompt], 20, strategy, **own)
        assert (found.tokens[row], found.text[row]) == (expected.tokens[0], expected.text[0])
        assert found.stats[row]["finish_reason"] == expected.stats[0]["finish_reason"]
    assert [stats["finish_reason"] for stats in found.stats] == ["stop", "stop", "stop", "length"]
    assert found.tokens[3] == plain.tokens[3]
    pieces = list(lsjax.stream(model, prompts, 20, strategy, stop=stop, stop_tokens=stop_tokens))
    for row in range(4):
        assert "".join(piece.text for piece in pieces if piece.row == row) == found.text[row]


@pytest.mark.slow
@BY_STRATEGY
def test_a_waiting_prompt_brings_its_own_settings(model, strategy):
    prompts, settings = random_requests(5, 8)
    settings[3]["max_new_tokens"] = 1  # it ends with the token of its prefill
    how = together(settings) | {"stop": [["zz"]] * 4 + [["e"]] * 4, "strategy": strategy, "seed": 4}
    expected = lsjax.generate(model, prompts, **how)
    found = lsjax.generate(model, prompts, **how, batch_size=2)
    assert (found.tokens, found.text) == (expected.tokens, expected.text)
    without = {key: value for key, value in how.items() if key != "stop"}
    expected = lsjax.generate(model, prompts, **without)
    assert lsjax.generate(model, prompts, **without, batch_size=3).tokens == expected.tokens


@pytest.mark.parametrize("batch_size", [None, 2])
def test_other_values_compile_nothing(model, batch_size):
    strategy, count = STRATEGIES["with_copies"], 4
    for seed in range(3):
        prompts, settings = random_requests(seed, count)
        settings[2] |= {"temperature": 0.4 + seed, "top_k": 5 + seed}
        stops = {"stop_tokens": [[seed + 3], [], [7, 8], [9] * seed]}
        lsjax.generate(model, prompts, strategy=strategy, **together(settings), **stops, batch_size=batch_size)
        if not seed:
            before = PROGRAM_CACHE.misses
    one_for_all = {"max_new_tokens": 9, "sampling": lsjax.Sampling(0.8, top_k=9), "stop_tokens": [4]}
    lsjax.generate(model, prompts, strategy=strategy, **one_for_all, batch_size=batch_size)
    assert PROGRAM_CACHE.misses == before


def test_a_batch_without_temperature_is_decoded_greedily(model):
    """Nothing is drawn or sorted for it: its program is that of one temperature 0 for all."""
    prompts, _ = random_requests(0, 3)
    expected = lsjax.generate(model, prompts, 9)
    before = PROGRAM_CACHE.misses
    how = {"max_new_tokens": [9, 4, 7], "sampling": lsjax.Sampling([0.0, 0, 0])}
    found = lsjax.generate(model, prompts, **how)
    assert PROGRAM_CACHE.misses == before
    assert found.tokens == [expected.tokens[0], expected.tokens[1][:4], expected.tokens[2][:7]]
    assert PromptBatch.make(model, prompts, GenerationConfig(**how)).sampler == Greedy()


def test_temperature_0_leaves_the_first_of_the_likeliest_tokens():
    logits = jnp.array([[1.0, 3.0, 3.0, 2.0], [1.0, 3.0, 3.0, 2.0]])
    temperature, top_k, top_p = jnp.array([0.0, 1.0]), jnp.array([0, 2]), jnp.array([1.0, 1.0])
    found = np.exp(filtered_log_probabilities(logits, temperature, top_k, top_p))
    np.testing.assert_allclose(found, [[0, 1, 0, 0], [0, 0.5, 0.5, 0]], atol=1e-6)
    blocks = np.exp(filtered_log_probabilities(jnp.stack([logits] * 3, 1), temperature, top_k, top_p))
    np.testing.assert_array_equal(blocks, np.stack([found] * 3, 1))


def test_predictions_are_those_of_each_prompt_alone(model):
    prompts, settings = random_requests(7, 5)
    limits = {"max_new_tokens": 12}
    settings = [each | limits for each in settings]
    new = lsjax.generate(model, prompts, 12).tokens

    def acceptance(prompts, new, how):
        batch = PromptBatch.make(model, prompts, GenerationConfig(**how))
        return decoded_batch.read_decoded(model, model.params, batch, new).acceptance

    found = acceptance(prompts, new, together(settings))
    for row, own in enumerate(settings):
        expected = acceptance([prompts[row]], [new[row]], alone(own))
        np.testing.assert_allclose(found[:, row], expected[:, 0], atol=1e-5)
    assert {*np.unique(found[:, 0])} <= {0.0, 1.0}  # greedy


@pytest.mark.slow
def test_automatic_settings_take_a_mixed_batch(model):
    prompts, settings = random_requests(8, 4)
    how = together(settings, coupled=True) | {"seed": 3}
    found = lsjax.generate(model, prompts, strategy=lsjax.SelfSpeculative("auto", "auto"), **how)
    assert found.tokens == lsjax.generate(model, prompts, **how).tokens


@pytest.mark.slow
def test_split_over_devices_it_gives_the_same_tokens(model, tmp_path):
    from lsjax.io.huggingface import write_huggingface

    write_huggingface(tmp_path, model.config, model.params, model.tokenizer)
    prompts, settings = random_requests(9, 5)
    how = together(settings) | {"strategy": STRATEGIES["self_speculative"], "batch_size": 2}
    whole, split = (lsjax.generate(lsjax.load(tmp_path, tensor=devices), prompts, **how) for devices in (1, 2))
    assert split.tokens == whole.tokens


def test_arrays_are_lists(model):
    prompts, _ = random_requests(0, 3)
    arrays = {"max_new_tokens": np.array([3, 1, 2]), "stop_tokens": [np.array([4]), np.array([], int), (5,)]}
    sampling = lsjax.Sampling(np.array([0.0, 0.5, 1.0]), jnp.array([0, 3, 2]), (1.0, 1.0, 0.9))
    found = lsjax.generate(model, prompts, **arrays, sampling=sampling)
    lists = {"max_new_tokens": [3, 1, 2], "stop_tokens": [[4], [], [5]]}
    assert sampling == lsjax.Sampling([0, 0.5, 1], [0, 3, 2], [1.0, 1, 0.9])
    assert found.tokens == lsjax.generate(model, prompts, **lists, sampling=sampling).tokens


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sampling": {"temperature": [0.0, 0.5, -1.0]}}, r"temperature\[2\] must be 0 \(greedy\) or in"),
        ({"sampling": {"temperature": [0.0, "hot", 1.0]}}, r"temperature\[1\] must be a number, got 'hot'"),
        ({"sampling": {"temperature": [0.5, True, 1.0]}}, r"temperature\[1\] must be a number, got True"),
        ({"sampling": {"temperature": 0.5, "top_k": [1, 2, -3]}}, r"top_k\[2\] must be 0 \(all tokens\) or positive"),
        ({"sampling": {"temperature": 0.5, "top_k": [1, 2.0, 3]}}, r"top_k\[1\] must be a whole number, got 2\.0"),
        ({"sampling": {"temperature": 0.5, "top_p": [1.0, 0.5, 1.5]}}, r"top_p\[2\] must be at least"),
        ({"sampling": {"temperature": [0.5, 0, 1], "top_k": [1, 2, 3]}}, r"top_k\[1\] needs temperature\[1\]"),
        ({"sampling": {"temperature": [0.5, 0, 1], "top_p": [1, 0.5, 1]}}, r"top_p\[1\] needs temperature\[1\]"),
        ({"sampling": {"temperature": [0, 0, 0], "top_k": 3}}, "top_k and top_p need a temperature above 0"),
        ({"sampling": {"temperature": [0.5, 0.5]}}, r"temperature has 2 values for 3 prompt\(s\): give one"),
        ({"sampling": {"temperature": 0.5, "top_p": []}}, r"top_p has 0 values for 3 prompt\(s\)"),
        ({"max_new_tokens": [1, 2, 0]}, r"max_new_tokens\[2\] must be at least 1, got 0"),
        ({"max_new_tokens": [1, None, 3]}, r"max_new_tokens\[1\] must be a whole number, got None"),
        ({"max_new_tokens": [1, 2, 3, 4]}, r"max_new_tokens has 4 values for 3 prompt\(s\)"),
        ({"max_new_tokens": [1, 2, 10**9]}, r"prompt 2 has 1 tokens; with max_new_tokens=1000000000 that exceeds"),
        ({"stop": [["a"], [""], []]}, r"stop\[1\] must be non-empty texts, got ''"),
        ({"stop": [["a"], ["b"]]}, r"stop has 2 values for 3 prompt\(s\): give one list for all, or one per prompt"),
        ({"stop": ["a", ["b"], "c"]}, r"stop must be non-empty texts, got \['b'\]"),
        ({"stop_tokens": [[1], [320], []]}, r"stop_tokens\[1\] holds 320, outside the vocabulary"),
        ({"stop_tokens": [[1], ["a"], []]}, r"stop_tokens\[1\] must be token ids, got \['a'\]"),
        ({"stop_tokens": [[1], 2, []]}, r"stop_tokens must be token ids"),
        ({"stop_tokens": [[1]]}, r"stop_tokens has 1 values for 3 prompt\(s\)"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_its_prompt(model, how, message):
    how = {"max_new_tokens": 4} | how
    if "sampling" in how:
        how["sampling"] = lsjax.Sampling(**how["sampling"])
    with pytest.raises(UserError, match=message):
        lsjax.generate(model, [[1, 2], [3], [4]], **how)


def test_measurements_take_one_value_for_all(model):
    prompts = [[1], [2]]
    with pytest.raises(UserError, match="max_new_tokens must be one value for all prompts here"):
        benchmark(model, prompts, [lsjax.EarlyExit(1)], max_new_tokens=[3, 4])
    with pytest.raises(UserError, match="top_p must be one value for all prompts here"):
        lsjax.tune(model, prompts, sampling=lsjax.Sampling(0.5, top_p=[0.5, 1]))
    request = GenerationConfig(4, stop=[["a"], []])
    with pytest.raises(UserError, match="stop must be one value"):
        request.check_one_for_all()
    dataclasses.replace(request, stop=["a", "b"]).check_one_for_all()
