"""How a token is chosen from logits, and which drafts are kept: greedily, or by sampling.

Speculative sampling (Leviathan et al. 2023, arXiv 2211.17192, Algorithm 1) leaves the full model's distribution exactly
as it is, whatever the drafter's: a draft x is kept with probability min(1, p(x)/q(x)); the first that is not is
replaced by a draw from norm(max(0, p - q)); after d kept drafts one more token is drawn from p.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

# What a row's key is folded with, beside the index of the token: the draws of one token are independent.
_CHOOSE, _ACCEPT, _REPLACE = 0, 1, 2


class Rule(Protocol):
    """`index` [B] counts a row's new tokens from 0: what is drawn for a token depends on it and the row's key alone."""

    def choose(self, logits: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """logits [B,V] -> (tokens int32 [B], log-probabilities [B,V] they were drawn by; None when greedy)."""

    def verify(
        self,
        drafts: jax.Array,
        drawn_by: jax.Array | None,
        logits: jax.Array,
        index: jax.Array,
        counts: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """drafts [B,d], drawn_by [B,d,V], the full model's logits [B,d+1,V] -> (block [B,d+1], accepted [B]): the
        first accepted + 1 tokens of a row's block are its next ones. counts [B]: a row's drafts, where not all are."""

    def acceptance(self, draft_logits: jax.Array, logits: jax.Array) -> jax.Array:
        """The chance that a draft by one [...,V] is kept by the other: float32 [...]."""

    def of_rows(self, rows: Sequence[int]) -> "Rule":
        """The rule of some of its rows, or in another order."""


class Greedy(NamedTuple):
    """The likeliest token; ties go to the smallest id."""

    def choose(self, logits, index):
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), None

    def verify(self, drafts, drawn_by, logits, index, counts=None):
        # Accept the longest prefix on which draft and verifier agree, plus the verifier's own next token.
        verified = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return verified, leading((drafts == verified[:, :-1]) & _are_drafts(drafts, counts))

    def acceptance(self, draft_logits, logits):
        return (jnp.argmax(draft_logits, axis=-1) == jnp.argmax(logits, axis=-1)).astype(jnp.float32)

    def of_rows(self, rows):
        return self


class Sampled(NamedTuple):
    """Draws from the distribution left by temperature, top_k and top_p, in this order. `keys` uint32 [B,2]; top_k 0 and
    top_p 1 leave everything; None, both of them, spares the sorting. Other values do not compile anew."""

    keys: jax.Array
    temperature: jax.Array
    top_k: jax.Array | None = None
    top_p: jax.Array | None = None

    def choose(self, logits, index):
        log_p = filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p)
        return self._draw(log_p, index, _CHOOSE), log_p

    def verify(self, drafts, drawn_by, logits, index, counts=None):
        p = jnp.exp(filtered_log_probabilities(logits, self.temperature, self.top_k, self.top_p))
        real, drafted = jnp.broadcast_to(_are_drafts(drafts, counts), drafts.shape), drafts.shape[1]
        q = jnp.where(real[..., None], jnp.exp(drawn_by), 0.0)
        of_draft = lambda a: jnp.take_along_axis(a, drafts[..., None], axis=-1)[..., 0]  # noqa: E731
        accepted = leading((self._uniform(index, drafted) * of_draft(q) < of_draft(p[:, :drafted])) & real)
        # At the first rejected draft norm(max(0, p - q)); after the last draft, where nothing was drafted, p itself.
        residual = jnp.maximum(p - jnp.pad(q, ((0, 0), (0, 1), (0, 0))), 0.0)
        residual, p = (jnp.take_along_axis(a, accepted[:, None, None], axis=1)[:, 0] for a in (residual, p))
        # Equal but for rounding, p and q may leave nothing.
        residual = jnp.where(jnp.any(residual > 0, axis=-1, keepdims=True), residual, p)
        replacement = self._draw(jnp.log(residual), index + accepted, _REPLACE)
        places = jnp.arange(drafted + 1)
        padded = jnp.pad(drafts, ((0, 0), (0, 1)))
        return jnp.where(places < accepted[:, None], padded, replacement[:, None]), accepted

    def acceptance(self, draft_logits, logits):
        # A draft x, of chance q(x), is kept with min(1, p(x)/q(x)).
        filters = self.temperature, self.top_k, self.top_p
        q, p = (jnp.exp(filtered_log_probabilities(a, *filters)) for a in (draft_logits, logits))
        return jnp.sum(jnp.minimum(p, q), axis=-1)

    def of_rows(self, rows):
        return self._replace(keys=self.keys[np.array(rows)])

    def _draw(self, log_p, index, purpose: int) -> jax.Array:
        draw = lambda key, i, row: jax.random.categorical(_key(key, i, purpose), row)  # noqa: E731
        return jax.vmap(draw)(self.keys, index, log_p).astype(jnp.int32)

    def _uniform(self, index, drafted: int) -> jax.Array:
        draw = lambda key, i: jax.random.uniform(_key(key, i, _ACCEPT))  # noqa: E731
        return jax.vmap(jax.vmap(draw, (None, 0)))(self.keys, index[:, None] + jnp.arange(drafted))


def _key(row_key: jax.Array, index: jax.Array, purpose: int) -> jax.Array:
    key = jax.random.wrap_key_data(row_key, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, index), purpose)


def _are_drafts(drafts: jax.Array, counts: jax.Array | None) -> jax.Array:
    """Which entries of drafts [B,d] are drafts: a row's first counts[b], or all."""
    return jnp.arange(drafts.shape[1]) < (drafts.shape[1] if counts is None else counts[:, None])


def leading(agree: jax.Array) -> jax.Array:
    """How many entries of each row [B,d] are true before the first that is not: int32 [B]."""
    return jnp.sum(jnp.cumprod(agree, axis=1), axis=1, dtype=jnp.int32)


def filtered_log_probabilities(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array | None, top_p: jax.Array | None
) -> jax.Array:
    """log softmax(logits / temperature) [..., V] of what is left by top_k, and then of that by top_p: the fewest
    likeliest tokens that together have at least top_p. Tokens as likely as the last one that stays, stay."""
    scaled = logits.astype(jnp.float32) / temperature
    if top_k is None:
        return jax.nn.log_softmax(scaled, axis=-1)
    size = scaled.shape[-1]
    ordered = -jnp.sort(-scaled, axis=-1)
    last = jnp.where(top_k > 0, jnp.minimum(top_k, size), size) - 1
    least = jnp.take_along_axis(ordered, jnp.broadcast_to(last, (*ordered.shape[:-1], 1)), axis=-1)
    ordered = jnp.where(ordered < least, -jnp.inf, ordered)
    shares = jax.nn.softmax(ordered, axis=-1)
    kept = (jnp.cumsum(shares, axis=-1) - shares < top_p) | (top_p >= 1)  # sums of many shares may round up to 1
    least = jnp.maximum(least, jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True))
    return jax.nn.log_softmax(jnp.where(scaled < least, -jnp.inf, scaled), axis=-1)
