"""The plain-JAX KV cache of one layer: static shape, head-major, a length per row kept by the caller.

Rolling back is moving that length: entries at or past it have no weight, whatever finite numbers they hold, and are
overwritten by the next write. A cache holds finite values always, since 0 * NaN would leak out of an entry without
weight: `write` sees to it, at the cost of the new tokens, where masking the values in `attend` makes XLA:GPU and
XLA:CPU copy all of them for every block of queries.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PLAIN = "plain"
# Finite, so that 0 * score stays a number.
_MASKED = -1e30


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, each [B, K, C, H]."""

    k: jax.Array
    v: jax.Array


class Use(NamedTuple):
    """What a decoding loop asks of a layer's cache: B rows, K heads of width H, room for C entries of which so many are
    full on average, the most tokens of a pass, the number type, how many devices hold it, how many query heads a KV
    head has, and in how many parts its KV heads are split over the devices."""

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
        """Keys and values of so many entries of every row."""
        return 2 * self.rows * self.num_kv_heads * entries * self.head_width * jnp.dtype(self.dtype).itemsize


def entries_read(use: Use) -> int:
    """Of every row, by a pass: `attend` reads the whole capacity."""
    return use.capacity


def bytes_moved(use: Use) -> tuple[int, int]:
    """Of one layer's cache: (by writing, by attending)."""
    return use.bytes_of(use.tokens), use.bytes_of(entries_read(use))


def init_layer_cache(batch: int, num_kv_heads: int, capacity: int, head_width: int, dtype) -> LayerCache:
    shape = (batch, num_kv_heads, capacity, head_width)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def fill(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at the entries 0 .. T - 1 of every row: whole prompts, into a new cache."""
    return write(cache, k, v, jnp.zeros(k.shape[0], jnp.int32))


def write(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at positions[b] .. positions[b] + T - 1 of row b; a value that is not finite, as 0."""
    k, v = (new.swapaxes(1, 2).astype(cache.k.dtype) for new in (k, finite(v)))
    return LayerCache(write_rows(cache.k, k, positions), write_rows(cache.v, v, positions))


def finite(values: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(values), values, 0)


def write_rows(old: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """old [B, K, C, H] with new [B, K, T, H] at positions[b] of row b."""
    # One slice update a row: in place on every backend, where XLA:CPU runs a batched scatter element by element.
    for row in range(old.shape[0]):
        old = jax.lax.dynamic_update_slice(old, new[row : row + 1], (row, 0, positions[row], 0))
    return old


def attend(q: jax.Array, cache: LayerCache, positions: jax.Array) -> jax.Array:
    """Softmax attention of T queries a row: query t of row b sees cache entries 0 .. positions[b] + t.

    q [B, T, K, G, H] (G query heads per KV head), positions [B] -> [B, T, K, G, H]. Scores are float32.
    """
    queries, width = q.shape[1], q.shape[-1]
    last_seen = positions[:, None] + jnp.arange(queries)
    entries = jnp.arange(cache.k.shape[2])
    visible = (entries <= last_seen[..., None])[:, None, None]  # [B,1,1,T,C]
    q = q.transpose(0, 2, 3, 1, 4)
    scores = jnp.einsum("bkgth,bkch->bkgtc", q, cache.k, preferred_element_type=jnp.float32) * width**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1).astype(cache.v.dtype)
    mixed = jnp.einsum("bkgtc,bkch->bkgth", weights, cache.v, preferred_element_type=jnp.float32)
    return mixed.transpose(0, 3, 1, 2, 4).astype(q.dtype)
