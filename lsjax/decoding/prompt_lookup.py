"""Prompt lookup: drafts copied from the text so far, from where its newest tokens occurred before (Saxena 2023)."""

import jax
import jax.numpy as jnp

SHORTEST_MATCH, LONGEST_MATCH = 2, 3


def look_up(text: jax.Array, ends: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Looks for an earlier occurrence of the newest tokens and copies what followed it.

    text: token ids, of which the first ends[b] are known, int32 [B,C]. count: tokens to copy.
    Returns (drafts int32 [B,count], found bool [B]). The longest match wins, and among equals the latest. A copy that
    reaches the end of the text continues with itself, as a text that repeats itself would.
    """
    places = jnp.arange(text.shape[1])
    agree = places < (ends - 1)[:, None]  # the newest token does not match itself
    length = jnp.zeros(text.shape, jnp.int32)
    for back in range(LONGEST_MATCH):
        newest = jnp.take_along_axis(text, jnp.maximum(ends - 1 - back, 0)[:, None], axis=1)
        agree &= (jnp.roll(text, back, axis=1) == newest) & (places >= back)
        length += agree
    best = jnp.argmax(length * text.shape[1] + places * (length > 0), axis=1)
    found = jnp.take_along_axis(length, best[:, None], axis=1)[:, 0] >= SHORTEST_MATCH
    first = best[:, None] + 1
    copied = first + jnp.arange(count) % jnp.maximum(ends[:, None] - first, 1)
    return jnp.take_along_axis(text, copied, axis=1), found
