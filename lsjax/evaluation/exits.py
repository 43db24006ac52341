"""How well every exit predicts text it has not seen."""

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
from lsjax.model.transformer import Params, exit_logits, head_matrix, scan_layers
from lsjax.scale.sharding import batch_ways, constrain, whole_along_width


class ExitProfile(NamedTuple):
    """Arrays [n], an entry each of `exit_layers`, over held-out tokens: cross-entropy in nats a token, share of next
    tokens predicted, and share of greedy predictions equal to the last layer's (what drafting needs)."""

    exit_layers: np.ndarray
    loss: np.ndarray
    accuracy: np.ndarray
    agreement: np.ndarray

    def at(self, exit_layer: int) -> tuple[float, float, float]:
        """(loss, accuracy, agreement) of one exit."""
        index = int(np.flatnonzero(self.exit_layers == exit_layer)[0])
        return float(self.loss[index]), float(self.accuracy[index]), float(self.agreement[index])


def evaluated_exits(num_layers: int, stride: int) -> tuple[int, ...]:
    """The exit layers that are multiples of `stride`, and the last one: reading an exit costs as much as layers do."""
    return tuple(sorted({*range(stride, num_layers + 1, stride), num_layers}))


def exit_profile(
    params: Params,
    batches: Iterable[Batch],
    config: ModelConfig,
    stride: int = 1,
    execution: Execution | None = None,
) -> ExitProfile:
    """Means over all the batches' learned tokens, at every `stride`-th exit and the last. execution: number type and
    attention, as in training (None: those of the parameters, and plain); products are never rounded."""
    exits = evaluated_exits(config.num_layers, stride)
    totals = [evaluate_batch(params, batch, config, exits, execution) for batch in batches]
    loss, right, agree, tokens = (np.sum([np.asarray(t[i], np.float64) for t in totals], axis=0) for i in range(4))
    return ExitProfile(np.array(exits), loss / tokens, right / tokens, agree / tokens)


@functools.partial(jax.jit, static_argnames=("config", "exit_layers", "execution", "chunk"))
def evaluate_batch(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    exit_layers: tuple[int, ...],
    execution: Execution | None = None,
    chunk: int = 1024,
):
    """Sums over one batch, an entry each of exit_layers (the last layer among them): loss, right, agree, and the
    number of tokens. Logits exist for `chunk` tokens of a device at a time."""
    if execution:
        params = jax.tree.map(lambda a: a.astype(execution.compute_dtype), params)
    params = params | {name: constrain(a, *whole_along_width(name)) for name, a in head_matrix(params).items()}
    chunk *= batch_ways()
    targets, weights = split_tokens((batch.targets, batch.weights), chunk)

    def read_chunk(x, targets, weights):
        logits = exit_logits(params, x, config)
        predicted = jnp.argmax(logits, axis=-1)
        target_logit = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        loss = jnp.sum((jax.nn.logsumexp(logits, axis=-1) - target_logit) * weights)
        return loss, jnp.sum((predicted == targets) * weights), predicted

    def read_exit(x):
        loss, right, predicted = jax.lax.map(
            lambda piece: read_chunk(*piece), (split_tokens(x, chunk), targets, weights)
        )
        return jnp.sum(loss), jnp.sum(right), predicted

    def read(x, wanted):
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(read_exit, x))
        return jax.lax.cond(wanted, read_exit, lambda _: nothing, x)

    wanted = np.isin(np.arange(config.num_layers), exit_layers)  # layer l reads the state of exit_layer l
    x, early = scan_layers(
        params,
        batch.tokens,
        config,
        positions=batch.positions,
        segment_ids=batch.segment_ids,
        attention=execution.attention.attend if execution else plain_attention,
        per_layer=wanted,
        read=read,
    )
    index = np.array(exit_layers[:-1], int)
    loss, right, predicted = jax.tree.map(lambda a, last: jnp.append(a[index], last[None], axis=0), early, read_exit(x))
    agree = jnp.sum((predicted == predicted[-1]) * weights, axis=(1, 2, 3))
    # Whole on every device, so that every host can read them.
    return tuple(constrain(total) for total in (loss, right, agree, jnp.sum(weights)))
