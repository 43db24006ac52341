"""Predicted acceptance: which drafts of every exit would be kept, from one pass over a text that the full model wrote.

A draft after a rejected one is discarded. So every draft that counts follows the text's own tokens, and the pass sees
exactly what the drafter would have seen. Run lengths are those of this text, not those of independent tokens.
"""

import functools
import heapq
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.decoding.sampling import Sampler
from lsjax.model.attention import AttentionFunction, plain_attention
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.quantization import cast
from lsjax.model.transformer import Params, exit_logits, scan_layers
from pallas_kernels.kv_cache.reference import int8_round_trip


class DraftAcceptance(NamedTuple):
    """How every exit would have drafted the new tokens of some texts. All are [M,L,B,count]: M draft vocabularies, and
    entry l of L is exit layer l+1.

    chance: that the draft of a token is kept, float32; greedily 0 or 1.
    rank: how many tokens the exit finds likelier than the one that the text has, int32; 0 is the exit's first choice.
      Of two tokens as likely, the smaller id comes first. For a token outside the draft vocabulary it is at least the
      size of that vocabulary.
    """

    chance: jax.Array
    rank: jax.Array


@functools.partial(jax.jit, static_argnames=("config", "count", "dtype", "int8_cache"))
def draft_acceptance(
    params: Params,
    tokens: jax.Array,
    prompt_lengths: jax.Array,
    sampler: Sampler,
    config: ModelConfig,
    count: int,
    dtype: jnp.dtype,
    vocabularies: jax.Array,
    int8_cache: bool = False,
    exit_adapter: ExitAdapter | None = None,
    drafting: Params | None = None,
) -> DraftAcceptance:
    """Returns which drafts of every exit would be kept, and where the exits rank the tokens of the text.

    tokens: prompts with their continuations, right-padded [B,S]. prompt_lengths: [B]. count: new tokens to look at.
    sampler: with a value per sequence of each of its arrays. dtype: the compute dtype.
    vocabularies: the tokens that drafts choose among, bool [M,V].
    int8_cache: rounds keys and values as an int8 cache does. exit_adapter: drafts of its exit go through it.
    drafting: layers and a head that draft in place of those in `params`, such as those in int8; with fewer than L
      layers the result has fewer exits. The pass then takes all keys and values from them, where decoding takes those
      before the round from `params`. The difference is that of rounding, so a few of many drafts may fare otherwise.
    """
    params, exit_adapter = cast(params, dtype), cast(exit_adapter, dtype)
    drafter = params
    if drafting is not None:
        drafter = params | cast({key: drafting[key] for key in ("layers", "lm_head")}, dtype)
    # The state at a position predicts the next token.
    places = jnp.minimum(prompt_lengths[:, None] - 1 + jnp.arange(count), tokens.shape[1] - 1)

    def look(x, _):
        return jnp.take_along_axis(x, places[..., None], axis=1)

    attention = _rounded_attention if int8_cache else plain_attention
    verified, states = _states(params, tokens, config, look, attention)
    if drafting is not None:
        _, states = _states(drafter, tokens, config, look, attention)
    if exit_adapter is not None and exit_adapter.exit_layer <= len(states):
        index = exit_adapter.exit_layer - 1
        states = states.at[index].set(exit_adapter.apply(states[index]))

    new_tokens = jnp.take_along_axis(tokens, jnp.minimum(places + 1, tokens.shape[1] - 1), axis=1)

    def of_row(row):
        return _of_sequence(params, drafter, config, vocabularies, *row)

    # The logits of one exit of one sequence exist at a time.
    found = jax.lax.map(of_row, (states.swapaxes(0, 1), verified, sampler, new_tokens))
    return jax.tree.map(lambda a: jnp.transpose(a, (2, 1, 0, 3)), found)


def _states(
    params: Params, tokens: jax.Array, config: ModelConfig, look: Callable[..., jax.Array], attention: AttentionFunction
) -> tuple[jax.Array, jax.Array]:
    """Returns what `look` reads of the states after the last layer [B,count,D], and after every layer [L,B,count,D]."""
    last, inputs = scan_layers(params, tokens, config, read=look, attention=attention)
    last = look(last, None)
    return last, jnp.concatenate([inputs[1:], last[None]])


def _of_sequence(
    params: Params,
    drafter: Params,
    config: ModelConfig,
    vocabularies: jax.Array,
    states: jax.Array,
    verified: jax.Array,
    sampler: Sampler,
    new_tokens: jax.Array,
) -> DraftAcceptance:
    """Returns the chances and ranks of one sequence [L,M,count].

    states: those of every exit [L,count,D]. verified: those of the last layer [count,D]. new_tokens: [count].
    """
    logits = exit_logits(params, verified, config)

    def of_exit(x):
        drafted = exit_logits(drafter, x, config)

        def by_vocabulary(known):
            among = jnp.where(known, drafted, -jnp.inf)
            return DraftAcceptance(sampler.acceptance(among, logits), _rank(new_tokens, among))

        return jax.lax.map(by_vocabulary, vocabularies)

    return jax.lax.map(of_exit, states)


def _rank(tokens: jax.Array, logits: jax.Array) -> jax.Array:
    """Returns how many tokens come before each of `tokens` [...] by logits [...,V], ties by id: int32 [...]."""
    own = jnp.take_along_axis(logits, tokens[..., None], axis=-1)
    is_smaller = jnp.arange(logits.shape[-1]) < tokens[..., None]
    return jnp.sum((logits > own) | ((logits == own) & is_smaller), axis=-1, dtype=jnp.int32)


def _rounded_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
    return plain_attention(q, *int8_round_trip(k, v), segment_ids)


def expected_rounds(acceptance: np.ndarray, tokens: np.ndarray, num_speculations: int) -> np.ndarray:
    """Returns the expected rounds until all new tokens of a text are out; prefill emits the first.

    acceptance: the chance that a draft of each token is kept [..., n]. tokens: new tokens per text [...].
    With chances of 0 and 1 the result is the actual number of rounds. Other chances count as independent along the
    text.
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


def batch_rounds(rounds: np.ndarray, batch_size: int) -> float:
    """Returns the rounds until texts that take `rounds` [N] each are all out, `batch_size` of them at a time.

    The next text takes the place that is free first.
    """
    ends = [0.0] * batch_size
    for count in rounds:
        heapq.heapreplace(ends, ends[0] + count)
    return max(ends)
