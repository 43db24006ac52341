"""Drafts copied from the text: they are those of a search by hand, and they change nothing but speed."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.config import ModelConfig
from lsjax.decoding.forward import decoder_weights
from lsjax.decoding.model import Model
from lsjax.decoding.program import DecodeProgram
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.decoding.prompt_lookup import look_up
from lsjax.decoding.sampling import Greedy, Sampled
from lsjax.decoding.strategies import Sampling, SelfSpeculative
from lsjax.errors import UserError
from tests.conftest import random_params
from tests.helpers.prompts import NoTokenizer, bare_batch


class Settled(NoTokenizer):
    decode_settled = NoTokenizer.decode


CONFIG = ModelConfig(4, 16, 2, 1, 8, 24, 12, 128, tie_embeddings=False)
NEW = 40
PROMPTS = [[1, 2, 3, 4, 1, 2], [7] * 17, [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7], [11]]


def searched(text: list[int], count: int) -> list[int] | None:
    """Searches by the definition, place by place."""
    for length in (3, 2):
        for start in reversed(range(len(text) - length)):
            if text[start : start + length] == text[-length:]:
                longer = list(text)
                for place in range(start + length, start + length + count):
                    longer.append(longer[place])
                return longer[len(text) :]
    return None


def test_copies_are_those_of_a_search():
    rng = np.random.default_rng(0)
    text, ends = rng.integers(0, 4, (500, 24)), rng.integers(1, 25, 500)
    drafts, found = jax.jit(look_up, static_argnums=2)(jnp.asarray(text), jnp.asarray(ends), 6)
    expected = [searched(row[:end].tolist(), 6) for row, end in zip(text, ends, strict=True)]
    assert found.tolist() == [copies is not None for copies in expected]
    assert 50 < sum(found) < 450
    for copies, row in zip(expected, drafts, strict=True):
        assert copies is None or row.tolist() == copies


@pytest.fixture(scope="module")
def model():
    """Returns a model whose texts repeat themselves for a while: copies are kept, rejected, and sometimes absent."""
    params = random_params(CONFIG, seed=5)
    return Model(CONFIG, params | {"lm_head": 4 * params["lm_head"]}, Settled())


@pytest.fixture(scope="module")
def plain(model):
    return lsjax.generate(model, PROMPTS, NEW).tokens


@pytest.mark.parametrize(("exit_layer", "drafts", "lookup"), [(1, 0, 4), (2, 2, 5), (3, 5, 2), (4, 3, 7)])
def test_greedy_tokens_are_those_without_drafts(model, plain, exit_layer, drafts, lookup):
    """Prompts of several lengths decode together, some with a match and some without in the same round."""
    assert lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(exit_layer, drafts, lookup=lookup)).tokens == plain


def replayed(prompt, tokens, lookup):
    """Replays rounds by the definition, without early-layer drafts: (rounds, counted and accepted by position)."""
    emitted, rounds, drafted, accepted = 1, 0, [0] * lookup, [0] * lookup
    while emitted < len(tokens):
        copies = searched([*prompt, *tokens[:emitted]], lookup) or []
        ahead = tokens[emitted : emitted + len(copies)]
        agreed = next((i for i in range(len(ahead)) if copies[i] != ahead[i]), len(ahead))
        cut = emitted + agreed >= len(tokens)
        for i in range(len(copies)):
            drafted[i] += not cut or i < agreed
            accepted[i] += i < agreed
        rounds, emitted = rounds + 1, emitted + agreed + 1
    return rounds, drafted, accepted


def test_copies_are_counted_where_they_stood(model, plain):
    lookup = 4
    stats = lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(1, 0, lookup=lookup)).stats
    for prompt, tokens, row in zip(PROMPTS, plain, stats, strict=True):
        rounds, drafted, accepted = replayed(prompt, tokens, lookup)
        assert (row["rounds"], row["drafted"], row["accepted"]) == (rounds, sum(drafted), sum(accepted))
        assert (row["drafted_by_position"], row["accepted_by_position"]) == (drafted, accepted)
    assert sum(row["rounds"] for row in stats) * lookup > sum(row["drafted"] for row in stats)  # rounds without a match
    assert 0 < sum(row["accepted"] for row in stats) < sum(row["drafted"] for row in stats)


def test_a_stop_token_ends_its_row_wherever_it_stands(model, plain):
    for stop in sorted({token for row in plain for token in row}):
        ended = lsjax.generate(model, PROMPTS, NEW, SelfSpeculative(2, 2, lookup=5), stop_tokens=[stop]).tokens
        assert ended == [row[: row.index(stop) + 1] if stop in row else row for row in plain]


@pytest.mark.parametrize("new", [1, 2, 6, 7])
def test_the_limit_is_exact(model, plain, new):
    tokens = lsjax.generate(model, PROMPTS, new, SelfSpeculative(2, 2, lookup=5)).tokens
    assert tokens == [row[:new] for row in plain]


@pytest.mark.slow
def test_a_rows_draws_do_not_depend_on_its_batch(model):
    """The draws stay the same although the batch decides whether a round copies at all."""
    how = {
        "max_new_tokens": 24,
        "strategy": SelfSpeculative(2, 2, lookup=5),
        "sampling": Sampling(0.8, top_k=5),
        "seed": 7,
    }
    together = lsjax.generate(model, PROMPTS, **how).tokens
    for row in (0, 3):
        assert lsjax.generate(model, [PROMPTS[row]], **how).tokens == [together[row]]


def test_pieces_of_a_stream_are_those_of_generate(model, plain):
    pieces = list(lsjax.stream(model, PROMPTS, NEW, SelfSpeculative(2, 2, lookup=5)))
    assert [[t for piece in pieces if piece.row == row for t in piece.tokens] for row in range(4)] == plain


def test_drafts_past_a_rows_count_are_not_judged():
    """Whatever stands past the count, the next token is the verifier's own, drawn from p itself as after a last
    draft.
    """
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 12)), jnp.float32)
    best = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    _, accepted = Greedy().verify(best[:, :3], None, logits, jnp.zeros(2, jnp.int32), jnp.array([1, 3]))
    assert accepted.tolist() == [1, 3]
    keys = jax.random.key_data(jax.random.split(jax.random.key(0), 2))
    sampler, index = Sampled(keys, jnp.float32(1.0)), jnp.zeros(2, jnp.int32)
    sure = jnp.where(best[:, :3, None] == jnp.arange(12), 0.0, -jnp.inf)
    short, counted = sampler.verify(best[:, :1], sure[:, :1], logits[:, :2], index)
    block, accepted = sampler.verify(best[:, :3], sure, logits, index, jnp.array([1, 1]))
    assert accepted.tolist() == counted.tolist()
    assert [row[: n + 1] for row, n in zip(block.tolist(), accepted, strict=True)] == [
        row[: n + 1] for row, n in zip(short.tolist(), counted, strict=True)
    ]


def test_other_prompts_do_not_recompile_and_the_cache_stays_in_place(model):
    strategy = SelfSpeculative(2, 2, lookup=5)
    lsjax.generate(model, [[1, 2, 3]], 20, strategy)
    before = PROGRAM_CACHE.misses
    lsjax.generate(model, [[5] * 15], 33, strategy)
    assert PROGRAM_CACHE.misses == before
    config = dataclasses.replace(CONFIG, context_length=4096)
    batch = bare_batch(np.ones((2, 2048), np.int32), np.array([2048, 9], np.int32), 64)
    program = DecodeProgram(config, strategy, batch)
    program.compile(decoder_weights(model.params, jnp.float32))
    memory = program._programs.decode.memory_analysis()
    cache_bytes = 2 * 4 * 2 * 1 * 2176 * 8 * 4  # k and v, layers, B, K, C, H, float32
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.temp_size_in_bytes < cache_bytes


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (SelfSpeculative(1, 2, lookup=-1), r"lookup must be a number in 0\.\.64, got -1"),
        (SelfSpeculative(1, 2, lookup="auto"), r"lookup must be a number in 0\.\.64, got 'auto'"),
        (SelfSpeculative(1, 0), r"num_speculations 0 is out of range 1\.\.64"),
        (SelfSpeculative("auto", 2, lookup=4), '"auto" does not measure lookup'),
    ],
)
def test_a_setting_out_of_range_is_named(model, strategy, message):
    with pytest.raises(UserError, match=message):
        lsjax.generate(model, PROMPTS, 4, strategy)
