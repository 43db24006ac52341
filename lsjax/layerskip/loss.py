"""The training loss of a batch: J of Eq. 5, over every exit that is on and the last layer.

`multi_exit_loss` runs the layers, picks the states that the exits read, and hands them to chunked.py. Without a teacher
each exit's loss is computed inside the layer scan; with one, after all layers.
"""

import functools
from typing import Unpack

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.data.batch import Batch
from lsjax.layerskip.chunked import exit_losses
from lsjax.layerskip.cross_entropy import Exits, Targets
from lsjax.model.transformer import LayerOptions, Params, scan_layers


def multi_exit_loss(
    params: Params,
    batch: Batch[jax.Array],
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
    **layers: Unpack[LayerOptions],
) -> tuple[jax.Array, jax.Array]:
    """Computes J of Eq. 5 and each exit's cross-entropy CE_l [L], summed over tokens with batch.weights.

    J = sum_l w(l) (CE_l + distillation(l) KL_l + z_loss (log Z_l)^2). Entry l of an [L] array belongs to the state
    after layer l. The arrays are data, so a curriculum never recompiles.

    exit_active: bool [L]; an inactive exit costs nothing (`lax.cond`). None: a program without early exits.
    distillation: [L] or a scalar; keeps all layers' states until the last one is known. None: no teacher.
    token_stride, token_offset: early exits read every stride-th token from the offset on, with stride times its weight.
    exits_train_head: whether early exits train the shared norm and head; the last layer always does.
    head_learns: whether anything trains the head.
    loss_chunk: tokens whose logits exist at once.
    layers: how the layers run, see `scan_layers`.
    """
    exit_weights = jnp.asarray(exit_weights)
    sample = functools.partial(every, stride=token_stride, offset=token_offset)
    losses = functools.partial(exit_losses, config=config, chunk=loss_chunk, z_loss=z_loss)
    early_params = params if exits_train_head else jax.lax.stop_gradient(params)
    early_targets = Targets(sample(batch.targets), token_stride * sample(batch.weights))

    def early(states, exits, teacher=None):
        targets = early_targets._replace(teacher=teacher)
        return losses(early_params, states, targets, exits, head_learns=head_learns and exits_train_head)

    run_layers = functools.partial(scan_layers, params, batch.tokens, config, **layers)
    run_layers = functools.partial(run_layers, positions=batch.positions, segment_ids=batch.segment_ids)
    x, objective, early_losses = _early_exits(run_layers, early, sample, exit_weights, exit_active, distillation)
    last_exit, last_targets = Exits(exit_weights[-1:]), Targets(batch.targets, batch.weights)
    last_objective, last_loss = losses(params, x[None], last_targets, last_exit, head_learns=head_learns)
    return objective + last_objective, jax.lax.stop_gradient(early_losses.at[-1].set(last_loss[0]))


def _early_exits(run_layers, early, sample, exit_weights, exit_active, distillation):
    """Runs the layers and the early exits. Returns (x_L, objective, CE [L]), with 0 for the last layer.

    run_layers: `scan_layers` of the batch. early: `exit_losses` of early exits. sample: picks the tokens they read.
    """
    if exit_active is None:
        return run_layers()[0], 0.0, jnp.zeros_like(exit_weights)
    exits = Exits(exit_weights, jnp.asarray(exit_active).at[-1].set(False))
    if distillation is None:
        return _inside_the_layers(run_layers, early, sample, exits)
    exits = exits._replace(distillation=jnp.broadcast_to(distillation, exit_weights.shape))
    return _after_the_layers(run_layers, early, sample, exits)


def _inside_the_layers(run_layers, early, sample, exits: Exits):
    """Computes each exit's loss inside the layer scan; results as in `_early_exits`."""

    # Checkpointed, because the gradients of the head, one [V,D] array per layer, would outweigh all activations.
    @jax.checkpoint
    def read(x, exit_):
        weight, active = exit_
        objective, losses = early(sample(x)[None], Exits(weight[None], active))
        return objective, losses[0]

    # The input of layer l is the state that entry l - 1 reads.
    def before(a):
        return jnp.concatenate([jnp.zeros_like(a[:1]), a[:-1]])

    x, (objectives, losses) = run_layers(per_layer=(before(exits.weight), before(exits.active)), read=read)
    return x, jnp.sum(objectives), jnp.roll(losses, -1)


def _after_the_layers(run_layers, early, sample, exits: Exits):
    """Computes all exits' losses after the last layer, which is their teacher; results as in `_early_exits`."""
    x, states = run_layers(read=lambda x, _: sample(x))
    teacher = jax.lax.stop_gradient(sample(x))
    states = jnp.concatenate([states[1:], teacher[None]])  # the last exit is off here, so its entry is not used
    objective, losses = early(states, exits, teacher)
    return x, objective, losses


def every(x: jax.Array, stride: int, offset: jax.Array | int) -> jax.Array:
    """Takes the positions offset, offset + stride, ... of an array [B,S,...]."""
    if stride == 1:
        return x
    split = x.reshape(x.shape[0], -1, stride, *x.shape[2:])
    return jax.lax.dynamic_index_in_dim(split, offset, axis=2, keepdims=False)
