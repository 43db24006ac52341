"""An int8 KV cache, by plain JAX and by simulated or interpreted kernels.

What is stored is compared with the formula in numpy, to the bit. Attention is compared with a softmax in float64 over
the numbers that are stored.
"""

import collections
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.kv_cache import gpu_attend, gpu_write, reference, tpu_attend, tpu_write
from pallas_kernels.kv_cache.int8 import Int8, dequantize, quantize
from pallas_kernels.kv_cache.reference import LayerCache
from tests.helpers.expected import softmax_over
from tests.helpers.interpreted import simulated_gpu, simulated_tpu

SPLIT = tpu_attend.SPLIT
C = 2 * SPLIT + 128


def normal(rng, *shape, dtype="float32"):
    return np.array(jnp.asarray(rng.normal(size=shape), dtype))


def with_non_finite(rng, *shape, dtype="float32"):
    x = rng.normal(size=shape)
    x[0, 0], x[1, 0, :, 3], x[2, 0, :, 5] = 0, np.nan, -np.inf
    return np.array(jnp.asarray(x, dtype))


def rounded(x) -> Int8:
    """Returns the int8 values and scales of x by the formula, in float32."""
    x = np.asarray(x, np.float32)
    largest = np.maximum(np.abs(finite(x)).max(-1), np.float32(1e-30))
    ratio = finite(x) * (np.float32(127) / largest)[..., None]
    rounded, overflowed = np.trunc(ratio + np.copysign(np.float32(0.5), ratio)), ~np.isfinite(x).all(-1)
    values = np.where(overflowed[..., None], 0, rounded).astype(np.int8)
    return Int8(values, np.where(overflowed, np.float32(np.inf), largest * np.float32(1 / 127)))


def finite(x):
    return np.where(np.isfinite(x), x, np.zeros_like(x))


def held(rng, rows, heads, capacity, width) -> LayerCache:
    """Returns an int8 cache with random values and scales."""
    sides = []
    for _ in "kv":
        scale = rng.uniform(0.005, 0.03, (rows, heads, capacity)).astype(np.float32)
        values = rng.integers(-127, 128, (rows, heads, capacity, width)).astype(np.int8)
        sides.append(Int8(values, scale))
    return LayerCache(*sides)


def spoilt(cache: LayerCache, ends, scale=np.nan) -> LayerCache:
    """Returns the cache with `scale` in place of every scale past the end of its sequence."""
    past = np.arange(cache.k.scale.shape[2])[None, None] >= np.reshape(ends, (-1, 1, 1))
    return LayerCache(*(Int8(side.values, np.where(past, np.float32(scale), side.scale)) for side in cache))


def packed(cache: LayerCache) -> Int8:
    """Returns a cache in the layout of the TPU kernels."""
    (k, k_scale), (v, v_scale) = cache
    return Int8(np.concatenate([k, v], axis=3), np.stack([k_scale, v_scale], axis=2))


def written(cache: LayerCache, k, v, positions) -> LayerCache:
    """Returns the cache after a write, made entry by entry, with 0 for non-finite values."""
    cache, new = jax.tree.map(np.array, cache), (rounded(k), rounded(finite(v)))
    for b, t in np.ndindex(k.shape[:2]):
        for side, (values, scale) in zip(cache, new, strict=True):
            side.values[b, :, positions[b] + t], side.scale[b, :, positions[b] + t] = values[b, t], scale[b, t]
    return cache


def assert_same_bits(ours, theirs):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_rounding():
    """Rounding is to the nearest of 255 numbers, the largest exactly, at any magnitude. Zeros stay zeros."""
    x = normal(np.random.default_rng(0), 50, 3, 64) * np.logspace(-45, 30, 50)[:, None, None].astype(np.float32)
    x[40, 1] = 0
    ours = jax.jit(quantize)(x)
    assert_same_bits(ours, rounded(x))
    assert (ours.values.dtype, ours.scale.dtype) == (jnp.int8, jnp.float32)
    back = np.asarray(dequantize(ours, jnp.float32))
    assert np.all(np.abs(back - x) <= 0.5001 * np.asarray(ours.scale)[..., None])
    assert not back[40, 1].any()
    largest = np.abs(x).max(-1) > 1e-29
    assert largest.sum() > 100
    np.testing.assert_allclose(np.abs(back).max(-1)[largest], np.abs(x).max(-1)[largest], rtol=1e-6)


def write(platform, cache: LayerCache, k, v, positions):
    """Writes with the platform's kernel, and returns the cache in the platform's layout."""
    positions = np.asarray(positions, np.int32)
    if platform == "plain":
        return jax.jit(reference.write)(cache, k, v, positions)
    if platform == "gpu":
        with simulated_gpu():
            return jax.block_until_ready(jax.jit(lambda *arrays: gpu_write.write(*arrays))(*cache, k, v, positions))
    new = packed(LayerCache(*(rounded(a.swapaxes(1, 2)) for a in (k, finite(v)))))
    with simulated_tpu():
        return jax.block_until_ready(jax.jit(lambda *arrays: tpu_write.write(*arrays))(packed(cache), new, positions))


