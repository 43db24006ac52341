"""J of Eq. 5: the loss of every exit that is on, and of the last layer."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.layerskip.chunked import exit_losses
from lsjax.layerskip.cross_entropy import Exits, Text
from lsjax.model.transformer import Params, scan_layers


def multi_exit_loss(
    params: Params,
    batch: Batch,
    config: ModelConfig,
    *,
    exit_weights: jax.Array,
    exit_active: jax.Array | None,
    distillation: jax.Array | float | None = None,
    z_loss: float = 0.0,
    token_stride: int = 1,
    token_offset: jax.Array | int = 0,
    exits_train_head: bool = True,
    head_learns: bool = True,
    loss_chunk: int = 1024,
    **layers: Any,
) -> tuple[jax.Array, jax.Array]:
    """J of Eq. 5, summed over tokens: (sum_l w(l) (CE_l + distillation(l) KL_l + z_loss (log Z_l)^2), CE_l [L]),
    over batch.weights.

    exit_weights, exit_active and distillation [L] are data: a curriculum never recompiles, and an inactive exit costs
    nothing (`lax.cond`); with exit_active None the program has no early exit at all, with distillation None no teacher.
    Index l reads the state after layer l; the last layer always counts. Early exits look at every `token_stride`-th
    token, from `token_offset` on, each for so many. Unless `exits_train_head`, only the last layer pulls on the shared
    norm and head; unless `head_learns`, nothing does on the head. With distillation the states of all layers are kept
    until the last one is known; without, each exit's loss is taken inside the layer scan.
    `layers`: how the layers run, for `scan_layers` (layer_mask, pieces, attention, rematerialize, unroll).
    """
    exit_weights = jnp.asarray(exit_weights)
    sample = functools.partial(_every, stride=token_stride, offset=token_offset)
    losses = functools.partial(exit_losses, config=config, chunk=loss_chunk, z_loss=z_loss)
    early_params = params if exits_train_head else jax.lax.stop_gradient(params)
    text = Text(sample(batch.targets), token_stride * sample(batch.weights))
    early = functools.partial(losses, text=text, head_learns=head_learns and exits_train_head)
    layers |= {"positions": batch.positions, "segment_ids": batch.segment_ids}
    run_layers = functools.partial(scan_layers, params, batch.tokens, config, **layers)
    if exit_active is None:
        x, objective, early_losses = run_layers()[0], 0.0, jnp.zeros_like(exit_weights)
    else:
        exits = Exits(exit_weights, jnp.asarray(exit_active).at[-1].set(False))
        early_exits = _inside_the_layers
        if distillation is not None:
            exits = exits._replace(distillation=jnp.broadcast_to(distillation, exit_weights.shape))
            early_exits = _after_the_layers
        x, objective, early_losses = early_exits(run_layers, early, early_params, sample, exits)
    last = x[None], Text(batch.targets, batch.weights), Exits(exit_weights[-1:])
    last_objective, last_loss = losses(params, *last, head_learns=head_learns)
    return objective + last_objective, jax.lax.stop_gradient(early_losses.at[-1].set(last_loss[0]))


def _inside_the_layers(run_layers, early, params, sample, exits: Exits):
    """(x_L, objective, CE [L]), each exit's taken in the layer scan."""

    # Checkpointed: kept for every layer, the gradients of the head, [V, D] each, would be more than all activations.
    @jax.checkpoint
    def read(x, exit_):
        weight, active = exit_
        objective, losses = early(params, sample(x)[None], exits=Exits(weight[None], active))
        return objective, losses[0]

    # What layer l reads is the state of exit l - 1.
    before = lambda a: jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])  # noqa: E731
    x, (objectives, losses) = run_layers(per_layer=(before(exits.weight), before(exits.active)), read=read)
    return x, jnp.sum(objectives), jnp.roll(losses, -1)


def _after_the_layers(run_layers, early, params, sample, exits: Exits):
    """(x_L, objective, CE [L]) with the last layer's state as teacher of the others, all kept until it is known."""
    x, states = run_layers(read=lambda x, _: sample(x))
    teacher = jax.lax.stop_gradient(sample(x))
    states = jnp.concatenate([states[1:], teacher[None]])  # the last one is not judged here
    text = early.keywords["text"]._replace(teacher=teacher)
    return x, *early(params, states, text=text, exits=exits)


def _every(x: jax.Array, stride: int, offset: jax.Array | int) -> jax.Array:
    """Positions offset, offset + stride, ... of [B, S, ...]."""
    if stride == 1:
        return x
    split = x.reshape(x.shape[0], -1, stride, *x.shape[2:])
    return jax.lax.dynamic_index_in_dim(split, offset, axis=2, keepdims=False)
