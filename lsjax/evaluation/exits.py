"""How well every exit predicts held-out text: loss, accuracy, and agreement with the last layer."""

import functools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.layerskip.chunked import split_tokens
from lsjax.model.attention import plain_attention
from lsjax.model.execution import Execution
from lsjax.model.exit_adapter import ExitAdapter
from lsjax.model.transformer import Params, exit_logits, head_matrix, scan_layers
from lsjax.notebook import html_table
from lsjax.parallel.sharding import batch_ways, constrain, whole_along_width


class ExitProfile(NamedTuple):
    """The quality of n exits over held-out tokens, in arrays [n].

    exit_layers: the exit layer of each entry.
    loss: cross-entropy in nats per token.
    accuracy: share of next tokens that the greedy prediction hits.
    agreement: share of greedy predictions equal to the last layer's, which is what drafting needs.
    """

    exit_layers: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    agreement: np.ndarray

    def at(self, exit_layer: int) -> tuple[float, float, float]:
        """Returns (loss, accuracy, agreement) of one exit."""
        index = int(np.flatnonzero(self.exit_layers == exit_layer)[0])
        return float(self.loss[index]), float(self.accuracy[index]), float(self.agreement[index])

    def __repr__(self) -> str:
        losses = ", ".join(f"{layer}: {loss:.3f}" for layer, loss in zip(self.exit_layers, self.loss, strict=True))
        return f"ExitProfile(loss by exit layer: {losses})"

    def _repr_html_(self) -> str:
        """Returns the table that a notebook shows: a row per exit."""
        header = ("exit layer", "loss (nats per token)", "accuracy", "agreement with the last layer")
        return html_table(header, [tuple(row) for row in zip(*map(np.ndarray.tolist, self), strict=True)])


def evaluated_exits(num_layers: int, stride: int, exit_adapter: ExitAdapter | None = None) -> tuple[int, ...]:
    """Returns the exit layers that are multiples of `stride`, that of an adapter, and the last one.

    A stride saves time, because evaluating an exit costs as much as running layers.
    """
    adapted = {exit_adapter.exit_layer} if exit_adapter else set()
    return tuple(sorted({*range(stride, num_layers + 1, stride), num_layers} | adapted))


def exit_profile(
    params: Params,
    batches: Iterable[Batch[jax.Array] | Batch[np.ndarray]],
    config: ModelConfig,
    stride: int = 1,
    execution: Execution | None = None,
    exit_adapter: ExitAdapter | None = None,
) -> ExitProfile:
    """Evaluates every `stride`-th exit and the last one on batches of held-out text, as means per learned token.

    execution: number type and attention, as in training. None keeps the parameters' dtype and uses plain attention.
        Products are never rounded to bfloat16.
    exit_adapter: its exit is evaluated too, through it.
    """
    exits = evaluated_exits(config.num_layers, stride, exit_adapter)
    totals = [evaluate_batch(params, batch, config, exits, execution, exit_adapter=exit_adapter) for batch in batches]
    loss, right, agree, tokens = (np.sum([np.asarray(t[i], np.float64) for t in totals], axis=0) for i in range(4))
    return ExitProfile(np.array(exits), loss / tokens, right / tokens, agree / tokens)


@functools.partial(jax.jit, static_argnames=("config", "exit_layers", "execution", "chunk"))
def evaluate_batch(
    params: Params,
    batch: Batch[jax.Array],
    config: ModelConfig,
    exit_layers: tuple[int, ...],
    execution: Execution | None = None,
    chunk: int = 1024,
    exit_adapter: ExitAdapter | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Sums loss, correct predictions, agreements with the last layer and token weights over one batch.

    exit_layers: the exits to evaluate, the last layer among them; the first three results have an entry for each.
    chunk: tokens per device whose logits exist at once.
    exit_adapter: what its exit predicts goes through it.
    """
    if execution:
        params, exit_adapter = jax.tree.map(lambda a: a.astype(execution.compute_dtype), (params, exit_adapter))
    params = params | {name: constrain(a, *whole_along_width(name)) for name, a in head_matrix(params).items()}
    chunk *= batch_ways()
    targets, weights = split_tokens((batch.targets, batch.weights), chunk)

    def read_chunk(piece):
        x, targets, weights = piece
        return _score(exit_logits(params, x, config), targets, weights)

    def read_exit(x):
        loss, right, predicted = jax.lax.map(read_chunk, (split_tokens(x, chunk), targets, weights))
        return jnp.sum(loss), jnp.sum(right), predicted

    def read(x, of_layer):
        wanted, layer = of_layer
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(read_exit, x))
        return jax.lax.cond(wanted, read_exit, lambda _: nothing, _adapted(x, layer, exit_adapter))

    wanted = np.isin(np.arange(config.num_layers), exit_layers)  # the input of layer l is the state of exit_layer l
    x, early = scan_layers(
        params,
        batch.tokens,
        config,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        attention=execution.attention.attend if execution else plain_attention,
        per_layer=(wanted, np.arange(config.num_layers)),
        read=read,
    )
    index = np.array(exit_layers[:-1], int)
    loss, right, predicted = jax.tree.map(lambda a, last: jnp.append(a[index], last[None], axis=0), early, read_exit(x))
    agree = jnp.sum((predicted == predicted[-1]) * weights, axis=(1, 2, 3))
    # Replicated, so that every host can read them.
    return constrain(loss), constrain(right), constrain(agree), constrain(jnp.sum(weights))


def _adapted(x: jax.Array, exit_layer: jax.Array, exit_adapter: ExitAdapter | None) -> jax.Array:
    """Returns the states that the head reads at an exit: those of the adapter's exit go through it."""
    if exit_adapter is None:
        return x
    return jax.lax.cond(exit_layer == exit_adapter.exit_layer, exit_adapter.apply, lambda x: x, x)


def _score(logits: jax.Array, targets: jax.Array, weights: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the summed loss, the summed correct predictions, and the predictions [B,s], of logits [B,s,V]."""
    predicted = jnp.argmax(logits, axis=-1)
    target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    loss = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target_logit) * weights)
    return loss, jnp.sum((predicted == targets) * weights), predicted
