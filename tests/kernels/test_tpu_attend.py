"""The TPU's attention kernel, simulated, against numpy in float64. Entries past the end of a sequence are NaN."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as simulator

from pallas_kernels.kv_cache.tpu_attend import SPLIT, attend, attend_bytes, last_split
from tests.helpers.expected import softmax_over
from tests.helpers.interpreted import simulated_tpu

C = 2 * SPLIT + 64


def random(rng, *shape, dtype="float32"):
    return np.array(jnp.asarray(rng.normal(size=shape), dtype))


def filled(rng, heads, head_width, positions, tokens, capacity=C, dtype="float32"):
    """Returns a cache [B, K, C, 2H], NaN where nothing was written."""
    cache = random(rng, len(positions), heads, capacity, 2 * head_width, dtype=dtype)
    for b, position in enumerate(positions):
        cache[b, :, position + tokens :] = np.nan
    return cache


def run(q, cache, positions):
    with simulated_tpu():
        return np.asarray(jax.jit(lambda *arrays: attend(*arrays))(q, cache, np.asarray(positions, np.int32)))


def expected(q, cache, positions):
    return softmax_over(q, *np.split(np.asarray(cache, np.float64), 2, axis=3), positions)


# KV heads, queries per KV head, head width, tokens.
SHAPES = [(1, 1, 64, 1), (3, 3, 64, 2), (2, 4, 128, 5), (8, 1, 128, 8), (2, 8, 128, 16), (1, 2, 256, 1)]


@pytest.mark.parametrize(("heads", "group", "width", "tokens"), SHAPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_over_what_each_query_sees(dtype, heads, group, width, tokens):
    rng = np.random.default_rng(tokens)
    positions = [0, 77, SPLIT - tokens, SPLIT - 1, SPLIT, C - tokens]
    q = random(rng, len(positions), tokens, heads, group, width, dtype=dtype)
    cache = filled(rng, heads, width, positions, tokens, dtype=dtype)
    mixed = run(q, cache, positions)
    assert mixed.dtype == q.dtype
    tolerance = {"float32": 2e-6, "bfloat16": 1e-2}[dtype]
    np.testing.assert_allclose(
        np.asarray(mixed, np.float64), expected(q, cache, positions), atol=tolerance, rtol=tolerance
    )


def test_any_length():
    """Positions cover a tile of 32 around the end of a split."""
    rng = np.random.default_rng(0)
    positions = [*range(SPLIT - 20, SPLIT + 13)]
    q, cache = random(rng, len(positions), 3, 1, 2, 64), filled(rng, 1, 64, positions, 3)
    np.testing.assert_allclose(run(q, cache, positions), expected(q, cache, positions), atol=2e-6, rtol=2e-6)


def test_a_token_that_overflowed_does_not_reach_those_before_it():
    """Keys of a later token of the pass may be infinite; the values in a cache are always finite."""
    rng = np.random.default_rng(0)
    for width in (64, 128):
        q, cache = random(rng, 1, 3, 2, 2, width), filled(rng, 2, width, [300], 3)
        clean = run(q, cache, [300])
        cache[:, :, 301:303, :width] = np.inf
        np.testing.assert_array_equal(run(q, cache, [300])[:, 0], clean[:, 0])
        assert np.isfinite(clean).all()


def test_large_scores():
    """Only differences to the highest count when scores are thousands, also across splits."""
    rng = np.random.default_rng(0)
    positions = [SPLIT + 100]
    q, cache = 100 * random(rng, 1, 2, 1, 2, 64), filled(rng, 1, 64, positions, 2)
    np.testing.assert_allclose(run(q, cache, positions), expected(q, cache, positions), atol=1e-4, rtol=1e-4)


def test_a_result_depends_neither_on_the_batch_nor_on_the_capacity():
    """The results are equal to the bit."""
    rng = np.random.default_rng(0)
    positions = [5, 300, 511]
    q, cache = random(rng, 3, 2, 8, 2, 64), filled(rng, 8, 64, positions, 2)
    together = run(q, cache, positions)
    for b, position in enumerate(positions):
        longer = filled(rng, 8, 64, [position], 2, capacity=4 * SPLIT)
        longer[0, :, :C] = cache[b]
        alone = run(q[b : b + 1], longer, [position])
        np.testing.assert_array_equal(alone[0], together[b])


def test_the_number_of_heads_per_block_changes_nothing(monkeypatch):
    """Heads that are read together or one by one give the same bits."""
    rng = np.random.default_rng(0)
    positions = [300, 20]
    q, cache = random(rng, 2, 2, 4, 2, 64), filled(rng, 4, 64, positions, 2)
    together = run(q, cache, positions)
    for heads in (1, 2):
        monkeypatch.setattr("pallas_kernels.kv_cache.tpu_attend._BLOCK_BYTES", heads * SPLIT * 128 * 4)
        np.testing.assert_array_equal(run(q, cache, positions), together)


def test_blocks_past_the_end_are_not_read(monkeypatch):
    """Counts the simulated DMAs: as many blocks as the filled entries need, which is what attend_bytes says."""
    blocks, read = [], simulator.get

    def counted(*arguments, input_name=None, **others):
        if input_name == "cache":
            blocks.append(1)
        return read(*arguments, input_name=input_name, **others)

    monkeypatch.setattr(simulator, "get", counted)
    rng = np.random.default_rng(0)
    positions, tokens, capacity = [0, 3 * SPLIT - 2, 3 * SPLIT - 1, 7 * SPLIT], 2, 8 * SPLIT
    lengths = [position + tokens for position in positions]
    q, cache = random(rng, 4, tokens, 3, 1, 64), filled(rng, 3, 64, positions, tokens, capacity)
    run(q, cache, positions)
    assert len(blocks) == 1 + 3 + 4 + 8
    assert attend_bytes(cache.shape, lengths, "float32") == len(blocks) * SPLIT * 3 * 128 * 4
    assert [last_split(position, tokens) for position in positions] == [0, 2, 3, 7]
