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
    scores = jnp.einsum("bskgh,bckh->bkgsc", q, k, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * q.shape[-1] ** -0.5, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgsc,bckh->bskgh", weights, v)
