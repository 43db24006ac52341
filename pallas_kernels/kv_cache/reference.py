"""The plain-JAX KV cache of one layer, which every kernel must match.

Its shape is static: [B, K, C, H] for keys and for values. The caller keeps the length of each sequence, so dropping
rejected tokens means lowering that length. Entries at or past it get no weight, and the next write overwrites them.

The cache must hold finite numbers everywhere: an entry without weight still enters the sum as 0 * value, and 0 * NaN
is NaN. `write` ensures it by storing non-finite values as 0, which costs as little as the new tokens. Masking the
values in `attend` instead makes XLA:GPU and XLA:CPU copy the whole cache for every block of queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache.int8 import SCALE_BYTES, CacheArray, Int8, dequantize, is_int8, quantize

PLAIN = "plain"
# Finite, so that 0 * score stays a number.
_MASKED = -1e30


class LayerCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, each [B, K, C, H]; with scales [B, K, C] when the cache is int8."""

    k: CacheArray
    v: CacheArray


class CacheUse(NamedTuple):
    """The sizes of one layer's cache and of the passes over it, by which kernels are chosen.

    batch_size, num_kv_heads, head_width, capacity: B, K, H and C. mean_length: filled entries per sequence, on average.
    tokens: the most tokens per sequence in one pass. dtype: number type of the cache. group: query heads per KV head.
    devices: devices that hold the cache. shards: parts that its KV heads are split into over these devices.
    """

    batch_size: int
    num_kv_heads: int
    head_width: int
    capacity: int
    mean_length: int
    tokens: int
    dtype: jax.typing.DTypeLike
    devices: int = 1
    group: int = 1
    shards: int = 1

    def cache_bytes(self, entries: int) -> int:
        """Returns the bytes of keys and values of `entries` entries of every sequence, scales included."""
        numbers = 2 * self.batch_size * self.num_kv_heads * entries * self.head_width
        return numbers * jnp.dtype(self.dtype).itemsize + self.scale_bytes(entries)

    def scale_bytes(self, entries: int) -> int:
        """Returns the bytes of the scales of `entries` entries of every sequence; 0 unless the cache is int8."""
        return 2 * self.batch_size * self.num_kv_heads * entries * SCALE_BYTES if is_int8(self.dtype) else 0


def entries_read(use: CacheUse) -> int:
    """Returns how many entries of each sequence one pass reads: the whole capacity."""
    return use.capacity


def bytes_moved(use: CacheUse) -> tuple[int, int]:
    """Returns (bytes written, bytes read) in one layer's cache by one pass."""
    return use.cache_bytes(use.tokens), use.cache_bytes(entries_read(use))


def init_layer_cache(
    batch_size: int, num_kv_heads: int, capacity: int, head_width: int, dtype: jax.typing.DTypeLike
) -> LayerCache:
    """Returns an empty cache of one layer, for B sequences of at most C entries."""
    shape = (batch_size, num_kv_heads, capacity, head_width)
    return LayerCache(_zeros(shape, dtype), _zeros(shape, dtype))


def _zeros(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> CacheArray:
    values = jnp.zeros(shape, dtype)
    return Int8(values, jnp.zeros(shape[:-1], jnp.float32)) if is_int8(dtype) else values


def fill(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """Writes k, v [B, T, K, H] to entries 0 .. T - 1 of every sequence: whole prompts, into a new cache."""
    return write(cache, k, v, jnp.zeros(k.shape[0], jnp.int32))


def write(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Writes k, v [B, T, K, H] to entries positions[b] .. positions[b] + T - 1 of sequence b.

    A value that is not finite is stored as 0.
    """
    v = finite(v)
    new = LayerCache(in_cache_dtype(k.swapaxes(1, 2), cache.k), in_cache_dtype(v.swapaxes(1, 2), cache.v))
    return jax.tree.map(lambda old, new: write_entries(old, new, positions), cache, new)


def in_cache_dtype(new: jax.Array, side: CacheArray) -> CacheArray:
    """Converts new entries [..., H] to the number type of `side`, the keys or the values of a cache."""
    return quantize(new) if isinstance(side, Int8) else new.astype(side.dtype)


def int8_round_trip(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns k, v [..., H] as an int8 cache gives them back."""
    v = finite(v)
    return dequantize(quantize(k), k.dtype), dequantize(quantize(v), v.dtype)


def finite(values: jax.Array) -> jax.Array:
    """Returns the values with 0 in place of NaN and infinities."""
    return jnp.where(jnp.isfinite(values), values, 0)


def write_entries(old: jax.Array, new: jax.Array, positions: jax.Array, axis: int = 2) -> jax.Array:
    """Writes new [B, K, T, ...] into old [B, K, C, ...], at positions[b] of sequence b along `axis`."""
    # One slice update per sequence works in place on every backend; XLA:CPU runs a batched scatter element by element.
    for row in range(old.shape[0]):
        start: list[jax.Array | int] = [row, *[0] * (old.ndim - 1)]
        start[axis] = positions[row]
        old = jax.lax.dynamic_update_slice(old, new[row : row + 1], start)
    return old


def as_plain(cache: LayerCache) -> LayerCache:
    """Returns the cache itself, which is in plain JAX's layout already."""
    return cache


def attend(q: jax.Array, cache: LayerCache, positions: jax.Array) -> jax.Array:
    """Computes softmax attention of T queries per sequence: query t of sequence b sees entries 0 .. positions[b] + t.

    q [B, T, K, G, H] (G query heads per KV head), positions [B] -> [B, T, K, G, H]. Scores are computed in float32.
    """
    (k, k_scale), (v, v_scale) = (_operand_and_scale(side, q.dtype) for side in cache)
    queries, width = q.shape[1], q.shape[-1]
    last_seen = positions[:, None] + jnp.arange(queries)
    entries = jnp.arange(k.shape[2])
    visible = (entries <= last_seen[..., None])[:, None, None]  # [B,1,1,T,C]
    q = q.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgth,bkch->bkgtc", q, k, preferred_element_type=jnp.float32) * k_scale * width**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1) * v_scale
    mixed = jnp.einsum("bkgtc,bkch->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _operand_and_scale(side: CacheArray, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Returns (operand of the matmul [B, K, C, H], factor for each entry's score or weight [B, K, 1, 1, C])."""
    if not isinstance(side, Int8):
        return side, 1.0
    # XLA:TPU and XLA:GPU convert on the way into the product. XLA:CPU writes the numbers out in float32 first.
    return side.values.astype(dtype), side.scale[:, :, None, None]
