"""Log-likelihoods of continuations, at the last layer or at an exit; the logits of a whole text never exist at once."""

import functools
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import Params, exit_logits, scan_layers

_SHORTEST, _CHUNK = 16, 32  # positions: of the shortest padded text, and of the logits that exist at once


class Likelihood(NamedTuple):
    """The log-likelihood of a continuation in nats, and whether greedy decoding would give exactly it."""

    log_likelihood: float
    is_greedy: bool


def continuation_likelihoods(
    params: Params,
    config: ModelConfig,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    exit_layer: int | None = None,
    batch_size: int = 8,
    exit_adapter: ExitAdapter | None = None,
) -> list[Likelihood]:
    """Returns the likelihood of every continuation after its context.

    pairs: token ids (context, continuation); a context has at least one. Of a text that is longer than the model's
      context, the last part counts.
    exit_layer: the exit that predicts; None means the last layer. batch_size: texts that are read together.
    exit_adapter: predictions of its exit go through it.

    Texts are padded to powers of two and read with texts of the same padded length, so few programs are compiled.
    """
    rows = [_row(context, continuation, config.context_length) for context, continuation in pairs]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, (tokens, _) in enumerate(rows):
        by_length[max(_SHORTEST, 1 << (len(tokens) - 2).bit_length())].append(index)
    found: dict[int, Likelihood] = {}
    adapter = exit_adapter if exit_adapter is not None and exit_adapter.exit_layer == exit_layer else None
    layers = np.arange(config.num_layers) < (config.num_layers if exit_layer is None else exit_layer)
    for length, indices in sorted(by_length.items()):
        for start in range(0, len(indices), batch_size):
            chosen = indices[start : start + batch_size]
            tokens = np.zeros((batch_size, length + 1), np.int32)
            counted = np.zeros((batch_size, length), bool)
            for place, index in enumerate(chosen):
                text, count = rows[index]
                tokens[place, : len(text)] = text
                counted[place, len(text) - 1 - count : len(text) - 1] = True
            scores = _score(params, tokens[:, :-1], tokens[:, 1:], counted, layers, config, adapter)
            sums, greedy = jax.device_get(scores)
            for place, index in enumerate(chosen):
                found[index] = Likelihood(float(sums[place]), bool(greedy[place]))
    return [found[index] for index in range(len(rows))]


def _row(context: Sequence[int], continuation: Sequence[int], context_length: int) -> tuple[list[int], int]:
    """Returns (the last tokens of a text that fit, one of which is not read; how many of them are to be predicted)."""
    text = [*context, *continuation][-(context_length + 1) :]
    return text, min(len(continuation), len(text) - 1)


@functools.partial(jax.jit, static_argnames=("config",))
def _score(
    params: Params,
    tokens: jax.Array,
    targets: jax.Array,
    counted: jax.Array,
    layers: jax.Array,
    config: ModelConfig,
    adapter: ExitAdapter | None,
) -> tuple[jax.Array, jax.Array]:
    """Returns (the sum of the log-probabilities of the counted targets, whether each is the likeliest token), both [B].

    tokens, targets, counted: [B,S]. layers: [L], 1 for the layers that run. adapter: of the exit that predicts, if any.
    """
    x, _ = scan_layers(params, tokens, config, layer_mask=layers)
    x = adapter.apply(x) if adapter else x

    def pieces(array: jax.Array) -> jax.Array:
        batch, length, *rest = array.shape
        size = min(_CHUNK, length)
        return jnp.moveaxis(array.reshape(batch, length // size, size, *rest), 1, 0)

    def read(piece: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x, targets, counted = piece
        logits = exit_logits(params, x, config)
        target_logits = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        log_probabilities = target_logits - jax.nn.logsumexp(logits, axis=-1)
        greedy = jnp.argmax(logits, axis=-1) == targets
        return jnp.sum(log_probabilities * counted, axis=1), jnp.all(greedy | ~counted, axis=1)

    sums, greedy = jax.lax.map(read, (pieces(x), pieces(jnp.asarray(targets)), pieces(jnp.asarray(counted))))
    return jnp.sum(sums, axis=0), jnp.all(greedy, axis=0)