@pytest.mark.parametrize(
    ("platform", "dtype", "heads", "width", "tokens"),
    [
        ("plain", "float32", 3, 24, 5),
        ("plain", "bfloat16", 1, 64, 20),
        ("gpu", "float32", 1, 32, 1),
        ("gpu", "bfloat16", 3, 64, 5),
        ("gpu", "bfloat16", 2, 128, 16),
        ("tpu", "float32", 1, 64, 2),
        ("tpu", "bfloat16", 8, 128, 5),
        ("tpu", "bfloat16", 3, 128, 16),
    ],
)
def test_new_entries_are_rounded_and_all_others_keep_their_bits(platform, dtype, heads, width, tokens):
    rng, capacity = np.random.default_rng(tokens), 256
    positions = [0, 31, 127, 63 - tokens, 128 - tokens, capacity - tokens]
    cache = spoilt(held(rng, len(positions), heads, capacity, width), [100] * len(positions))
    k, v = (with_non_finite(rng, len(positions), tokens, heads, width, dtype=dtype) for _ in "kv")
    expected = written(cache, k, v, positions)
    assert not np.isfinite(expected.k.scale[1:3, :, [31, 127]]).any(axis=1).all()
    assert np.isfinite(expected.v.scale[1:3, :, :100]).all()
    after = write(platform, cache, k, v, positions)
    assert_same_bits(after, packed(expected) if platform == "tpu" else expected)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [1, 5, 16])
def test_every_residue_of_the_tiles_of_a_tpu(tokens):
    """Positions cover a tile of 32 entries, and both ends of a tile of 128 scales."""
    rng, capacity = np.random.default_rng(tokens), 384
    positions = [*range(33), *range(128 - tokens - 1, 130), *range(250, 256), capacity - tokens]
    cache = spoilt(held(rng, len(positions), 1, capacity, 64), [200] * len(positions))
    k, v = (normal(rng, len(positions), tokens, 1, 64) for _ in "kv")
    assert_same_bits(write("tpu", cache, k, v, positions), packed(written(cache, k, v, positions)))


def test_windows_of_a_tpu_begin_at_tiles(monkeypatch):
    """The simulation does not check this, and the compiler takes it on trust."""
    starts = collections.defaultdict(set)

    def checked(start, tile):
        jax.debug.callback(lambda start: starts[tile].add(int(start)), start)
        return start

    monkeypatch.setattr(tpu_write.pl, "multiple_of", checked)
    rng = np.random.default_rng(0)
    cache, (k, v) = held(rng, 5, 1, 384, 64), (normal(rng, 5, 1, 1, 64) for _ in "kv")
    write("tpu", cache, k, v, [0, 40, 130, 300, 383])
    jax.effects_barrier()
    assert starts == {32: {0, 32, 128, 288, 352}, 128: {0, 128, 256}}


@pytest.mark.parametrize("platform", ["plain", "gpu", "tpu"])
def test_a_position_past_the_capacity_is_the_last_one(platform):
    rng = np.random.default_rng(0)
    cache, (k, v) = held(rng, 2, 1, 256, 64), (normal(rng, 2, 3, 1, 64) for _ in "kv")
    expected = written(cache, k, v, [253, 0])
    after = write(platform, cache, k, v, [261, -2])
    if platform == "plain":  # where a negative position counts from the end
        after, expected = (jax.tree.map(lambda a: a[:1], cache) for cache in (after, expected))
    assert_same_bits(after, packed(expected) if platform == "tpu" else expected)


def test_a_tpu_writes_sequences_in_groups(monkeypatch):
    """VMEM holds the windows (numbers and scales) of two out of six sequences at a time."""
    window = 32 * 128 + 2 * 128 * 4
    monkeypatch.setattr("pallas_kernels.kv_cache.tpu_write._GROUP_BYTES", 2 * window)
    assert [tpu_write._group_size(6, window + more) for more in (0, 1)] == [2, 1]
    rng, positions = np.random.default_rng(0), [7, 0, 90, 33, 8, 64]
    cache, (k, v) = held(rng, 6, 1, 256, 64), (normal(rng, 6, 1, 1, 64) for _ in "kv")
    assert_same_bits(write("tpu", cache, k, v, positions), packed(written(cache, k, v, positions)))


