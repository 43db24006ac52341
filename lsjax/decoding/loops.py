"""Decoding loops. Each strategy is one `lax.while_loop` without host syncs.

A loop returns when every sequence has finished, or earlier if `pause` says so. Call it again with the returned state
to resume.

Invariant: `length[b]` entries of sequence b's cache are valid. Its newest token, `pending[b]`, is not among them yet.
A rejected draft is undone by not advancing the length.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.forward import DRAFT, TOKEN_IDS, Cache, Weights, adapt, embed, run_layers
from lsjax.decoding.prompt_lookup import look_up
from lsjax.decoding.sampling import Greedy, Sampler, Subset
from lsjax.model.transformer import exit_logits

GREEDY = Greedy()


class Pause(NamedTuple):
    """Says when a loop returns before all sequences have finished.

    round: return after this many rounds of the batch, counted from the start [].
    unfinished: return when fewer sequences than this are unfinished [].
    """

    round: jax.Array | int = 2**31 - 1
    unfinished: jax.Array | int = 1


NEVER = Pause()


class DecodeState(NamedTuple):
    """The state of B sequences while they are decoded.

    cache: keys and values of every layer.
    tokens: new tokens [B, >= max_new_tokens + d], of which the first emitted[b] are valid.
    emitted: number of new tokens [B].
    length: valid cache entries [B].
    pending: the newest token, which is not in the cache yet [B].
    done: whether the sequence has finished [B].
    rounds: rounds that the sequence has taken [B].
    drafted_at, accepted_at: rounds in which an i-th draft existed, and in which it was accepted [B, d].
    text: prompt and new tokens [B, C], the first length[b] + 1 valid; [B, 0] unless drafts are copied from it.
    round: rounds of the whole batch [].
    """

    cache: Cache
    tokens: jax.Array
    emitted: jax.Array
    length: jax.Array
    pending: jax.Array
    done: jax.Array
    rounds: jax.Array
    drafted_at: jax.Array
    accepted_at: jax.Array
    text: jax.Array
    round: jax.Array


def begin(
    cache: Cache,
    first: jax.Array,
    lengths: jax.Array,
    max_new_tokens: jax.Array,
    stop_token_ids: jax.Array,
    buffer_size: int,
    max_drafts: int = 0,
    prompts: jax.Array | None = None,
) -> DecodeState:
    """Returns the state after prefill, with each sequence's first new token already emitted.

    first: the first new token [B]; lengths: prompt lengths [B].
    stop_token_ids: ids that end a sequence [B, n]; max_new_tokens: limits of new tokens [B].
    buffer_size: room for new tokens per sequence; the last round may write past max_new_tokens.
    max_drafts: the most drafts of one round. prompts: prompt tokens [B, S], if drafts will be copied from the text.
    """
    batch = first.shape[0]
    zeros, counts = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, max_drafts), jnp.int32)
    text = jnp.zeros((batch, 0), jnp.int32)
    if prompts is not None:
        text = jnp.pad(prompts, ((0, 0), (0, buffer_size))).at[jnp.arange(batch), lengths].set(first)
    return DecodeState(
        cache=cache,
        tokens=jnp.zeros((batch, buffer_size), jnp.int32).at[:, 0].set(first),
        emitted=zeros + 1,
        length=lengths,
        pending=first,
        done=_end_a_text(first[:, None], stop_token_ids)[:, 0] | (max_new_tokens <= 1),
        rounds=zeros,
        drafted_at=counts,
        accepted_at=counts,
        text=text,
        round=jnp.int32(0),
    )


def replace_sequence(state: DecodeState, index: jax.Array, new: DecodeState) -> DecodeState:
    """Returns `state` with sequence `index` [] replaced by the only sequence of `new`."""

    def put(whole, part):
        return jax.lax.dynamic_update_slice_in_dim(whole, part, index, axis=0) if whole.ndim else whole

    return jax.tree.map(put, state, new)


def autoregressive_loop(
    weights: Weights,
    state: DecodeState,
    max_new_tokens: jax.Array,
    stop_token_ids: jax.Array,
    config: ModelConfig,
    exit_layer: int,
    sampler: Sampler = GREEDY,
    pause: Pause = NEVER,
) -> DecodeState:
    """Decodes one token per pass through the first `exit_layer` layers (L: the full model) until all are done."""

    def one_token(state: DecodeState) -> DecodeState:
        x = embed(weights, state.pending[:, None])
        x, cache = run_layers(weights, x, state.cache, state.length, range(exit_layer), config)
        token, _ = sampler.choose(exit_logits(weights, adapt(weights, x), config)[:, 0], state.emitted)
        state, accepted = state._replace(cache=cache), jnp.zeros_like(state.length)
        return _commit(state, token[:, None], accepted, 0, max_new_tokens, stop_token_ids)

    return jax.lax.while_loop(_continues(pause), one_token, state)


def self_speculative_loop(
    weights: Weights,
    state: DecodeState,
    max_new_tokens: jax.Array,
    stop_token_ids: jax.Array,
    config: ModelConfig,
    exit_layer: int,
    num_speculations: int,
    sampler: Sampler = GREEDY,
    pause: Pause = NEVER,
    lookup: int = 0,
) -> DecodeState:
    """Decodes in rounds: drafts d tokens with the first E layers, verifies all with the others, keeps what agrees.

    Emits what the full model emits with the same sampler (when sampling: with the same distribution), whatever the
    drafts are. lookup: where the newest tokens of a sequence occurred before in its text, copy this many drafts from
    there instead of drafting; all layers then verify them.
    """

    def drafting_round(state: DecodeState) -> DecodeState:
        shares_cache = "layers" not in weights.get(DRAFT, {})
        drafts = draft(weights, state, config, exit_layer, num_speculations, sampler, keep_states=shares_cache)
        # Verify: run the d+1 kept states through the remaining layers, in one pass over the same cache.
        x, remaining = drafts.states, range(exit_layer, config.num_layers)
        if not shares_cache:  # other layers drafted: their states and cache entries are not the model's own
            tokens = jnp.concatenate([state.pending[:, None], drafts.tokens], axis=1)
            x, remaining = embed(weights, tokens), range(config.num_layers)
        x, cache = run_layers(weights, x, drafts.cache, state.length, remaining, config)
        logits = exit_logits(weights, x, config)
        block, accepted = sampler.verify(drafts.tokens, drafts.log_probs, logits, state.emitted)
        state = state._replace(cache=cache)
        return _commit(state, block, accepted, num_speculations, max_new_tokens, stop_token_ids)

    def copying_round(state: DecodeState, copied: jax.Array, found: jax.Array) -> DecodeState:
        drafts, counts = _copy_or_draft(weights, state, config, exit_layer, num_speculations, sampler, copied, found)
        x = embed(weights, jnp.concatenate([state.pending[:, None], drafts.tokens], axis=1))
        x, cache = run_layers(weights, x, drafts.cache, state.length, range(config.num_layers), config)
        logits = exit_logits(weights, x, config)
        block, accepted = sampler.verify(drafts.tokens, drafts.log_probs, logits, state.emitted, counts)
        return _commit(state._replace(cache=cache), block, accepted, counts, max_new_tokens, stop_token_ids)

    if lookup:
        return _take_turns(drafting_round, copying_round, state, lookup, _continues(pause))
    return jax.lax.while_loop(_continues(pause), drafting_round, state)


def _take_turns(drafting_round, copying_round, state: DecodeState, lookup: int, continues) -> DecodeState:
    """Runs rounds of either kind, chosen by whether any sequence has something to copy."""

    def looked_up(state: DecodeState) -> tuple[DecodeState, jax.Array, jax.Array]:
        copied, found = look_up(state.text, state.length + 1, lookup)
        return state, copied, found & ~state.done

    def rounds(carry):
        """Runs drafting rounds up to the next match, then copying rounds up to the next miss.

        Two inner loops, since branches inside one loop would copy the cache.
        """
        carry = jax.lax.while_loop(
            lambda c: continues(c[0]) & ~jnp.any(c[2]), lambda c: looked_up(drafting_round(c[0])), carry
        )
        return jax.lax.while_loop(
            lambda c: continues(c[0]) & jnp.any(c[2]), lambda c: looked_up(copying_round(*c)), carry
        )

    return jax.lax.while_loop(lambda c: continues(c[0]), rounds, looked_up(state))[0]


def _continues(pause: Pause) -> Callable[[DecodeState], jax.Array]:
    """Returns the predicate of a loop: not paused, and some sequence unfinished."""
    return lambda state: (jnp.sum(~state.done) >= pause.unfinished) & (state.round < pause.round)


class Drafts(NamedTuple):
    """Drafted tokens and what verification needs.

    tokens: [B,d].
    log_probs: log-probabilities that the tokens were drawn by [B,d,V]; None when greedy.
    states: hidden states after layer E-1 of the pending token and of every draft [B,d+1,D] (the paper's exit query
      cache).
    cache: the KV cache with the drafts' entries in the early layers.
    """

    tokens: jax.Array
    log_probs: jax.Array | None
    states: jax.Array
    cache: Cache


def draft(
    weights: Weights,
    state: DecodeState,
    config: ModelConfig,
    exit_layer: int,
    num_speculations: int,
    sampler: Sampler = GREEDY,
    keep_states: bool = True,
) -> Drafts:
    """Drafts d tokens with the first E layers, one at a time.

    With keep_states the last draft runs through the early layers too, so that the remaining layers can continue from
    its state. Without, all layers will verify, and no states are needed.
    """
    drafter = weights | weights.get(DRAFT, {})
    subset = Subset(drafter[TOKEN_IDS], config.vocab_size) if TOKEN_IDS in drafter else None
    batch, width = state.pending.shape[0], weights["embed"].shape[1]

    def put(whole, part, index):
        return jax.lax.dynamic_update_slice(whole, part[:, None], (0, index, *[0] * (whole.ndim - 2)))

    def draft_one(index, carry):
        token, drafts = carry
        x = embed(weights, token[:, None])
        x, cache = run_layers(drafter, x, drafts.cache, state.length + index, range(exit_layer), config)
        logits = exit_logits(drafter, adapt(drafter, x), config)[:, 0]
        token, log_p = sampler.choose(logits, state.emitted + index, subset)
        log_probs = None if log_p is None else put(drafts.log_probs, log_p, index)
        return token, Drafts(put(drafts.tokens, token, index), log_probs, put(drafts.states, x[:, 0], index), cache)

    log_p = jax.eval_shape(lambda: sampler.choose(jnp.zeros((batch, config.vocab_size)), state.emitted))[1]
    empty = Drafts(
        tokens=jnp.zeros((batch, num_speculations), jnp.int32),
        log_probs=None if log_p is None else jnp.zeros((batch, num_speculations, config.vocab_size), log_p.dtype),
        states=jnp.zeros((batch, num_speculations + 1, width), weights["embed"].dtype),
        cache=state.cache,
    )
    last, drafts = state.pending, empty
    if num_speculations:
        last, drafts = jax.lax.fori_loop(0, num_speculations, draft_one, (last, drafts))
    if not keep_states:
        return drafts
    position = state.length + num_speculations
    x, cache = run_layers(weights, embed(weights, last[:, None]), drafts.cache, position, range(exit_layer), config)
    return drafts._replace(states=put(drafts.states, x[:, 0], num_speculations), cache=cache)


def _copy_or_draft(
    weights: Weights,
    state: DecodeState,
    config: ModelConfig,
    exit_layer: int,
    num_speculations: int,
    sampler: Sampler,
    copied: jax.Array,
    found: jax.Array,
) -> tuple[Drafts, jax.Array]:
    """Returns drafts for a copying round, without states, and the number of drafts of each sequence [B].

    Takes copied [B, m] where found [B]. Elsewhere the early layers draft d tokens, as in a drafting round, since the
    drafts of one sequence must not depend on the others.
    """
    batch, length = copied.shape
    width = max(length, num_speculations)

    def make(drafts):
        return draft(weights, state._replace(cache=drafts.cache), config, exit_layer, num_speculations, sampler, False)

    shapes = jax.eval_shape(make, state)._replace(cache=())
    drafts = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)._replace(cache=state.cache)
    if batch > 1 and num_speculations:
        some_missed = jnp.any(~found & ~state.done).astype(jnp.int32)
        drafts = jax.lax.fori_loop(0, some_missed, lambda _, drafts: make(drafts), drafts)

    def widen(a):
        return jnp.pad(a, ((0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)))

    tokens = jnp.where(found[:, None], widen(copied), widen(drafts.tokens))
    log_probs = drafts.log_probs
    if log_probs is not None:
        # A copied token counts as drawn from a distribution that holds nothing else.
        certain = jnp.where(tokens[..., None] == jnp.arange(config.vocab_size), 0.0, -jnp.inf)
        log_probs = jnp.where(found[:, None, None], certain, widen(log_probs))
    return drafts._replace(tokens=tokens, log_probs=log_probs), jnp.where(found, length, num_speculations)


def _commit(
    state: DecodeState,
    block: jax.Array,
    accepted: jax.Array,
    drafted: jax.Array | int,
    max_new_tokens: jax.Array,
    stop_token_ids: jax.Array,
) -> DecodeState:
    """Emits the first accepted[b] + 1 tokens of block [B, d+1], cut at the first stop token and at max_new_tokens.

    Counts as drafted and accepted only drafts whose verdict mattered, that is none past a stop token or the limit.
    """
    agreed = accepted + 1
    is_stop = _end_a_text(block, stop_token_ids)
    until_stop = jnp.where(jnp.any(is_stop, axis=1), jnp.argmax(is_stop, axis=1) + 1, block.shape[1] + 1)
    kept = jnp.minimum(jnp.minimum(agreed, until_stop), max_new_tokens - state.emitted)
    kept = jnp.where(state.done, 0, kept)
    newest = jnp.take_along_axis(block, jnp.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    active = ~state.done
    emitted = state.emitted + kept
    judged = jnp.where(active, jnp.where(kept < agreed, kept, drafted), 0)
    counted = jnp.where(active, jnp.minimum(accepted, kept), 0)
    places = jnp.arange(state.accepted_at.shape[1])
    text = state.text
    if text.shape[1]:
        text = jnp.where(state.done[:, None], text, _write_rows(text, block, state.length + 1))
    return state._replace(
        # The whole block is written. The next round overwrites entries past `emitted`, or nothing reads them.
        tokens=jnp.where(state.done[:, None], state.tokens, _write_rows(state.tokens, block, state.emitted)),
        emitted=emitted,
        length=state.length + kept,
        pending=jnp.where(active, newest, state.pending),
        done=state.done | (until_stop <= agreed) | (emitted >= max_new_tokens),
        rounds=state.rounds + active,
        round=state.round + 1,
        drafted_at=state.drafted_at + (places < judged[:, None]),
        accepted_at=state.accepted_at + (places < counted[:, None]),
        text=text,
    )


def _end_a_text(tokens: jax.Array, stop_token_ids: jax.Array) -> jax.Array:
    """Returns which tokens [B, n] are among their sequence's stop tokens."""
    return jnp.any(tokens[..., None] == stop_token_ids[..., None, :], axis=-1)


def _write_rows(rows: jax.Array, new: jax.Array, at: jax.Array) -> jax.Array:
    """Writes new [B, n] into rows [B, C], each row from at[b] on."""
    return jax.vmap(lambda row, part, start: jax.lax.dynamic_update_slice(row, part, (start,)))(rows, new, at)
