"""Long prompts are read chunk by chunk against the cache, with the result of reading them at once."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lsjax
from lsjax.decoding import forward as forward_module
from lsjax.decoding.forward import decoder_weights, init_cache, prefill
from lsjax.decoding.model import Model
from lsjax.decoding.program_cache import PROGRAM_CACHE
from lsjax.model.transformer import forward
from tests.helpers.prompts import NoTokenizer

LENGTHS = (56, 3, 16, 17, 33, 47)
BUCKET = 56  # chunks of 16 do not divide it
DRAFTING = lsjax.SelfSpeculative(2, 3)


@pytest.fixture
def chunks(monkeypatch):
    """Sets the size of a chunk, and forgets programs compiled with another size before and after."""

    def set_chunk(size):
        monkeypatch.setattr(forward_module, "PREFILL_CHUNK", size)
        PROGRAM_CACHE.clear()

    yield set_chunk
    PROGRAM_CACHE.clear()


def test_rows_of_any_lengths_are_read_as_at_once(varied, varied_params, chunks):
    """Prompts end in the first, a middle and the last chunk, at its edge, beside it, and where two chunks overlap."""
    chunks(16)
    weights = decoder_weights(varied_params, jnp.float32)
    tokens = np.random.default_rng(0).integers(1, 320, (len(LENGTHS), BUCKET)).astype(np.int32)
    cache = init_cache(varied, len(LENGTHS), 64, jnp.float32)

    def read(*inputs):
        return jax.jit(functools.partial(prefill, config=varied, layers=range(4)))(*inputs)

    logits, read_by_chunks = read(weights, tokens, np.array(LENGTHS), cache)
    expected = jax.jit(lambda tokens: forward(varied_params, tokens, varied))(tokens)
    chunks(64)
    _, read_at_once = read(weights, tokens, np.array(LENGTHS), cache)
    for row, length in enumerate(LENGTHS):
        np.testing.assert_allclose(logits[row], expected[row, length - 1], rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(jax.tree.leaves(read_by_chunks), jax.tree.leaves(read_at_once), strict=True):
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
    """Chunked and unchunked prefill give equal tokens in float32; another length compiles nothing."""
    model = Model(dataclasses.replace(varied, context_length=2048), varied_params, NoTokenizer())
    prompts = [np.random.default_rng(1).integers(1, 320, size).tolist() for size in (1000, 70)]
    chunks(4096)
    read_at_once = lsjax.generate(model, prompts, 12, DRAFTING).tokens
    chunks(512)
    assert lsjax.generate(model, prompts, 12, DRAFTING).tokens == read_at_once
    assert len(set(read_at_once[0])) > 3
    before = PROGRAM_CACHE.misses
    lsjax.generate(model, [prompts[0][:600], prompts[1][:9]], 12, DRAFTING)
    assert PROGRAM_CACHE.misses == before


def test_memory_beside_the_cache_does_not_grow_with_the_square(varied, varied_params):
    """A prompt four times as long needs four times the attention scores of one chunk."""
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
