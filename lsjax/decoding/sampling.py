"""Samplers: how a token is chosen from logits and which drafts are kept, greedily or by drawing.

Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1) keeps the full model's distribution exactly,
whatever the drafter's. It keeps a draft x with probability min(1, p(x)/q(x)). It replaces the first rejected draft by a
draw from norm(max(0, p - q)). After d kept drafts it draws one more token from p.

Coupled sampling (Daliri, Musco, Suresh 2024, arXiv 2408.07978) lets draft and verifier draw with the same noise, and
emits the verifier's own draws. A draft is kept if both drew the same token. The result equals autoregressive sampling
with the same seed token for token, whatever the drafts are. A few more drafts are rejected.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# Purposes of the draws of one token. Each folds its number into the key, so that the draws are independent.
_CHOOSE, _ACCEPT, _REPLACE = 0, 1, 2


class Subset(NamedTuple):
    """The tokens that drafts choose among.

    token_ids: int32 [k], ascending, so that ties still go to the smallest id. vocab_size: V.
    """

    token_ids: jax.Array
    vocab_size: int

    def spread(self, log_probs: jax.Array) -> jax.Array:
        """Returns log-probabilities [B,k] of the subset as those of all tokens [B,V]; -inf outside the subset."""
        nothing = jnp.full((log_probs.shape[0], self.vocab_size), -jnp.inf, log_probs.dtype)
        return nothing.at[:, self.token_ids].set(log_probs, unique_indices=True, indices_are_sorted=True)


class Sampler(Protocol):
    """Chooses tokens and judges drafts.

    `index` [B] is the number of a sequence's new token, counted from 0. A draw depends on it and on the sequence's key
    alone.
    """

    def choose(
        self, logits: jax.Array, index: jax.Array, subset: Subset | None = None
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns (tokens int32 [B], log-probabilities they were drawn by [B,V]; None if greedy) from logits [B,V].

        subset: the logits are those of its tokens alone [B,k].
        """
        ...

    def verify(
        self,
        drafts: jax.Array,
        draft_log_probs: jax.Array | None,
        logits: jax.Array,
        index: jax.Array,
        counts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns (block [B,d+1], accepted [B]): the first accepted + 1 tokens of a block are the next tokens.

        drafts: [B,d]; draft_log_probs: what they were drawn by [B,d,V], None when greedy.
        logits: the full model's, after the pending token and after each draft [B,d+1,V].
        counts: the number of drafts of each sequence [B]; None means that all entries are drafts.
        """
        ...

    def acceptance(self, draft_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """Returns the chance that a draft from the first logits is kept by the second, both [...,V]: float32 [...]."""
        ...

    def take(self, rows: Sequence[int]) -> "Sampler":
        """Returns the sampler of the sequences `rows`, in that order."""
        ...


class Greedy(NamedTuple):
    """Takes the likeliest token; ties go to the smallest id."""

    def choose(self, logits, index, subset=None):
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return likeliest if subset is None else subset.token_ids[likeliest], None

    def verify(self, drafts, draft_log_probs, logits, index, counts=None):
        # Accept the longest prefix on which draft and verifier agree, plus the verifier's own next token.
        verified = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return verified, leading((drafts == verified[:, :-1]) & _are_drafts(drafts, counts))

    def acceptance(self, draft_logits, logits):
        return (jnp.argmax(draft_logits, axis=-1) == jnp.argmax(logits, axis=-1)).astype(jnp.float32)

    def take(self, rows):
        return self


class Sampled(NamedTuple):
    """Draws from the distribution that temperature, top_k and top_p leave, applied in this order.

    keys: one per sequence, uint32 [B,2]. temperature, top_k, top_p: one per sequence [B], or one for all [].
    A sequence at temperature 0 takes its likeliest token. top_k 0 and top_p 1 keep all tokens; None for both also skips
    the sorting. The values are arrays: other values do not recompile.
    """

    keys: jax.Array | np.ndarray
    temperature: jax.Array | np.float32
    top_k: jax.Array | np.int32 | None = None
    top_p: jax.Array | np.float32 | None = None

    def choose(self, logits, index, subset=None):
        log_p = filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p)
        drawn = self._draw(log_p, index, _CHOOSE)
        # Verification needs zeros outside the subset: the residual there is p itself.
        return (drawn, log_p) if subset is None else (subset.token_ids[drawn], subset.spread(log_p))

    def verify(self, drafts, draft_log_probs, logits, index, counts=None):
        p = jnp.exp(filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p))
        real, drafted = jnp.broadcast_to(_are_drafts(drafts, counts), drafts.shape), drafts.shape[1]
        q = jnp.where(real[..., None], jnp.exp(draft_log_probs), 0.0)
        p_draft, q_draft = (jnp.take_along_axis(a, drafts[..., None], axis=-1)[..., 0] for a in (p[:, :drafted], q))
        accepted = leading((self._uniform(index, drafted) * q_draft < p_draft) & real)
        # The distribution of the replacement: norm(max(0, p - q)) at a rejected draft; p itself after the last draft,
        # where q is 0.
        residual = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
        residual, p = (jnp.take_along_axis(a, accepted[:, None, None], axis=1)[:, 0] for a in (residual, p))
        # When p and q are equal up to rounding, nothing may be left: draw from p.
        residual = jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), residual, p)
        replacement = self._draw(jnp.log(residual), index + accepted, _REPLACE)
        places = jnp.arange(drafted + 1)
        padded = jnp.pad(drafts, ((0, 0), (0, 1)))
        return jnp.where(places < accepted[:, None], padded, replacement[:, None]), accepted

    def acceptance(self, draft_logits, logits):
        # A draft x is drawn with probability q(x) and kept with min(1, p(x)/q(x)).
        q, p = (
            jnp.exp(filtered_log_probabilities(a, self.temperature, self.top_k, self.top_p))
            for a in (draft_logits, logits)
        )
        return jnp.sum(jnp.minimum(p, q), axis=-1)

    def take(self, rows):
        return jax.tree.map(lambda a: a[np.array(rows)], self)

    def _draw(self, log_p, index, purpose: int) -> jax.Array:
        """Draws one token per sequence from log-probabilities [B,V]."""

        def draw(key, i, row):
            return jax.random.categorical(_key(key, i, purpose), row)

        return jax.vmap(draw)(self.keys, index, log_p).astype(jnp.int32)

    def _uniform(self, index, drafted: int) -> jax.Array:
        """Draws the numbers in [0, 1) that decide on each draft [B,d]."""

        def draw(key, i):
            return jax.random.uniform(_key(key, i, _ACCEPT))

        return jax.vmap(jax.vmap(draw, (None, 0)))(self.keys, index[:, None] + jnp.arange(drafted))


class Coupled(Sampled):
    """Draws as `Sampled` does, and keeps a draft when the full model draws the same token with the same noise.

    What it emits are the full model's own draws, which never depend on the drafts.
    """

    def choose(self, logits, index, subset=None):
        log_p = filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p)
        # The noise belongs to token ids, so a subset takes that of its ids among all.
        log_p = log_p if subset is None else subset.spread(log_p)
        return self._draw(log_p, index, _CHOOSE), None  # nothing of the drafter's distribution is needed later

    def verify(self, drafts, draft_log_probs, logits, index, counts=None):
        log_p = filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p)
        # The same key as in `choose`: the noise of a token depends on the sequence's key and the token's index alone.
        places = jnp.arange(logits.shape[1])
        drawn = jax.vmap(lambda i: self._draw(log_p[:, i], index + i, _CHOOSE), out_axes=1)(places)
        return drawn, leading((drafts == drawn[:, :-1]) & _are_drafts(drafts, counts))

    def acceptance(self, draft_logits, logits):
        """Returns Pr[argmax(log q + g) = argmax(log p + g)] = sum_i 1 / sum_j max(p_j / p_i, q_j / q_i).

        Tokens sorted by p/q make the inner sums cumulative: p_j / p_i is the larger one for all j from i on.
        """
        q, p = (
            jnp.exp(filtered_log_probabilities(a, self.temperature, self.top_k, self.top_p))
            for a in (draft_logits, logits)
        )
        order = jnp.argsort(jnp.where(q > 0, p / q, jnp.where(p > 0, jnp.inf, 0.0)), axis=-1)
        q, p = (jnp.take_along_axis(a, order, axis=-1) for a in (q, p))
        q_before = jnp.cumsum(q, axis=-1) - q
        p_from = jnp.cumsum(p[..., ::-1], axis=-1)[..., ::-1]
        both = (p > 0) & (q > 0)
        return jnp.sum(jnp.where(both, p * q / jnp.where(both, p_from * q + q_before * p, 1.0), 0.0), axis=-1)


def _key(row_key: jax.Array, index: jax.Array, purpose: int) -> jax.Array:
    """Returns the key of one draw."""
    key = jax.random.wrap_key_data(row_key, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, index), purpose)


def _are_drafts(drafts: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Returns which entries of drafts [B,d] are drafts: the first counts[b] of sequence b, or all."""
    return jnp.arange(drafts.shape[1]) < (drafts.shape[1] if counts is None else counts[:, None])


def leading(agree: jax.Array) -> jax.Array:
    """Counts the true entries of each row [B,d] before its first false one: int32 [B]."""
    return jnp.sum(jnp.cumprod(agree, axis=1), axis=1, dtype=jnp.int32)


def filtered_log_probabilities(
    logits: jax.Array,
    temperature: jax.Array | np.float32,
    top_k: jax.Array | np.int32 | None,
    top_p: jax.Array | np.float32 | None,
) -> jax.Array:
    """Returns log softmax(logits / temperature) [..., V] over the tokens that top_k and then top_p keep.

    temperature, top_k, top_p: the shape of the first axes of logits, or of none. Temperature 0 leaves the likeliest
    token alone; ties go to the smallest id.

    top_p keeps the fewest likeliest tokens that together have at least that probability. A token as likely as the last
    kept one is kept too.
    """
    temperature, top_k, top_p = (_over_last_axes(a, logits.ndim) for a in (temperature, top_k, top_p))
    greedy = temperature == 0
    log_p = _filter(logits.astype(jnp.float32) / jnp.where(greedy, 1, temperature), top_k, top_p)
    likeliest = jnp.arange(logits.shape[-1]) == jnp.argmax(logits, axis=-1, keepdims=True)
    return jnp.where(greedy, jnp.where(likeliest, 0.0, -jnp.inf), log_p)


def _over_last_axes(value: Any, ndim: int) -> Any:
    """Returns a value with axes of size 1 added at its end, so that it has `ndim` axes."""
    return None if value is None else jnp.reshape(value, jnp.shape(value) + (1,) * (ndim - jnp.ndim(value)))


def _filter(scaled: jax.Array, top_k: Any, top_p: Any) -> jax.Array:
    """Returns log softmax [..., V] over the tokens that are kept, from logits over the temperature."""
    if top_k is None:
        return jax.nn.log_softmax(scaled, axis=-1)
    assert top_p is not None  # both or neither
    size = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    least = jnp.take_along_axis(ordered, jnp.broadcast_to(last, (*ordered.shape[:-1], 1)), axis=-1)
    ordered = jnp.where(ordered < least, -jnp.inf, ordered)
    shares = jax.nn.softmax(ordered, axis=-1)
    kept = (jnp.cumsum(shares, axis=-1) - shares < top_p) | (top_p >= 1)  # sums of many shares may round up to 1
    least = jnp.maximum(least, jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True))
    return jax.nn.log_softmax(jnp.where(scaled < least, -jnp.inf, scaled), axis=-1)
