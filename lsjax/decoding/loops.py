"""The decoding loops: one `lax.while_loop` each, nothing on the host inside; one predicate a round (with copies, a few
more where rounds of drafts and rounds of copies take turns).

A loop ends when every row is done, or pauses before, for its state to be looked at or for a row that is done to make
room; called again with that state and a later pause, it goes on as if it had not paused.

Invariant: `length[b]` entries of row b's cache are valid, and `pending[b]`, its newest token, is not among them
yet. A rejected draft is undone by not advancing the length.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.lookup import look_up
from lsjax.decoding.passes import DRAFT, Cache, Weights, embed, run_layers
from lsjax.decoding.rules import Greedy, Rule
from lsjax.model.transformer import exit_logits


class Pause(NamedTuple):
    """Where a loop returns before all rows are done: after `round` [] rounds in all, or with fewer than `rows` [] rows
    that are not done."""

    round: jax.Array | int = 2**31 - 1
    rows: jax.Array | int = 1


NEVER = Pause()


class Decoding(NamedTuple):
    """The state of B rows being decoded. `tokens` [B, >= limit + d] has `emitted` valid entries a row; `drafted_at` and
    `accepted_at` [B, d] count the rounds in which a row had an i-th draft, and in which it was accepted. `text` [B, C]
    is the prompt and the new tokens, length + 1 of them valid; [B, 0] where no drafts are looked up in it. `rounds` [B]
    are each row's own, `round` [] counts those of the batch."""

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
    limit: jax.Array,
    stop: jax.Array,
    room: int,
    num_speculations: int = 0,
    prompts: jax.Array | None = None,
) -> Decoding:
    """After prefill: `first` [B] is already emitted. `room`: tokens a row may write, rounds past the limit
    included. `limit` [] is max_new_tokens, `stop` [n] the ids that end a text. `prompts` [B, S]: for lookup."""
    batch = first.shape[0]
    zeros, counts = jnp.zeros(batch, jnp.int32), jnp.zeros((batch, num_speculations), jnp.int32)
    text = jnp.zeros((batch, 0), jnp.int32)
    if prompts is not None:
        text = jnp.pad(prompts, ((0, 0), (0, room))).at[jnp.arange(batch), lengths].set(first)
    return Decoding(
        cache=cache,
        tokens=jnp.zeros((batch, room), jnp.int32).at[:, 0].set(first),
        emitted=zeros + 1,
        length=lengths,
        pending=first,
        done=jnp.isin(first, stop) | (limit <= 1),
        rounds=zeros,
        drafted_at=counts,
        accepted_at=counts,
        text=text,
        round=jnp.int32(0),
    )


def replace_row(state: Decoding, row: jax.Array, new: Decoding) -> Decoding:
    """`new`, of one row, in the place of row `row` []."""

    def put(whole, part):
        return jax.lax.dynamic_update_slice_in_dim(whole, part, row, axis=0) if whole.ndim else whole

    return jax.tree.map(put, state, new)


def autoregressive_loop(
    weights: Weights,
    state: Decoding,
    limit: jax.Array,
    stop: jax.Array,
    config: ModelConfig,
    exit_layer: int,
    rule: Rule = Greedy(),  # noqa: B008 (immutable)
    pause: Pause = NEVER,
) -> Decoding:
    """One token a pass through the first `exit_layer` layers (L: the full model) until every row is done."""

    def one_token(state: Decoding) -> Decoding:
        x = embed(weights, state.pending[:, None])
        x, cache = run_layers(weights, x, state.cache, state.length, range(exit_layer), config)
        token, _ = rule.choose(exit_logits(weights, x, config)[:, 0], state.emitted)
        return _commit(state._replace(cache=cache), token[:, None], jnp.zeros_like(state.length), 0, limit, stop)

    return jax.lax.while_loop(_goes_on(pause), one_token, state)


