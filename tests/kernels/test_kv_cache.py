"""The plain-JAX KV cache against numpy, entry by entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_cache.reference import LayerCache, attend, init_layer_cache, write
from tests.helpers.expected import softmax_over

B, K, C, H = 3, 2, 24, 8


def filled(seed=0):
    rng = np.random.default_rng(seed)
    return LayerCache(*(jnp.asarray(rng.normal(size=(B, K, C, H)), jnp.float32) for _ in range(2)))


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_write_changes_exactly_the_entries_it_should(tokens):
    old, rng = filled(), np.random.default_rng(1)
    k, v = (rng.normal(size=(B, tokens, K, H)).astype(np.float32) for _ in range(2))
    positions = np.array([0, 7, C - tokens], np.int32)
    new = jax.jit(write)(old, k, v, positions)
    for before, after, written in ((old.k, new.k, k), (old.v, new.v, v)):
        expected = np.array(before)
        for b in range(B):
            for t in range(tokens):
                expected[b, :, positions[b] + t] = written[b, t]
        np.testing.assert_array_equal(after, expected)


@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
@pytest.mark.parametrize("group", [1, 3])
def test_attend_is_softmax_over_what_each_query_sees(tokens, group):
    positions = np.array([0, 5, C - tokens], np.int32)
    # Entries past the last query of a sequence have no weight, however large they are.
    stale = np.arange(C)[None, None, :, None] >= (positions + tokens)[:, None, None, None]
    cache = jax.tree.map(lambda a: jnp.where(stale, 1e30, a), filled())
    q = np.random.default_rng(2).normal(size=(B, tokens, K, group, H)).astype(np.float32)
    mixed = jax.jit(attend)(q, cache, positions)
    assert mixed.shape == q.shape
    np.testing.assert_allclose(mixed, softmax_over(q, *cache, positions), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_a_token_that_overflowed_does_not_reach_those_before_it(poison):
    """A wrong draft may overflow. Tokens before it in the same pass get the result that they would get without it, and
    so does every later pass, once its entry is overwritten."""
    rng = np.random.default_rng(3)
    k, v = (rng.normal(size=(B, 3, K, H)).astype(np.float32) for _ in range(2))
    q = rng.normal(size=(B, 3, K, 2, H)).astype(np.float32)
    positions = np.array([0, 5, C - 3], np.int32)
    clean = attend(q, write(filled(), k, v, positions), positions)
    for a in (k, v):
        a[:, 1:] = poison
    cache = write(filled(), k, v, positions)
    for queries in (q, q[:, :1]):
        np.testing.assert_allclose(attend(queries, cache, positions)[:, 0], clean[:, 0], rtol=1e-4, atol=1e-6)


def test_bfloat16_scores_are_float32():
    """Weights of many equal keys would not add up to one if they were summed in bfloat16."""
    cache = init_layer_cache(1, 1, 1000, 8, jnp.bfloat16)
    cache = LayerCache(cache.k, jnp.ones_like(cache.v))
    mixed = attend(jnp.ones((1, 2, 1, 1, 8), jnp.bfloat16), cache, jnp.array([990]))
    assert mixed.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(mixed, np.float32), 1.0, rtol=1e-2)
