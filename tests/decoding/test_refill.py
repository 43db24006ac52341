"""Waiting prompts take the places of finished ones: the same tokens as alone, in fewer rounds than in groups."""

import jax
import numpy as np
import pytest

import lsjax
from lsjax.data.tokenizer import train_tokenizer
from lsjax.decoding import program as module
from lsjax.decoding.forward import decoder_weights
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.errors import UserError
from lsjax.tuning.acceptance import batch_rounds
from tests.helpers.prompts import bare_batch

pytestmark = pytest.mark.slow

PROMPTS = [[5, 9, 2], [7] * 17, [300, 1, 14, 15, 92, 6, 53], [11], [80, 81, 82], [9, 9, 41, 9], [250] * 5]
NEW = 24
STRATEGIES = pytest.mark.parametrize(
    "strategy",
    [lsjax.Autoregressive(), lsjax.SelfSpeculative(2, 3), lsjax.SelfSpeculative(1, 2, lookup=4)],
    ids=["autoregressive", "self_speculative", "with_copies"],
)


@pytest.fixture(scope="module")
def model(varied, varied_params):
    """Returns a model whose texts have different lengths, since some of them reach the stop token."""
    tokenizer = train_tokenizer(["zwölf Boxkämpfer jagen Viktor über den großen Sylter Deich"], 320)
    plain = Model(varied, varied_params, tokenizer)
    texts = lsjax.generate(plain, PROMPTS, NEW).tokens
    stop = next(t for t in texts[1][4:] if 2 <= sum(t in text for text in texts) <= 4)
    tokenizer.stop = (stop,)
    model = Model(varied, varied_params, tokenizer)
    assert len({*map(len, lsjax.generate(model, PROMPTS, NEW).tokens)}) > 2
    return model


def alone(model, strategy, **how):
    results = [lsjax.generate(model, [prompt], NEW, strategy, **how) for prompt in PROMPTS]
    return [[part[0] for part in column] for column in zip(*results, strict=True)]


@STRATEGIES
@pytest.mark.parametrize("rows", [1, 3])
def test_each_prompt_decodes_as_it_would_alone(model, strategy, rows):
    tokens, texts, stats = alone(model, strategy)
    found = lsjax.generate(model, PROMPTS, NEW, strategy, batch_size=rows)
    assert (found.tokens, found.text) == (tokens, texts)
    for ours, theirs in zip(found.stats, stats, strict=True):
        same = "new_tokens", "rounds", "drafted_by_position", "accepted_by_position", "finish_reason"
        assert [ours[name] for name in same] == [theirs[name] for name in same]
        assert ours["batch_size"] == rows
        assert ours["time_to_first_token_ms"] > 0


@STRATEGIES
def test_no_row_stands_idle_while_a_prompt_waits(model, strategy):
    found = lsjax.generate(model, PROMPTS, NEW, strategy, batch_size=2)
    rounds = [row["rounds"] for row in found.stats]
    # By hand: the row that is free first takes the next prompt.
    ends = [rounds[0], rounds[1]]
    for count in rounds[2:]:
        ends[ends.index(min(ends))] += count
    assert {row["batch_rounds"] for row in found.stats} == {max(ends)}
    assert max(ends) < sum(max(rounds[start : start + 2]) for start in range(0, len(rounds), 2))


def test_the_count_of_rounds_is_that_of_every_order_by_hand():
    assert batch_rounds(np.array([5, 1, 1, 1, 4]), 2) == 7  # 5 | 1 1 1 4
    assert batch_rounds(np.array([3.5, 2, 2]), 3) == 3.5
    assert batch_rounds(np.array([3, 2, 2]), 1) == 7


def test_draws_are_those_of_the_prompt_alone(model):
    """Draws depend on the seed, the prompt, and the number of equal prompts before it, in whatever place it decodes."""
    sampling, prompts = lsjax.Sampling(1.0), [*PROMPTS, PROMPTS[0], PROMPTS[0]]
    together = lsjax.generate(model, prompts, NEW, sampling=sampling, seed=4)
    refilled = lsjax.generate(model, prompts, NEW, sampling=sampling, seed=4, batch_size=2)
    assert refilled.tokens == together.tokens
    assert len({*map(tuple, (refilled.tokens[0], refilled.tokens[-2], refilled.tokens[-1]))}) == 3


@STRATEGIES
def test_stop_strings_end_rows_and_let_others_in(model, strategy):
    """One of the stop strings is completed by a prompt's first token, in a place that another prompt had."""
    texts = lsjax.generate(model, PROMPTS, NEW).text
    first = lsjax.generate(model, PROMPTS, 1).text
    stop = [texts[2][6:8], next(text for text in first[3:] if text)]
    expected = alone(model, strategy, stop=stop)
    assert 1 in [len(tokens) for tokens in expected[0][3:]]
    assert len({*map(len, expected[0])}) > 2
    found = lsjax.generate(model, PROMPTS, NEW, strategy, stop=stop, batch_size=2)
    assert (found.tokens, found.text) == tuple(expected[:2])
    assert [row["rounds"] for row in found.stats] == [row["rounds"] for row in expected[2]]


def test_other_prompts_do_not_recompile(model):
    how = {"strategy": lsjax.SelfSpeculative(2, 3), "batch_size": 2}
    lsjax.generate(model, PROMPTS, NEW, **how)
    before = module.PROGRAM_CACHE.misses
    lsjax.generate(model, [[1] * 20] * 9, NEW + 5, **how)
    assert module.PROGRAM_CACHE.misses == before


def test_a_row_is_replaced_in_place(varied, varied_params):
    tokens, lengths = np.ones((5, 2048), np.int32), np.full(5, 9, np.int32)
    batch = bare_batch(tokens, lengths, 64, max_batch_size=4)
    program = DecodeProgram(varied, lsjax.SelfSpeculative(2, 3), batch)
    program.compile(decoder_weights(varied_params, jax.numpy.float32))
    memory = program._programs.replace.memory_analysis()
    cache_bytes = 2 * 4 * 4 * 2 * 2176 * 8 * 4  # k and v, layers, B, K, C, H, float32
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes / 100


def test_split_over_devices_it_gives_the_same_tokens(model, tmp_path):
    from lsjax.io.huggingface import write_huggingface

    write_huggingface(tmp_path, model.config, jax.device_get(model.params), model.tokenizer)
    split, strategy = lsjax.load(tmp_path, tensor=2), lsjax.SelfSpeculative(2, 3)
    found = lsjax.generate(split, PROMPTS, NEW, strategy, batch_size=2)
    assert found.tokens == lsjax.generate(lsjax.load(tmp_path), PROMPTS, NEW, strategy).tokens


def test_a_batch_of_no_rows_is_refused(model):
    with pytest.raises(UserError, match="batch_size must be at least 1, got 0"):
        lsjax.generate(model, PROMPTS, NEW, batch_size=0)
