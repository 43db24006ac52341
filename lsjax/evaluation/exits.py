"""How well every exit predicts text it has not seen."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.layerskip.loss import split_tokens
from lsjax.model.transformer import Params, exit_logits, scan_layers


class ExitProfile(NamedTuple):
    """Float arrays [L], entry l for exit_layer l + 1, over held-out tokens: cross-entropy in nats a token, share
    of next tokens predicted, and share of greedy predictions equal to the last layer's (what drafting needs)."""

    loss: np.ndarray
    accuracy: np.ndarray
    agreement: np.ndarray


def exit_profile(params: Params, batches: Iterable[Batch], config: ModelConfig) -> ExitProfile:
    """Means over all the batches' learned tokens."""
    totals = [evaluate_batch(params, batch, config) for batch in batches]
    loss, right, agree, tokens = (np.sum([np.asarray(t[i], np.float64) for t in totals], axis=0) for i in range(4))
    return ExitProfile(loss / tokens, right / tokens, agree / tokens)


@functools.partial(jax.jit, static_argnames=("config", "chunk"))
def evaluate_batch(params: Params, batch: Batch, config: ModelConfig, chunk: int = 1024):
    """Sums over one batch: loss [L], right [L], agree [L], tokens []. Logits exist for `chunk` tokens at a time."""
    targets, weights = split_tokens((batch.targets, batch.weights), chunk)

    def read_chunk(x, targets, weights):
        logits = exit_logits(params, x, config)
        predicted = jnp.argmax(logits, axis=-1)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target_logit) * weights)
        return loss, jnp.sum((predicted == targets) * weights), predicted

    def read(x, _):
        loss, right, predicted = jax.lax.map(
            lambda piece: read_chunk(*piece), (split_tokens(x, chunk), targets, weights)
        )
        return jnp.sum(loss), jnp.sum(right), predicted

    _, (loss, right, predicted) = scan_layers(
        params, batch.tokens, config, positions=batch.positions, segment_ids=batch.segment_ids, read=read
    )
    agree = jnp.sum((predicted == predicted[-1]) * weights, axis=(1, 2, 3))
    return loss, right, agree, jnp.sum(weights)
