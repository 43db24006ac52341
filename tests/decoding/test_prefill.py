"""Long prompts, read chunk by chunk against the cache: what reading them at once gives."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.decoding import passes
from lsjax.decoding.generate import _compiled
from lsjax.decoding.passes import decoder_weights, init_cache, prefill
from lsjax.loading import Model
from lsjax.model.transformer import forward
from tests.decoding.test_loops import NoTokenizer

LENGTHS = (56, 3, 16, 17, 33, 47)
BUCKET = 56  # chunks of 16 do not divide it
DRAFTING = lsjax.SelfSpeculative(2, 3)


@pytest.fixture
def chunks(monkeypatch):
    """Sets the size of a chunk; programs compiled with another are forgotten, before and after."""

    def set_chunk(size):
        monkeypatch.setattr(passes, "PREFILL_CHUNK", size)
        _compiled.cache_clear()

    yield set_chunk
    _compiled.cache_clear()


def test_rows_of_any_lengths_are_read_as_at_once(varied, varied_params, chunks):
    """Rows that end in the first, in a middle or in the last chunk, at its edge, beside it, or where two overlap."""
    chunks(16)
    weights = decoder_weights(varied_params, jnp.float32)
    tokens = np.random.default_rng(0).integers(1, 320, (len(LENGTHS), BUCKET)).astype(np.int32)
    cache = init_cache(varied, len(LENGTHS), 64, jnp.float32)
    read = lambda *inputs: jax.jit(functools.partial(prefill, config=varied, layers=range(4)))(*inputs)  # noqa: E731
    logits, read_by_chunks = read(weights, tokens, np.array(LENGTHS), cache)
    expected = jax.jit(lambda tokens: forward(varied_params, tokens, varied))(tokens)
    chunks(64)
    _, at_once = read(weights, tokens, np.array(LENGTHS), cache)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row], expected[row, length - 1], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(jax.tree.leaves(read_by_chunks), jax.tree.leaves(at_once), strict=True):
            np.testing.assert_allclose(ours[row, :, :length], theirs[row, :, :length], rtol=1e-4, atol=1e-4)


def test_chunks_past_the_longest_prompt_are_left_out(varied, varied_params, chunks):
    chunks(16)
    weights, tokens = decoder_weights(varied_params, jnp.float32), np.ones((2, 128), np.int32)
    empty = init_cache(varied, 2, 128, jnp.float32)
    read = jax.jit(functools.partial(prefill, config=varied, layers=range(4)))
    _, cache = read(weights, tokens, np.array([20, 5]), empty)
    for leaf in jax.tree.leaves(cache):
        assert np.any(leaf[:, :, 16:32])
        assert not np.any(leaf[:, :, 32:])


def test_a_prompt_of_a_thousand_tokens(varied, varied_params, chunks):
    """Tokens of chunked and of unchunked prefill, in float32; then another length, and nothing compiles."""
    model = Model(dataclasses.replace(varied, context_length=2048), varied_params, NoTokenizer())
    prompts = [np.random.default_rng(1).integers(1, 320, size).tolist() for size in (1000, 70)]
    chunks(4096)
    at_once = lsjax.generate(model, prompts, 12, DRAFTING).tokens
    chunks(512)
    assert lsjax.generate(model, prompts, 12, DRAFTING).tokens == at_once
    assert len(set(at_once[0])) > 3
    before = _compiled.cache_info().misses
    lsjax.generate(model, [prompts[0][:600], prompts[1][:9]], 12, DRAFTING)
    assert _compiled.cache_info().misses == before


def test_memory_beside_the_cache_does_not_grow_with_the_square(varied, varied_params):
    """Four times the prompt: four times the scores of a chunk."""
    weights = decoder_weights(varied_params, jnp.float32)

    def temporaries(length):
        cache = init_cache(varied, 1, length, jnp.float32)
        read = jax.jit(functools.partial(prefill, config=varied, layers=range(4)), donate_argnums=3)
        compiled = read.lower(weights, np.ones((1, length), np.int32), np.array([length]), cache).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    scores = 4 * 4 * 512 * 4096  # float32, heads, queries of a chunk, entries
    large = temporaries(4096)
    assert large < 4.5 * temporaries(1024)
    assert large < 3 * scores
