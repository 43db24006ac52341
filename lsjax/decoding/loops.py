"""The decoding loops: one `lax.while_loop` each, nothing on the host inside, a single predicate a round.

Invariant: `length[b]` entries of row b's cache are valid, and `pending[b]`, its newest token, is not among them
yet. A rejected draft is undone by not advancing the length.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.passes import Cache, Weights, embed, greedy_tokens, run_layers


class Decoding(NamedTuple):
    """The state of B rows being decoded. `tokens` [B, >= limit + d] has `emitted` valid entries a row."""

    cache: Cache
    tokens: jax.Array
    emitted: jax.Array
    length: jax.Array
    pending: jax.Array
    done: jax.Array
    rounds: jax.Array
    drafted: jax.Array
    accepted: jax.Array


def begin(cache: Cache, first: jax.Array, lengths: jax.Array, limit: jax.Array, stop: jax.Array, room: int) -> Decoding:
    """After prefill: `first` [B] is already emitted. `room`: tokens a row may write, rounds past the limit
    included. `limit` [] is max_new_tokens, `stop` [n] the ids that end a text."""
    batch = first.shape[0]
    zeros = jnp.zeros(batch, jnp.int32)
    return Decoding(
        cache=cache,
        tokens=jnp.zeros((batch, room), jnp.int32).at[:, 0].set(first),
        emitted=zeros + 1,
        length=lengths,
        pending=first,
        done=jnp.isin(first, stop) | (limit <= 1),
        rounds=zeros,
        drafted=zeros,
        accepted=zeros,
    )


def autoregressive_loop(
    weights: Weights, state: Decoding, limit: jax.Array, stop: jax.Array, config: ModelConfig, exit_layer: int
) -> Decoding:
    """One token a pass through the first `exit_layer` layers (L: the full model) until every row is done."""

    def one_token(state: Decoding) -> Decoding:
        x = embed(weights, state.pending[:, None])
        x, cache = run_layers(weights, x, state.cache, state.length, range(exit_layer), config)
        block = greedy_tokens(weights, x, config)
        return _commit(state._replace(cache=cache), block, jnp.zeros_like(state.length), 0, limit, stop)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), one_token, state)


def self_speculative_loop(
    weights: Weights,
    state: Decoding,
    limit: jax.Array,
    stop: jax.Array,
    config: ModelConfig,
    exit_layer: int,
    num_speculations: int,
) -> Decoding:
    """Rounds of: draft d tokens with the first E layers, verify all with the others, keep what agrees.

    Emits what the full model's greedy decoding would, whatever the drafts were.
    """

    def one_round(state: Decoding) -> Decoding:
        drafts, states, cache = draft(weights, state, config, exit_layer, num_speculations)
        # Verify: the d+1 kept states through the remaining layers, in one pass over the same cache.
        x, cache = run_layers(weights, states, cache, state.length, range(exit_layer, config.num_layers), config)
        verified = greedy_tokens(weights, x, config)
        # Accept the longest prefix on which draft and verifier agree, plus the verifier's own next token.
        agree = jnp.cumprod(drafts == verified[:, :-1], axis=1)
        accepted = jnp.sum(agree, axis=1, dtype=jnp.int32)
        return _commit(state._replace(cache=cache), verified, accepted, num_speculations, limit, stop)

    return jax.lax.while_loop(lambda state: ~jnp.all(state.done), one_round, state)


def draft(
    weights: Weights, state: Decoding, config: ModelConfig, exit_layer: int, num_speculations: int
) -> tuple[jax.Array, jax.Array, Cache]:
    """d tokens from the first E layers, one at a time: (drafts [B, d], states [B, d+1, D], cache).

    `states` are the tokens' hidden states after layer E-1 (the paper's exit query cache), of the pending token
    and of every draft: the last draft runs through the early layers too, so that it can be verified.
    """
    batch, width = state.pending.shape[0], weights["embed"].shape[1]

    def draft_one(index, carry):
        token, drafts, states, cache = carry
        x = embed(weights, token[:, None])
        x, cache = run_layers(weights, x, cache, state.length + index, range(exit_layer), config)
        states = jax.lax.dynamic_update_slice(states, x, (0, index, 0))
        token = greedy_tokens(weights, x, config)
        return token[:, 0], jax.lax.dynamic_update_slice(drafts, token, (0, index)), states, cache

    empty_states = jnp.zeros((batch, num_speculations + 1, width), weights["embed"].dtype)
    empty_drafts = jnp.zeros((batch, num_speculations), jnp.int32)
    carry = (state.pending, empty_drafts, empty_states, state.cache)
    last, drafts, states, cache = jax.lax.fori_loop(0, num_speculations, draft_one, carry)
    x, cache = run_layers(
        weights, embed(weights, last[:, None]), cache, state.length + num_speculations, range(exit_layer), config
    )
    return drafts, states.at[:, -1:].set(x), cache


def _commit(
    state: Decoding, block: jax.Array, accepted: jax.Array, drafted: int, limit: jax.Array, stop: jax.Array
) -> Decoding:
    """Emits the first accepted[b] + 1 tokens of block [B, d+1], cut at the first stop token and at the limit.

    `drafted` and `accepted` count only drafts whose verdict mattered: those past a stop or the limit do not.
    """
    agreed = accepted + 1
    is_stop = jnp.isin(block, stop)
    until_stop = jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1) + 1, block.shape[1] + 1)
    kept = jnp.minimum(jnp.minimum(agreed, until_stop), limit - state.emitted)
    kept = jnp.where(state.done, 0, kept)
    write_row = lambda row, new, at: jax.lax.dynamic_update_slice(row, new, (at,))  # noqa: E731
    newest = jnp.take_along_axis(block, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    active = ~state.done
    emitted = state.emitted + kept
    return state._replace(
        # The whole block goes in; entries past `emitted` are overwritten by the next round or never read.
        tokens=jnp.where(state.done[:, None], state.tokens, jax.vmap(write_row)(state.tokens, block, state.emitted)),
        emitted=emitted,
        length=state.length + kept,
        pending=jnp.where(active, newest, state.pending),
        done=state.done | (until_stop <= agreed) | (emitted >= limit),
        rounds=state.rounds + active,
        drafted=state.drafted + jnp.where(active, jnp.where(kept < agreed, kept, drafted), 0),
        accepted=state.accepted + jnp.where(active, jnp.minimum(accepted, kept), 0),
    )
