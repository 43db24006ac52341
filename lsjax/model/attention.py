"""Attention over a whole block of tokens, as training and prefill need it."""

import jax
import jax.numpy as jnp

# Finite, so that a row with nothing to see gives numbers and not NaN.
MASKED = -1e30


def causal_mask(segment_ids: jax.Array) -> jax.Array:
    """[B, S] -> bool [B, S, S]: query s sees position c <= s of its own document."""
    length = segment_ids.shape[-1]
    causal = jnp.tril(jnp.ones((length, length), bool))
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """Softmax attention, scores in float32.

    q [B,S,K,G,H], k and v [B,C,K,H], mask bool [B,S,C] -> [B,S,K,G,H].
    """
    B, S, K, G, H = q.shape
    # Heads before tokens, and the queries of a group as rows: XLA:CPU runs these twice as fast as one einsum would.
    rows = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * S, H)
    keys, values = (a.transpose(0, 2, 1, 3) for a in (k, v))
    scores = jnp.einsum("bkqh,bkch->bkqc", rows, keys, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores.reshape(B, K, G, S, -1) * H**-0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype).reshape(B, K, G * S, -1)
    mixed = jnp.einsum("bkqc,bkch->bkqh", weights, values)
    return mixed.reshape(B, K, G, S, H).transpose(0, 3, 1, 2, 4)
