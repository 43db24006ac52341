"""The plain-JAX KV cache of one layer: static shape, head-major, a length per row kept by the caller.

Rolling back is moving that length: entries at or past it have no weight, whatever finite numbers they hold, and are
overwritten by the next write. A cache holds finite values always, since 0 * NaN would leak out of an entry without
weight: `write` sees to it, at the cost of the new tokens, where masking the values in `attend` makes XLA:GPU and
XLA:CPU copy all of them for every block of queries.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Finite, so that 0 * score stays a number.
_MASKED = -1e30


class LayerCache(NamedTuple):
    """Keys (rotated) and values of one layer, each [B, K, C, H]."""

    k: jax.Array
    v: jax.Array


def init_layer_cache(batch: int, num_kv_heads: int, capacity: int, head_width: int, dtype) -> LayerCache:
    shape = (batch, num_kv_heads, capacity, head_width)
    return LayerCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def write(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at positions[b] .. positions[b] + T - 1 of row b; a value that is not finite, as 0."""
    values = jnp.where(jnp.isfinite(v), v, 0)
    return LayerCache(_write(cache.k, k, positions), _write(cache.v, values, positions))


def _write(old: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    # One slice update a row: in place on every backend, where XLA:CPU runs a batched scatter element by element.
    new = new.swapaxes(1, 2).astype(old.dtype)
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
    scores = _scores(q.transpose(0, 2, 3, 1, 4), cache.k) * width**-0.5
    weights = jax.nn.softmax(jnp.where(visible, scores, _MASKED), axis=-1)
    return _mix(weights, cache.v).transpose(0, 3, 1, 2, 4).astype(q.dtype)


# A few queries against a cache, batched over KV heads, are tiny matmuls. XLA:CPU hands each to a threaded
# library at a cost that dwarfs it (130 us a layer for 4 queries, measured), yet fuses multiply-and-sum into
# one loop (30 us); a single query it already runs as a matrix-vector product. That loop runs on one thread, and over
# many products many times slower than a matmul: 7.6 ms against 0.5 for 5 queries and 1152 entries.
_FEW_PRODUCTS = 2**19


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q [B,K,G,T,H], k [B,K,C,H] -> float32 [B,K,G,T,C]."""

    def matmul(q, k):
        return jnp.einsum("bkgth,bkch->bkgtc", q, k, preferred_element_type=jnp.float32)

    def fused(q, k):
        return jnp.sum(q[..., None, :].astype(jnp.float32) * k[:, :, None, None], axis=-1)

    return _few_rows(fused, matmul, q, k)


def _mix(weights: jax.Array, v: jax.Array) -> jax.Array:
    """weights float32 [B,K,G,T,C], v [B,K,C,H] -> float32 [B,K,G,T,H]."""

    def matmul(weights, v):
        return jnp.einsum("bkgtc,bkch->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)

    def fused(weights, v):
        return jnp.sum(weights[..., None] * v[:, :, None, None], axis=-2)

    return _few_rows(fused, matmul, weights, v)


def _few_rows(fused, matmul, left: jax.Array, right: jax.Array) -> jax.Array:
    batch, heads, group, queries = left.shape[:4]
    products = batch * heads * group * queries * math.prod(right.shape[2:])
    if group * queries == 1 or products > _FEW_PRODUCTS:
        return matmul(left, right)
    return jax.lax.platform_dependent(left, right, cpu=fused, default=matmul)
