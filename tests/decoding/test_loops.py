"""Greedy decoding in float32 equals a decoder without a cache, without a batch and without drafts."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lsjax.decoding import lowering
from lsjax.decoding.batch import GenerationConfig, PromptBatch
from lsjax.decoding.forward import decoder_weights, init_cache, prefill, run_layers
from lsjax.decoding.loops import begin, draft, self_speculative_loop
from lsjax.decoding.lowering import DecodeShape
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.sampling import Greedy
from lsjax.decoding.strategies import Autoregressive, EarlyExit, SelfSpeculative
from lsjax.generation import generate
from lsjax.model.transformer import forward, hidden_states
from pallas_kernels.kv_cache import reference as kv_cache
from tests.helpers.prompts import NEW, PROMPTS, NoTokenizer, bare_batch


@pytest.fixture(scope="module")
def model(varied, varied_params):
    return Model(varied, varied_params, NoTokenizer())


@functools.lru_cache
def reference_tokens(prompt: tuple, exit_layer: int) -> list[int]:
    """Decodes greedily by running `forward` on the whole text again for every token."""
    from tests.conftest import VARIED

    params = reference_tokens.params
    run = jax.jit(lambda tokens, mask: forward(params, tokens, VARIED, mask))
    mask = jnp.asarray([1.0] * exit_layer + [0.0] * (VARIED.num_layers - exit_layer))
    tokens = list(prompt)
    for _ in range(NEW):
        # One padded shape: causality makes what stands after the last token irrelevant.
        padded = np.zeros((1, 64), np.int32)
        padded[0, : len(tokens)] = tokens
        tokens.append(int(jnp.argmax(run(padded, mask)[0, len(tokens) - 1])))
    return tokens[len(prompt) :]


@pytest.fixture(scope="module", autouse=True)
def _reference(varied_params):
    reference_tokens.params = varied_params


def test_autoregressive_equals_decoding_without_a_cache(model):
    # A text that repeats itself would prove little.
    assert min(len(set(reference_tokens(tuple(prompt), 4))) for prompt in PROMPTS) > 6
    for prompt in PROMPTS:
        assert generate(model, [prompt], NEW).tokens == [reference_tokens(tuple(prompt), 4)]


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
def test_early_exit_equals_the_first_layers_without_a_cache(model, exit_layer):
    result = generate(model, PROMPTS, NEW, EarlyExit(exit_layer))
    assert result.tokens == [reference_tokens(tuple(prompt), exit_layer) for prompt in PROMPTS]


@pytest.mark.parametrize("exit_layer", [1, 2, 3, 4])
@pytest.mark.parametrize("drafts", [1, 2, 3, 5, 8])
def test_self_speculation_equals_autoregressive_in_a_ragged_batch(model, exit_layer, drafts):
    result = generate(model, PROMPTS, NEW, SelfSpeculative(exit_layer, drafts))
    assert result.tokens == [reference_tokens(tuple(prompt), 4) for prompt in PROMPTS]


def test_the_drafts_of_the_full_model_are_always_accepted(model):
    stats = generate(model, PROMPTS, NEW, SelfSpeculative(4, 3)).stats
    assert [row["acceptance_rate"] for row in stats] == [1.0] * 3
    assert [row["tokens_per_round"] for row in stats] == [pytest.approx(23 / 6)] * 3


def test_rounds_count_rejections_as_they_are(model):
    """accepted + rounds = tokens of the loop, since each round adds its accepted drafts and one verified token."""
    stats = generate(model, PROMPTS, NEW, SelfSpeculative(3, 3)).stats
    for row in stats:
        # The last round may be cut at the limit, which loses its verified token.
        assert row["accepted"] + row["rounds"] - (row["new_tokens"] - 1) in (0, 1)
    # Some drafts are accepted and some are not, or this test would see neither case.
    assert 0 < sum(row["accepted"] for row in stats) < sum(row["drafted"] for row in stats)


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(2, 4), EarlyExit(2)])
def test_a_row_does_not_depend_on_its_batch(model, strategy):
    together = generate(model, PROMPTS * 2, NEW, strategy).tokens
    alone = [generate(model, [prompt], NEW, strategy).tokens[0] for prompt in PROMPTS]
    assert together == alone * 2


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(2, 4), SelfSpeculative(4, 5)])
def test_a_stop_token_ends_its_row_wherever_it_stands_in_a_block(varied, varied_params, strategy):
    """Every token of the reference becomes the stop token in turn; the sequence ends at its first occurrence."""
    reference = [reference_tokens(tuple(prompt), 4) for prompt in PROMPTS]
    for stop in sorted({row[index] for row in reference for index in range(0, NEW, 3)}):
        model = Model(varied, varied_params, NoTokenizer([stop]))
        expected = [row[: row.index(stop) + 1] if stop in row else row for row in reference]
        assert generate(model, PROMPTS, NEW, strategy).tokens == expected


@pytest.mark.parametrize("new", [1, 2, 5, 6, 7])
def test_the_limit_is_exact(model, new):
    tokens = generate(model, PROMPTS, new, SelfSpeculative(4, 3)).tokens
    assert tokens == [reference_tokens(tuple(prompt), 4)[:new] for prompt in PROMPTS]


@pytest.mark.parametrize(("exit_layer", "drafts"), [(2, 3), (4, 5)])
def test_texts_of_a_batch_end_at_every_position_of_a_block(varied, varied_params, exit_layer, drafts):
    """Every sequence ends elsewhere, all in one batch.

    The count of rounds under every limit tells where blocks begin: prefill emits the first token, and the second begins
    the first block.
    """
    plain, strategy = Model(varied, varied_params, NoTokenizer()), SelfSpeculative(exit_layer, drafts)
    reference = [reference_tokens(tuple(prompt), 4) for prompt in PROMPTS]
    stats = [generate(plain, PROMPTS, limit, strategy).stats for limit in range(1, NEW + 1)]
    rounds = np.array([[row["rounds"] for row in batch] for batch in stats]).T
    seen = set()
    for shift in range(1, NEW):
        ends = [row[(shift + 5 * index) % NEW] for index, row in enumerate(reference)]
        ended = generate(Model(varied, varied_params, NoTokenizer(ends)), PROMPTS, NEW, strategy)
        lengths = [min(row.index(end) for end in ends if end in row) + 1 for row in reference]
        assert ended.tokens == [row[:length] for row, length in zip(reference, lengths, strict=True)]
        for length, counts, row in zip(lengths, rounds, ended.stats, strict=True):
            assert row["rounds"] == counts[length - 1]
            if length > 1:
                seen.add(length - 1 - int(np.searchsorted(counts, counts[length - 1])))
    assert seen == set(range(drafts + 1))


@pytest.mark.parametrize("strategy", [Autoregressive(), EarlyExit(2), SelfSpeculative(2, 3), SelfSpeculative(4, 5)])
def test_what_a_cache_held_before_does_not_matter(monkeypatch, model, strategy):
    """Prefill, padding, drafts and rejections run on caches full of huge numbers, with prompts of several lengths."""
    made = kv_cache.init_layer_cache

    def used(*sizes):
        return jax.tree.map(lambda a: jnp.full_like(a, 1e30), made(*sizes))

    monkeypatch.setattr(kv_cache, "init_layer_cache", used)
    PROGRAM_CACHE.clear()
    found = generate(model, PROMPTS, NEW, strategy).tokens
    PROGRAM_CACHE.clear()
    exit_layer = 2 if strategy == EarlyExit(2) else 4
    assert found == [reference_tokens(tuple(prompt), exit_layer) for prompt in PROMPTS]


class DraftsPoison(NamedTuple):
    """Greedy, except that every third new token is drafted as `poison`, whose embedding is NaN."""

    poison: jax.Array

    def choose(self, logits, index, subset=None):
        token, _ = Greedy().choose(logits, index, subset)
        return jnp.where(index % 3 == 1, self.poison, token), None

    def verify(self, *drafted):
        return Greedy().verify(*drafted)


@pytest.mark.parametrize("drafts", [2, 5])
def test_a_draft_that_is_not_a_number_leaves_no_trace(varied, varied_params, drafts):
    expected = [reference_tokens(tuple(prompt), 4) for prompt in PROMPTS]
    poison = next(token for token in range(1, 320) if not any(token in text for text in (*expected, *PROMPTS)))
    weights = decoder_weights(varied_params, jnp.float32)
    weights |= {"embed": weights["embed"].at[poison].set(jnp.nan)}
    batch = PromptBatch.make(Model(varied, varied_params, NoTokenizer()), PROMPTS, GenerationConfig(NEW))
    how = {"config": varied, "strategy": SelfSpeculative(2, drafts)}
    inputs = jnp.int32(NEW), jnp.array([-1]), DraftsPoison(jnp.int32(poison))
    shape = DecodeShape(3, batch.tokens.shape[1], 96, 64, 1)

    @jax.jit
    def run(weights):
        state = lowering._first_token(weights, batch.tokens, batch.lengths, *inputs, **how, shape=shape)
        return lowering._decode(weights, state, *inputs, **how)

    state = run(weights)
    assert state.tokens[:, :NEW].tolist() == expected
    assert np.all(state.accepted_at[:, 0] > 0)  # drafts between the poisoned ones


def test_stale_cache_entries_never_leak(varied, varied_params):
    """Entries past each sequence's length are huge before every round, as if every rejected draft had left poison."""
    weights = decoder_weights(varied_params, jnp.float32)
    prompt = PROMPTS[2]
    tokens = jnp.asarray([prompt], jnp.int32)
    logits, cache = prefill(weights, tokens, jnp.array([7]), init_cache(varied, 1, 64, jnp.float32), varied, range(4))
    first = jnp.argmax(logits, axis=-1)
    stop, limit = jnp.array([-1]), jnp.int32(1000)
    state = begin(cache, first, jnp.array([7]), limit, stop, 64)
    run_round = jax.jit(
        lambda state, limit: self_speculative_loop(
            weights, state, limit, stop, varied, exit_layer=2, num_speculations=3
        )
    )
    while int(state.emitted[0]) < NEW:
        stale = jnp.arange(64)[None, None, :, None] >= state.length[0]
        poisoned = jax.tree.map(lambda a, stale=stale: jnp.where(stale, 1e30, a), state.cache)
        # A limit one token ahead ends the loop after one round; the state then goes on.
        state = run_round(state._replace(cache=poisoned, done=jnp.array([False])), state.emitted[0] + 1)
    assert state.tokens[0, :NEW].tolist() == reference_tokens(tuple(prompt), 4)


