"""How many drafts would be kept: from one pass over a text that the full model wrote, for every exit and draft length.

A draft after a rejected one is discarded, so those that count were made after the text's own tokens: the pass sees
exactly what the drafter would have seen. Run lengths are those of this text, not those of independent tokens.
"""

import functools
import heapq

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.decoding.rules import Rule
from lsjax.model.attention import plain_attention
from lsjax.model.quantized import cast
from lsjax.model.transformer import Params, exit_logits, scan_layers
from pallas_kernels.kv_cache.reference import rounded


@functools.partial(jax.jit, static_argnames=("config", "count", "dtype", "int8_cache"))
def draft_acceptance(
    params: Params,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    rule: Rule,
    config: ModelConfig,
    count: int,
    dtype: jnp.dtype,
    int8_cache: bool = False,
) -> jax.Array:
    """tokens [B,S], prompts of prompt_lengths [B] and their continuations, right-padded -> float32 [L,B,count]: the
    chance that a draft of the i-th new token by exit_layer l + 1 is kept (greedily 0 or 1). Computed in `dtype`;
    int8_cache: keys and values rounded as such a cache does."""
    params = cast(params, dtype)
    # What stands at a position predicts the next one.
    places = jnp.minimum(prompt_lengths[:, None] - 1 + jnp.arange(count), tokens.shape[1] - 1)
    look = lambda x, _: jnp.take_along_axis(x, places[..., None], axis=1)  # noqa: E731
    attention = _rounded_attention if int8_cache else plain_attention
    last, inputs = scan_layers(params, tokens, config, read=look, attention=attention)
    states = jnp.concatenate([inputs[1:], look(last, None)[None]])  # [L,B,count,D]

    def of_row(states):
        logits = exit_logits(params, states[-1], config)
        return jax.lax.map(lambda x: rule.acceptance(exit_logits(params, x, config), logits), states)

    # The logits of one exit of one row exist at a time.
    return jax.lax.map(of_row, states.swapaxes(0, 1)).swapaxes(0, 1)


def _rounded_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: None) -> jax.Array:
    return plain_attention(q, *rounded(k, v))


def expected_rounds(acceptance: np.ndarray, tokens: np.ndarray, num_speculations: int) -> np.ndarray:
    """Rounds until all of a text's new tokens [...] are out, the first of which is prefill's.

    acceptance [..., n]: the chance that a draft of each is kept. With chances of 0 and 1 the count is that of the
    actual rounds; others are taken as independent along the text.
    """
    n = acceptance.shape[-1]
    left = np.zeros((*acceptance.shape[:-1], n + num_speculations + 1))  # rounds that remain when i tokens are out
    for i in reversed(range(1, n)):
        reached, rounds = np.ones(left.shape[:-1]), np.ones(left.shape[:-1])
        for kept in range(min(num_speculations, n - i)):
            chance = acceptance[..., i + kept]
            rounds += reached * (1 - chance) * left[..., i + kept + 1]
            reached = reached * chance
        rounds += reached * left[..., min(i + num_speculations + 1, n)]
        left[..., i] = np.where(i < tokens, rounds, 0.0)
    return left[..., 1]


def batch_rounds(rounds: np.ndarray, rows: int) -> float:
    """Rounds until texts that take `rounds` [N] each are all out, `rows` of them at a time: the next takes the row that
    is free first."""
    ends = [0.0] * rows
    for count in rounds:
        heapq.heapreplace(ends, ends[0] + count)
    return max(ends)
