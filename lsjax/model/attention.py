"""Causal attention in plain JAX: the reference that runs everywhere, and the interface that every version fulfils.

flash.py holds the accelerators' fused versions and chooses between them and this one. layers.py holds the module with
the weights (projections of q, k, v and the output). Attention to a KV cache is in pallas_kernels/kv_cache.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

# Finite, so that a query that sees no key gets numbers and not NaN.
MASKED = -1e30
# Queries are cut into blocks, and a block never reads the keys after it. Small blocks stay in a processor's cache.
# Every block is compiled on its own, and compiling many takes minutes, so long sequences have larger ones.
_BLOCK = 64
_LONG = 1024  # longer sequences keep the scores of one block of this size at a time
_MOST_BLOCKS = 16


class AttentionFunction(Protocol):
    """A function that mixes values causally: q [B,S,K,G,H], k and v [B,S,K,H] -> [B,S,K,G,H].

    Query s sees the positions c <= s that have its own segment id. segment_ids is [B,S]; None means one segment.
    G = N/K is the number of query heads per KV head.
    """

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array: ...


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Computes softmax attention in plain JAX with float32 scores; shapes as in AttentionFunction."""
    length = q.shape[1]
    block, size = _attend, _BLOCK
    if length > _LONG:
        # The backward pass recomputes each block: keeping the weights of all blocks would take [B,N,S,S].
        block, size = jax.checkpoint(_attend, static_argnums=4), max(_LONG, -(-length // _MOST_BLOCKS))
    mixed = []
    for start in range(0, length, size):
        end = min(start + size, length)
        seen = None if segment_ids is None else segment_ids[:, :end]
        mixed.append(block(q[:, start:end], k[:, :end], v[:, :end], seen, start))
    return jnp.concatenate(mixed, axis=1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, first: int) -> jax.Array:
    """Attends from S queries, which start at position `first`, to the first C keys."""
    B, S, K, G, H = q.shape
    # Heads go before tokens, and the queries of a group become rows: XLA:CPU runs this twice as fast as one einsum.
    rows = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * S, H)
    keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
    scores = jnp.einsum("bkqh,bkch->bkqc", rows, keys, preferred_element_type=jnp.float32)
    visible = _visible(S, k.shape[1], segment_ids, first)
    scores = jnp.where(visible, scores.reshape(B, K, G, S, -1) * H**-0.5, MASKED).reshape(B, K, G * S, -1)
    # The softmax's division comes after the sum over values: H numbers per query instead of C, also in the gradient.
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    mixed = jnp.einsum("bkqc,bkch->bkqh", weights.astype(v.dtype), values, preferred_element_type=jnp.float32)
    mixed = (mixed / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)
    return mixed.reshape(B, K, G, S, H).transpose(0, 3, 1, 2, 4)


def _visible(queries: int, keys: int, segment_ids: jax.Array | None, first: int) -> jax.Array:
    """Returns which keys each query sees: bool, broadcasts to [B,K,G,S,C]."""
    causal = first + jnp.arange(queries)[:, None] >= jnp.arange(keys)
    if segment_ids is None:
        return causal
    same = segment_ids[:, first : first + queries, None] == segment_ids[:, None, :]
    return (causal & same)[:, None, None]
