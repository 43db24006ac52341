"""The plain-JAX KV cache of one layer: static shape, head-major, a length per row kept by the caller.

Rolling back is moving that length: entries at or past it have no weight, whatever finite numbers they hold, and are
overwritten by the next write. A cache holds finite values always, since 0 * NaN would leak out of an entry without
weight: `write` sees to it, at the cost of the new tokens, where masking the values in `attend` makes XLA:GPU and
XLA:CPU copy all of them for every block of queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache.int8 import SCALE_BYTES, Int8, dequantize, is_int8, quantize

PLAIN = "plain"
# Finite, so that 0 * score stays a number.
_MASKED = -1e30


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, each [B, K, C, H]; in int8 with scales [B, K, C]."""

    k: jax.Array | Int8
    v: jax.Array | Int8


class Use(NamedTuple):
    """What a decoding loop asks of a layer's cache: B rows, K heads of width H, room for C entries of which so many are
    full on average, the most tokens of a pass, the number type of the cache, how many devices hold it, how many query
    heads a KV head has, and in how many parts its KV heads are split over the devices."""

    rows: int
    num_kv_heads: int
    head_width: int
    capacity: int
    mean_length: int
    tokens: int
    dtype: jnp.dtype
    devices: int = 1
    group: int = 1
    parts: int = 1

    def bytes_of(self, entries: int) -> int:
        """Keys and values of so many entries of every row, their scales included."""
        numbers = 2 * self.rows * self.num_kv_heads * entries * self.head_width
        return numbers * jnp.dtype(self.dtype).itemsize + self.scale_bytes_of(entries)

    def scale_bytes_of(self, entries: int) -> int:
        return 2 * self.rows * self.num_kv_heads * entries * SCALE_BYTES if is_int8(self.dtype) else 0


def entries_read(use: Use) -> int:
    """Of every row, by a pass: `attend` reads the whole capacity."""
    return use.capacity


def bytes_moved(use: Use) -> tuple[int, int]:
    """Of one layer's cache: (by writing, by attending)."""
    return use.bytes_of(use.tokens), use.bytes_of(entries_read(use))


def init_layer_cache(batch: int, num_kv_heads: int, capacity: int, head_width: int, dtype) -> LayerCache:
    shape = (batch, num_kv_heads, capacity, head_width)
    return LayerCache(_zeros(shape, dtype), _zeros(shape, dtype))


def _zeros(shape: tuple[int, ...], dtype) -> jax.Array | Int8:
    values = jnp.zeros(shape, dtype)
    return Int8(values, jnp.zeros(shape[:-1], jnp.float32)) if is_int8(dtype) else values


def fill(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at the entries 0 .. T - 1 of every row: whole prompts, into a new cache."""
    return write(cache, k, v, jnp.zeros(k.shape[0], jnp.int32))


def write(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at positions[b] .. positions[b] + T - 1 of row b; a value that is not finite, as 0."""
    k, v = (as_held(new.swapaxes(1, 2), old) for new, old in ((k, cache.k), (finite(v), cache.v)))
    return jax.tree.map(lambda old, new: write_rows(old, new, positions), cache, LayerCache(k, v))


def as_held(new: jax.Array, side: jax.Array | Int8) -> jax.Array | Int8:
    """New entries [..., H] as the keys, or the values, of a cache are held."""
    return quantize(new) if isinstance(side, Int8) else new.astype(side.dtype)


def rounded(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k, v [..., H] as they are found in a cache in int8."""
    return tuple(dequantize(quantize(new), new.dtype) for new in (k, finite(v)))


def finite(values: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(values), values, 0)


def write_rows(old: jax.Array, new: jax.Array, positions: jax.Array, axis: int = 2) -> jax.Array:
    """old [B, K, C, ...] with new [B, K, T, ...] at positions[b] of row b; entries lie along `axis`."""
    # One slice update a row: in place on every backend, where XLA:CPU runs a batched scatter element by element.
    for row in range(old.shape[0]):
        start = [row, *[0] * (old.ndim - 1)]
        start[axis] = positions[row]
        old = jax.lax.dynamic_update_slice(old, new[row : row + 1], start)
    return old


def apart(cache: LayerCache) -> LayerCache:
    """Keys and values apart, as plain JAX holds them."""
    return cache


def attend(q: jax.Array, cache: LayerCache, positions: jax.Array) -> jax.Array:
    """Softmax attention of T queries a row: query t of row b sees cache entries 0 .. positions[b] + t.

    q [B, T, K, G, H] (G query heads per KV head), positions [B] -> [B, T, K, G, H]. Scores are float32.
    """
    (k, k_scale), (v, v_scale) = (_factors(side, q.dtype) for side in cache)
    queries, width = q.shape[1], q.shape[-1]
    last_seen = positions[:, None] + jnp.arange(queries)
    entries = jnp.arange(k.shape[2])
    visible = (entries <= last_seen[..., None])[:, None, None]  # [B,1,1,T,C]
    q = q.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgth,bkch->bkgtc", q, k, preferred_element_type=jnp.float32) * k_scale * width**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1) * v_scale
    mixed = jnp.einsum("bkgtc,bkch->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return mixed.transpose(0, 3, 1, 2, 4).astype(q.dtype)


def _factors(side: jax.Array | Int8, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """(what to multiply with [B, K, C, H], what of the product makes it right [B, K, 1, 1, C])."""
    if not isinstance(side, Int8):
        return side, 1.0
    # XLA:TPU and XLA:GPU convert on the way into the product; XLA:CPU writes the numbers out in float32 first.
    return side.values.astype(dtype), side.scale[:, :, None, None]