def self_speculative_loop(
    weights: Weights,
    state: Decoding,
    limit: jax.Array,
    stop: jax.Array,
    config: ModelConfig,
    exit_layer: int,
    num_speculations: int,
    rule: Rule = Greedy(),  # noqa: B008 (immutable)
    pause: Pause = NEVER,
    lookup: int = 0,
) -> Decoding:
    """Rounds of: draft d tokens with the first E layers, verify all with the others, keep what `rule` accepts.

    A row whose newest tokens stood in its text before takes `lookup` drafts from there instead; all layers verify them.
    Emits what the full model's decoding by the same rule would (when sampling: by the same distribution), whatever
    the drafts were.
    """

    def drafting_round(state: Decoding) -> Decoding:
        own = DRAFT not in weights
        drafted = draft(weights, state, config, exit_layer, num_speculations, rule, keep_states=own)
        # Verify: the d+1 kept states through the remaining layers, in one pass over the same cache.
        x, late = drafted.states, range(exit_layer, config.num_layers)
        if not own:  # they and their cache entries are not the model's own: all layers, from the tokens on
            tokens = jnp.concatenate([state.pending[:, None], drafted.tokens], axis=1)
            x, late = embed(weights, tokens), range(config.num_layers)
        x, cache = run_layers(weights, x, drafted.cache, state.length, late, config)
        logits = exit_logits(weights, x, config)
        block, accepted = rule.verify(drafted.tokens, drafted.drawn_by, logits, state.emitted)
        return _commit(state._replace(cache=cache), block, accepted, num_speculations, limit, stop)

    def copying_round(state: Decoding, copied: jax.Array, found: jax.Array) -> Decoding:
        drafted, counts = _copy_or_draft(weights, state, config, exit_layer, num_speculations, rule, copied, found)
        x = embed(weights, jnp.concatenate([state.pending[:, None], drafted.tokens], axis=1))
        x, cache = run_layers(weights, x, drafted.cache, state.length, range(config.num_layers), config)
        logits = exit_logits(weights, x, config)
        block, accepted = rule.verify(drafted.tokens, drafted.drawn_by, logits, state.emitted, counts)
        return _commit(state._replace(cache=cache), block, accepted, counts, limit, stop)

    if lookup:
        return _take_turns(drafting_round, copying_round, state, lookup, _goes_on(pause))
    return jax.lax.while_loop(_goes_on(pause), drafting_round, state)


def _take_turns(drafting_round, copying_round, state: Decoding, lookup: int, goes_on) -> Decoding:
    """Rounds of either kind, by whether a row has something to copy."""

    def looked_up(state: Decoding) -> tuple[Decoding, jax.Array, jax.Array]:
        copied, found = look_up(state.text, state.length + 1, lookup)
        return state, copied, found & ~state.done

    def rounds(carry):
        """Those without a match up to the next, then those with one. Branches in one loop would copy the cache."""
        carry = jax.lax.while_loop(
            lambda c: goes_on(c[0]) & ~jnp.any(c[2]), lambda c: looked_up(drafting_round(c[0])), carry
        )
        return jax.lax.while_loop(
            lambda c: goes_on(c[0]) & jnp.any(c[2]), lambda c: looked_up(copying_round(*c)), carry
        )

    return jax.lax.while_loop(lambda c: goes_on(c[0]), rounds, looked_up(state))[0]


def _goes_on(pause: Pause) -> Callable[[Decoding], jax.Array]:
    return lambda state: (jnp.sum(~state.done) >= pause.rows) & (state.round < pause.round)


class Drafts(NamedTuple):
    """tokens [B,d]; drawn_by: the log-probabilities [B,d,V] they were drawn by (None: greedily); states [B,d+1,D]:
    after layer E-1 (the paper's exit query cache), of the pending token and of every draft."""

    tokens: jax.Array
    drawn_by: jax.Array | None
    states: jax.Array
    cache: Cache


