"""The TPU's write kernel, simulated, changes exactly the entries that it should, at every position, without races."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_cache.tpu_write import _group_size, tile_entries, window_entries, write
from tests.helpers.interpreted import simulated_tpu

C = 96


def written(cache, new, positions):
    """Returns the cache after a write, made entry by entry."""
    expected = np.array(cache)
    for b, position in enumerate(positions):
        expected[b, :, position : position + new.shape[2]] = new[b]
    return expected


def bits(a) -> np.ndarray:
    return np.asarray(a).view(np.uint8)


def random(rng, shape, dtype):
    """Returns random numbers, some of them NaN or infinite where the type has these."""
    if dtype == "int8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    values = rng.normal(size=shape).astype(np.float32)
    values[rng.random(shape) < 0.02] = np.nan
    values[rng.random(shape) < 0.02] = -np.inf
    return np.asarray(jnp.asarray(values, dtype))


def run(cache, new, positions):
    with simulated_tpu():
        return np.asarray(jax.jit(lambda *arrays: write(*arrays))(cache, new, np.asarray(positions, np.int32)))


@pytest.mark.parametrize("tokens", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_residue_of_the_tile(dtype, tokens):
    """Each sequence has another position: all residues, the first entry and the last one."""
    positions = np.array([*range(3, 3 + tile_entries(dtype)), 0, C - tokens])
    rng = np.random.default_rng(tokens)
    cache = random(rng, (len(positions), 2, C, 128), dtype)
    new = random(rng, (len(positions), 2, tokens, 128), dtype)
    after = run(cache, new, positions)
    np.testing.assert_array_equal(bits(after), bits(written(cache, new, positions)))


@pytest.mark.parametrize(("heads", "width", "tokens"), [(1, 256, 1), (3, 128, 5), (8, 256, 16), (32, 128, 2)])
def test_heads_and_widths(heads, width, tokens):
    rng = np.random.default_rng(heads)
    positions = np.array([0, 31, C - tokens])
    cache = random(rng, (3, heads, C, width), "bfloat16")
    new = random(rng, (3, heads, tokens, width), "bfloat16")
    after = run(cache, new, positions)
    np.testing.assert_array_equal(bits(after), bits(written(cache, new, positions)))


@pytest.mark.parametrize("group", [1, 2, 3])
def test_sequences_in_groups(monkeypatch, group):
    """VMEM holds the windows of one, two or three out of six sequences at a time."""
    monkeypatch.setattr("pallas_kernels.kv_cache.tpu_write._GROUP_BYTES", group * 2 * 16 * 128 * 4)
    assert _group_size(6, 2 * window_entries(5, "float32") * 128 * 4) == group
    rng = np.random.default_rng(0)
    cache, new = random(rng, (6, 2, C, 128), "float32"), random(rng, (6, 2, 5, 128), "float32")
    positions = np.array([7, 0, 90, 33, 8, 64])
    np.testing.assert_array_equal(bits(run(cache, new, positions)), bits(written(cache, new, positions)))


def test_a_window_is_no_larger_than_it_must_be():
    """Counts the most tiles that T successive entries can touch."""
    for dtype, tile in (("float32", 8), ("bfloat16", 16), ("int8", 32)):
        for tokens in range(1, 17):
            touched = max(len({(start + t) // tile for t in range(tokens)}) for start in range(tile))
            assert window_entries(tokens, dtype) == touched * tile


def test_a_position_past_the_capacity_is_the_last_one():
    """Positions are clamped as in jax.lax.dynamic_update_slice, so nothing outside the cache is touched."""
    rng = np.random.default_rng(0)
    cache, new = random(rng, (2, 1, C, 128), "float32"), random(rng, (2, 1, 3, 128), "float32")
    after = run(cache, new, np.array([C + 5, -2]))
    np.testing.assert_array_equal(bits(after), bits(written(cache, new, [C - 3, 0])))
