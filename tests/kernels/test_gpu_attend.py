"""The GPU's attention kernel, interpreted, against numpy in float64. Entries past the end of a sequence are NaN."""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_cache import gpu_attend
from pallas_kernels.kv_cache.gpu_attend import SPLIT, attend, padded_queries, partial_bytes
from tests.helpers.expected import softmax_over
from tests.helpers.interpreted import simulated_gpu

C = 2 * SPLIT + 40  # the last block is not a whole one


def random(rng, *shape, dtype="float32"):
    return np.array(jnp.asarray(rng.normal(size=shape), dtype))


def filled(rng, heads, head_width, positions, tokens, capacity=C, dtype="float32"):
    """Returns keys and values [B, K, C, H], NaN where nothing was written."""
    caches = [random(rng, len(positions), heads, capacity, head_width, dtype=dtype) for _ in "kv"]
    for cache in caches:
        for b, position in enumerate(positions):
            cache[b, :, position + tokens :] = np.nan
    return caches


def run(q, k, v, positions):
    with simulated_gpu():
        return np.asarray(jax.jit(lambda *arrays: attend(*arrays))(q, k, v, np.asarray(positions, np.int32)))


# Number type, KV heads, queries per KV head, head width, tokens.
SHAPES = [
    ("float32", 1, 1, 64, 1),
    ("float32", 3, 3, 64, 2),
    ("float32", 1, 7, 32, 3),
    ("float32", 1, 8, 128, 16),
    ("bfloat16", 2, 4, 128, 5),
    ("bfloat16", 1, 1, 64, 8),
]


@pytest.mark.parametrize(("dtype", "heads", "group", "width", "tokens"), SHAPES)
def test_softmax_over_what_each_query_sees(dtype, heads, group, width, tokens):
    rng = np.random.default_rng(tokens)
    positions = [0, 77, SPLIT - tokens, SPLIT - 1, C - tokens]
    q = random(rng, len(positions), tokens, heads, group, width, dtype=dtype)
    cache = filled(rng, heads, width, positions, tokens, dtype=dtype)
    mixed = run(q, *cache, positions)
    assert mixed.dtype == q.dtype
    tolerance = {"float32": 2e-6, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(
        np.asarray(mixed, np.float64), softmax_over(q, *cache, positions), atol=tolerance, rtol=tolerance
    )


def test_any_length():
    """Positions cover a block of 64 around the end of a split."""
    rng = np.random.default_rng(0)
    positions = [*range(SPLIT - 34, SPLIT + 30)]
    q, cache = random(rng, len(positions), 3, 1, 2, 64), filled(rng, 1, 64, positions, 3, capacity=SPLIT + 40)
    np.testing.assert_allclose(run(q, *cache, positions), softmax_over(q, *cache, positions), atol=2e-6, rtol=2e-6)


def test_a_token_that_overflowed_does_not_reach_those_before_it():
    """Keys of a later token of the pass may be NaN or infinite; the values in a cache are always finite."""
    rng = np.random.default_rng(0)
    q, (k, v) = random(rng, 1, 3, 2, 2, 64), filled(rng, 2, 64, [300], 3)
    clean = run(q, k, v, [300])
    k[:, :, 301], k[:, :, 302] = np.inf, np.nan
    np.testing.assert_array_equal(run(q, k, v, [300])[:, 0], clean[:, 0])
    assert np.isfinite(clean).all()


def test_large_scores():
    """Only differences to the highest count when scores are thousands, also between splits."""
    rng = np.random.default_rng(0)
    positions = [SPLIT + 100]
    q, cache = 100 * random(rng, 1, 2, 1, 2, 64), filled(rng, 1, 64, positions, 2)
    np.testing.assert_allclose(run(q, *cache, positions), softmax_over(q, *cache, positions), atol=1e-4, rtol=1e-4)


def test_a_result_depends_neither_on_the_batch_nor_on_the_capacity():
    """The results are equal to the bit."""
    rng = np.random.default_rng(0)
    positions = [5, 300, 511]
    q, cache = random(rng, 3, 2, 3, 2, 64), filled(rng, 3, 64, positions, 2)
    together = run(q, *cache, positions)
    for b, position in list(enumerate(positions))[1:]:
        longer = filled(rng, 3, 64, [position], 2, capacity=4 * SPLIT)
        for whole, part in zip(longer, cache, strict=True):
            whole[0, :, :C] = part[b]
        np.testing.assert_array_equal(run(q[b : b + 1], *longer, [position])[0], together[b])


def test_only_filled_entries_are_read_and_nothing_else_is_touched(monkeypatch):
    """Counts the numbers that are loaded and stored.

    The filled entries of the cache are read once per KV head. The partial results are written and read once, only for
    splits that hold something, as partial_bytes says. Nothing is loaded or stored for queries that are padding.
    """
    touched, triton = collections.Counter(), gpu_attend.triton

    def count(what, ref, mask):
        kind = what, ref.shape[0] if ref.ndim < 3 else "queries"
        numbers = jnp.sum(jnp.broadcast_to(mask, ref.shape))
        jax.debug.callback(lambda numbers: touched.update({kind: int(numbers)}), numbers)

    def load(ref, *, mask, other):
        count("loaded", ref, mask)
        return triton.load(ref, mask=mask, other=other)

    def store(ref, value, *, mask):
        count("stored", ref, mask)
        triton.store(ref, value, mask=mask)

    watched = types.SimpleNamespace(load=load, store=store, dot=triton.dot)
    monkeypatch.setattr(gpu_attend, "triton", watched)
    rng = np.random.default_rng(0)
    heads, tokens, group, width, block, rows, tile_heads = 2, 3, 3, 64, 64, 16, 4
    positions, splits = [0, 3 * SPLIT - 3, 3 * SPLIT - 2, 4 * SPLIT - 9], 1 + 3 + 4 + 4
    q = random(rng, 4, tokens, heads, group, width)
    run(q, *filled(rng, heads, width, positions, tokens, 4 * SPLIT + 3), positions)
    jax.effects_barrier()
    partials = heads * splits * tokens * group * (width + 2)
    assert touched == {
        ("loaded", "queries"): heads * splits * tokens * group * width,
        ("loaded", block): 2 * heads * sum(position + tokens for position in positions) * width,
        ("stored", rows): partials,
        ("loaded", tile_heads): partials,
        ("stored", tile_heads): q.size,
    }
    there_and_back = sum(partial_bytes(position + tokens, tokens, group, width) for position in positions)
    assert heads * there_and_back == 2 * 4 * partials


def test_float32_is_not_rounded_in_the_matrix_units():
    shapes = [(1, 2, 1, 2, 64), (1, 1, SPLIT, 64), (1, 1, SPLIT, 64)]
    for dtype, exact in (("float32", 2), ("bfloat16", 0)):
        arrays = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
        program = str(jax.make_jaxpr(attend)(*arrays, jax.ShapeDtypeStruct((1,), "int32")))
        assert program.count("dot_general") == 2
        assert program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == exact


def test_padded_queries():
    """Both are powers of two, and a matmul has at least 16 rows."""
    assert padded_queries(1, 1) == (16, 1)
    assert padded_queries(5, 4) == (8, 4)
    assert padded_queries(2, 3) == (4, 4)
    assert padded_queries(16, 8) == (16, 8)