def attend(platform, q, cache: LayerCache, positions):
    positions = np.asarray(positions, np.int32)
    if platform == "plain":
        return np.asarray(jax.jit(reference.attend)(q, cache, positions))
    if platform == "gpu":
        with simulated_gpu():
            return np.asarray(jax.jit(lambda *arrays: gpu_attend.attend(*arrays))(q, *cache, positions))
    with simulated_tpu():
        return np.asarray(jax.jit(lambda *arrays: tpu_attend.attend(*arrays))(q, packed(cache), positions))


def expected(q, cache: LayerCache, positions):
    """Returns attention over the numbers that the stored values and scales represent."""
    return softmax_over(q, *(a.values * a.scale[..., None].astype(np.float64) for a in cache), positions)


@pytest.mark.parametrize(
    ("platform", "dtype", "heads", "group", "width", "tokens"),
    [
        ("plain", "float32", 3, 2, 24, 5),
        ("plain", "bfloat16", 1, 1, 64, 1),
        ("gpu", "float32", 1, 7, 32, 3),
        ("gpu", "float32", 1, 8, 128, 16),
        ("gpu", "bfloat16", 2, 4, 64, 5),
        ("tpu", "float32", 1, 1, 64, 1),
        ("tpu", "float32", 3, 4, 64, 5),
        ("tpu", "float32", 2, 2, 128, 16),
        ("tpu", "bfloat16", 8, 1, 128, 2),
    ],
)
def test_softmax_over_what_each_query_sees(platform, dtype, heads, group, width, tokens):
    """Scales past the end are NaN, or huge for plain JAX, whose caches always hold finite values."""
    rng = np.random.default_rng(tokens)
    positions = [0, 77, SPLIT - tokens, SPLIT - 1, SPLIT, C - tokens]
    q = normal(rng, len(positions), tokens, heads, group, width, dtype=dtype)
    cache = held(rng, len(positions), heads, C, width)
    cache = spoilt(cache, np.array(positions) + tokens, 1e30 if platform == "plain" else np.nan)
    mixed = attend(platform, q, cache, positions)
    assert mixed.dtype == q.dtype
    tolerance = {"float32": 3e-6, "bfloat16": 1e-2}[dtype]
    wanted = expected(q, cache, positions)
    assert np.abs(wanted).mean() > 0.1
    np.testing.assert_allclose(np.asarray(mixed, np.float64), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("platform", ["plain", "gpu", "tpu"])
def test_a_token_that_overflowed_does_not_reach_those_before_it(platform):
    rng = np.random.default_rng(0)
    q, cache = normal(rng, 1, 3, 2, 2, 64), held(rng, 1, 2, C, 64)
    clean = attend(platform, q, cache, [300])
    cache.k.values[:, :, 301:303], cache.k.scale[:, :, 301:303] = 0, np.inf
    mixed = attend(platform, q, cache, [300])
    np.testing.assert_array_equal(mixed[:, 0], clean[:, 0])
    assert np.isfinite(clean).all()
    assert np.isnan(mixed[:, 1:]).all()


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_a_result_depends_neither_on_the_batch_nor_on_the_capacity(platform):
    """The results are equal to the bit."""
    rng, positions = np.random.default_rng(0), [300, 511]
    q, cache = normal(rng, 2, 2, 2, 2, 64), held(rng, 2, 2, C, 64)
    together = attend(platform, q, cache, positions)
    for b, position in enumerate(positions):
        longer = spoilt(held(rng, 1, 2, 4 * SPLIT, 64), [position + 2])
        for whole, part in zip(jax.tree.leaves(longer), jax.tree.leaves(cache), strict=True):
            whole[0, :, : position + 2] = part[b, :, : position + 2]
        np.testing.assert_array_equal(attend(platform, q[b : b + 1], longer, [position])[0], together[b])


def test_a_gpu_reads_the_scales_of_filled_entries_alone(monkeypatch):
    loaded, triton = collections.Counter(), gpu_attend.triton

    def load(ref, *, mask, other):
        kind, numbers = (ref.dtype.name, ref.ndim), jnp.sum(jnp.broadcast_to(mask, ref.shape))
        jax.debug.callback(lambda numbers: loaded.update({kind: int(numbers)}), numbers)
        return triton.load(ref, mask=mask, other=other)

    watched = types.SimpleNamespace(load=load, store=triton.store, dot=triton.dot)
    monkeypatch.setattr(gpu_attend, "triton", watched)
    positions, tokens, heads, width = [0, SPLIT + 5], 2, 3, 64
    rng = np.random.default_rng(0)
    q = normal(rng, 2, tokens, heads, 1, width, dtype="bfloat16")
    attend("gpu", q, held(rng, 2, heads, C, width), positions)
    jax.effects_barrier()
    entries = 2 * heads * sum(position + tokens for position in positions)
    splits_and_queries = 2 * 3 * heads * tokens  # the maxima and sums that are combined have one axis as well
    assert loaded["int8", 2] == entries * width
    assert loaded["float32", 1] == entries + splits_and_queries