def test_draft_states_and_cache_are_those_of_a_full_pass(varied, varied_params):
    """Verification starts from the hidden states and keys that one pass over the same tokens gives."""
    weights = decoder_weights(varied_params, jnp.float32)
    prompt = jnp.asarray([PROMPTS[2]], jnp.int32)
    logits, cache = prefill(weights, prompt, jnp.array([7]), init_cache(varied, 1, 64, jnp.float32), varied, range(4))
    first = jnp.argmax(logits, axis=-1)
    state = begin(cache, first, jnp.array([7]), jnp.int32(50), jnp.array([-1]), 64)
    drafts, _, states, cache = draft(weights, state, varied, exit_layer=2, num_speculations=3)
    text = jnp.concatenate([prompt, first[:, None], drafts], axis=1)
    expected = hidden_states(varied_params, text, varied)
    np.testing.assert_allclose(states[0], expected[1, 0, 7:], rtol=1e-4, atol=1e-5)
    x, cache = run_layers(weights, states, cache, state.length, range(2, 4), varied)
    np.testing.assert_allclose(x[0], expected[3, 0, 7:], rtol=1e-4, atol=1e-5)
    _, whole = prefill(weights, text, jnp.array([11]), init_cache(varied, 1, 64, jnp.float32), varied, range(4))
    for ours, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(ours[:, :, :11], theirs[:, :, :11], rtol=1e-4, atol=1e-5)


def test_new_lengths_limits_and_prompts_do_not_recompile(model):
    from lsjax.decoding import program as module

    generate(model, [[1, 2, 3]], 20, SelfSpeculative(2, 3))
    before = module.PROGRAM_CACHE.misses
    generate(model, [[5] * 15], 33, SelfSpeculative(2, 3))
    assert module.PROGRAM_CACHE.misses == before


@pytest.mark.parametrize("strategy", [Autoregressive(), SelfSpeculative(2, 3)])
def test_the_loop_updates_its_cache_in_place(varied, varied_params, strategy):
    """The donated cache is aliased byte for byte, and temporaries are far below one more cache."""
    config = dataclasses.replace(varied, context_length=4096)
    batch = bare_batch(np.ones((2, 2048), np.int32), np.array([2048, 9], np.int32), 64)
    program = DecodeProgram(config, strategy, batch)
    program.compile(decoder_weights(varied_params, jnp.float32))
    memory = program._programs.decode.memory_analysis()
    cache_bytes = 2 * 4 * 2 * 2 * 2176 * 8 * 4  # k and v, layers, B, K, C, H, float32
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes
