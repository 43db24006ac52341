"""Causal attention over a whole block of tokens, as training and prefill need it."""

from typing import Protocol

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to see gives numbers and not NaN.
MASKED = -1e30
# Longer sequences go by blocks of so many queries: the scores of one block exist at a time, and keys after it are
# never read.
_BLOCK = 1024
_MOST_BLOCKS = 16  # each is a piece of program of its own: compiling many takes minutes
_WHOLE = 1024


class AttentionFunction(Protocol):
    """q [B,S,K,G,H], k and v [B,S,K,H], segment_ids [B,S] or None -> [B,S,K,G,H].

    Query s sees the positions c <= s with its own segment id (None: all of them).
    """

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array: ...


def plain_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None = None) -> jax.Array:
    """Softmax attention in plain JAX, scores in float32: see AttentionFunction."""
    length = q.shape[1]
    if length <= _WHOLE:
        return _attend(q, k, v, segment_ids, 0)
    # Recomputed in the backward pass: kept, the weights of all blocks would be [B,N,S,S] again.
    block = jax.checkpoint(_attend, static_argnums=4)
    mixed, size = [], max(_BLOCK, -(-length // _MOST_BLOCKS))
    for start in range(0, length, size):
        end = min(start + size, length)
        seen = None if segment_ids is None else segment_ids[:, :end]
        mixed.append(block(q[:, start:end], k[:, :end], v[:, :end], seen, start))
    return jnp.concatenate(mixed, axis=1)


def _attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None, first: int) -> jax.Array:
    """Queries first .. first + S of a row, against its first C keys."""
    B, S, K, G, H = q.shape
    # Heads before tokens, and the queries of a group as rows: XLA:CPU runs these twice as fast as one einsum would.
    rows = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * S, H)
    keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
    scores = jnp.einsum("bkqh,bkch->bkqc", rows, keys, preferred_element_type=jnp.float32)
    visible = _visible(S, k.shape[1], segment_ids, first)
    scores = jnp.where(visible, scores.reshape(B, K, G, S, -1) * H**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * S, -1)
    mixed = jnp.einsum("bkqc,bkch->bkqh", weights, values)
    return mixed.reshape(B, K, G, S, H).transpose(0, 3, 1, 2, 4)


def _visible(queries: int, keys: int, segment_ids: jax.Array | None, first: int) -> jax.Array:
    """bool, broadcasts to [B,K,G,S,C]."""
    causal = first + jnp.arange(queries)[:, None] >= jnp.arange(keys)
    if segment_ids is None:
        return causal
    same = segment_ids[:, first : first + queries, None] == segment_ids[:, None, :]
    return (causal & same)[:, None, None]