def draft(
    weights: Weights,
    state: Decoding,
    config: ModelConfig,
    exit_layer: int,
    num_speculations: int,
    rule: Rule = Greedy(),  # noqa: B008 (immutable)
    keep_states: bool = True,
) -> Drafts:
    """d tokens from the first E layers, one at a time. The last draft runs through the early layers too, so that the
    others can go on from there; not without `keep_states`, where all layers verify."""
    drafter = weights | weights.get(DRAFT, {})
    batch, width = state.pending.shape[0], weights["embed"].shape[1]

    def put(whole, part, index):
        return jax.lax.dynamic_update_slice(whole, part[:, None], (0, index, *[0] * (whole.ndim - 2)))

    def draft_one(index, carry):
        token, drafts = carry
        x = embed(weights, token[:, None])
        x, cache = run_layers(drafter, x, drafts.cache, state.length + index, range(exit_layer), config)
        token, log_p = rule.choose(exit_logits(drafter, x, config)[:, 0], state.emitted + index)
        drawn_by = None if log_p is None else put(drafts.drawn_by, log_p, index)
        return token, Drafts(put(drafts.tokens, token, index), drawn_by, put(drafts.states, x[:, 0], index), cache)

    log_p = jax.eval_shape(lambda: rule.choose(jnp.zeros((batch, config.vocab_size)), state.emitted))[1]
    empty = Drafts(
        tokens=jnp.zeros((batch, num_speculations), jnp.int32),
        drawn_by=None if log_p is None else jnp.zeros((batch, num_speculations, config.vocab_size), log_p.dtype),
        states=jnp.zeros((batch, num_speculations + 1, width), weights["embed"].dtype),
        cache=state.cache,
    )
    last, drafts = state.pending, empty
    if num_speculations:
        last, drafts = jax.lax.fori_loop(0, num_speculations, draft_one, (last, drafts))
    if not keep_states:
        return drafts
    x, cache = run_layers(
        weights, embed(weights, last[:, None]), drafts.cache, state.length + num_speculations, range(exit_layer), config
    )
    return drafts._replace(states=put(drafts.states, x[:, 0], num_speculations), cache=cache)


def _copy_or_draft(
    weights, state, config, exit_layer, num_speculations, rule, copied, found
) -> tuple[Drafts, jax.Array]:
    """(drafts, how many each row has [B]): `copied` [B, m] where `found` [B], else d of the early layers, as in a round
    without copies: a row's drafts must not depend on the other rows. `states` are not kept."""
    batch, length = copied.shape
    width = max(length, num_speculations)

    def make(drafts):
        return draft(weights, state._replace(cache=drafts.cache), config, exit_layer, num_speculations, rule, False)

    shapes = jax.eval_shape(make, state)._replace(cache=())
    drafts = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)._replace(cache=state.cache)
    if batch > 1 and num_speculations:
        some_missed = jnp.any(~found & ~state.done).astype(jnp.int32)
        drafts = jax.lax.fori_loop(0, some_missed, lambda _, drafts: make(drafts), drafts)

    def widen(a):
        return jnp.pad(a, ((0, 0), (0, width - a.shape[1]), *[(0, 0)] * (a.ndim - 2)))

    tokens = jnp.where(found[:, None], widen(copied), widen(drafts.tokens))
    drawn_by = drafts.drawn_by
    if drawn_by is not None:
        # A copy is drawn from a distribution that has nothing else.
        sure = jnp.where(tokens[..., None] == jnp.arange(config.vocab_size), 0.0, -jnp.inf)
        drawn_by = jnp.where(found[:, None, None], sure, widen(drawn_by))
    return drafts._replace(tokens=tokens, drawn_by=drawn_by), jnp.where(found, length, num_speculations)


def _commit(
    state: Decoding, block: jax.Array, accepted: jax.Array, drafted: jax.Array | int, limit: jax.Array, stop: jax.Array
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
    judged = jnp.where(active, jnp.where(kept < agreed, kept, drafted), 0)
    counted = jnp.where(active, jnp.minimum(accepted, kept), 0)
    places = jnp.arange(state.accepted_at.shape[1])
    text = state.text
    if text.shape[1]:
        text = jnp.where(state.done[:, None], text, jax.vmap(write_row)(text, block, state.length + 1))
    return state._replace(
        # The whole block goes in; entries past `emitted` are overwritten by the next round or never read.
        tokens=jnp.where(state.done[:, None], state.tokens, jax.vmap(write_row)(state.tokens, block, state.emitted)),
        emitted=emitted,
        length=state.length + kept,
        pending=jnp.where(active, newest, state.pending),
        done=state.done | (until_stop <= agreed) | (emitted >= limit),
        rounds=state.rounds + active,
        round=state.round + 1,
        drafted_at=state.drafted_at + (places < judged[:, None]),
        accepted_at=state.accepted_at + (places < counted[:, None]),
        text=text,
    )
