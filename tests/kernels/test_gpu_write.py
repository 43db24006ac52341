"""The GPU's write kernel, interpreted, changes exactly the entries that it should, to the bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_cache.gpu_write import write
from tests.helpers.interpreted import simulated_gpu

C = 72


def random(rng, *shape, dtype):
    """Returns random numbers, some of them NaN or infinite."""
    values = rng.normal(size=shape).astype(np.float32)
    values[rng.random(shape) < 0.02] = np.nan
    values[rng.random(shape) < 0.02] = -np.inf
    return np.asarray(jnp.asarray(values, dtype))


def written(cache, new, positions, keep=lambda values: values):
    """Returns the cache after a write, made entry by entry."""
    expected = np.array(cache)
    for b, position in enumerate(positions):
        for t in range(new.shape[1]):
            expected[b, :, position + t] = keep(new[b, t])
    return expected


def run(*arrays):
    *arrays, positions = arrays
    with simulated_gpu():
        return jax.jit(lambda *a: write(*a))(*arrays, np.asarray(positions, np.int32))


def bits(a) -> np.ndarray:
    return np.asarray(a).view(np.uint8)


@pytest.mark.parametrize(
    ("dtype", "tokens", "heads", "width"),
    [("float32", 1, 1, 64), ("float32", 5, 3, 128), ("bfloat16", 16, 2, 128), ("bfloat16", 3, 32, 64)],
)
def test_entries_of_every_sequence_at_its_position(dtype, tokens, heads, width):
    """Keys are stored unchanged, non-finite values as 0. All other entries keep their bits, even NaN."""
    rng = np.random.default_rng(tokens)
    positions = [0, 31, 32, 63 - tokens, C - tokens]
    k, v = (random(rng, len(positions), heads, C, width, dtype=dtype) for _ in "kv")
    new_k, new_v = (random(rng, len(positions), tokens, heads, width, dtype=dtype) for _ in "kv")
    after_k, after_v = run(k, v, new_k, new_v, positions)
    np.testing.assert_array_equal(bits(after_k), bits(written(k, new_k, positions)))

    def finite(values):
        return np.where(np.isfinite(values.astype(np.float32)), values, np.zeros_like(values))

    np.testing.assert_array_equal(bits(after_v), bits(written(v, new_v, positions, finite)))


def test_new_tokens_of_another_type():
    rng = np.random.default_rng(0)
    k, v = (np.asarray(jnp.asarray(rng.normal(size=(2, 2, C, 64)), "bfloat16")) for _ in "kv")
    new_k, new_v = (rng.normal(size=(2, 3, 2, 64)).astype(np.float32) for _ in "kv")
    after = run(k, v, new_k, new_v, [4, 40])
    for old, new, now in ((k, new_k, after[0]), (v, new_v, after[1])):
        np.testing.assert_array_equal(bits(now), bits(written(old, new.astype(old.dtype), [4, 40])))


def test_a_position_past_the_capacity_is_the_last_one():
    """Positions are clamped as in jax.lax.dynamic_update_slice, so nothing outside the cache is touched."""
    rng = np.random.default_rng(0)
    k, v = (rng.normal(size=(2, 1, C, 64)).astype(np.float32) for _ in "kv")
    new_k, new_v = (rng.normal(size=(2, 3, 1, 64)).astype(np.float32) for _ in "kv")
    after_k, after_v = run(k, v, new_k, new_v, [C + 5, -2])
    np.testing.assert_array_equal(after_k, written(k, new_k, [C - 3, 0]))
    np.testing.assert_array_equal(after_v, written(v, new_v, [C - 3, 0]))
