"""Which exits are trained at a step, and how much each counts (Eq. 5-6).

Entry l of every [L] array here belongs to the loss of x_{l+1}, the state after layer l, which is exit_layer l + 1.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import LayerSkipConfig
from lsjax.errors import UserError
from lsjax.model.array_checks import as_array, check_choice, check_integer, check_number, concrete, describe

CURRICULA = ("rotational", "gradual", "all", "none")


def exit_curriculum(
    name: str, num_layers: int, step: jax.Array | int, total_steps: int, rotation: int = 1
) -> jax.Array:
    """Returns which exits are active at a step, A(t, l) of the paper: bool [L]. The last layer is always on.

    name: "rotational" turns on each l with l = t mod R, so each exit is on once in R = `rotation` steps; "gradual"
        goes from the last layer down to the first, one more every T/(2L) steps; "all"; "none" is the last layer only.
    step: t, which may be traced; total_steps: T.

    Raises UserError for an unknown name, or a number outside its range (a traced step is not checked).
    """
    check_choice("name", name, CURRICULA)
    check_integer("num_layers", num_layers, 1)
    check_integer("total_steps", total_steps, 1)
    check_integer("step", step, 0, total_steps - 1)
    check_integer("rotation", rotation, 1)
    return _curriculum(name, num_layers, step, total_steps, rotation)


def _curriculum(name: str, num_layers: int, step: jax.Array | int, total_steps: int, rotation: int) -> jax.Array:
    """Does the work of `exit_curriculum`. `step` may lie beyond the run, as in a rotation that is longer."""
    layer = jnp.arange(num_layers)
    step = jnp.asarray(step, jnp.int32)
    if name == "rotational":
        active = layer % rotation == step % rotation
    elif name == "gradual":
        # floor(2Lt/T) is computed in two parts, because 2Lt overflows 32 bits on long runs.
        per_step, rest = divmod(2 * num_layers, total_steps)
        enabled = 1 + step * per_step + _floor_of_ratio(step, rest, total_steps)
        active = layer >= num_layers - enabled
    elif name == "all":
        active = jnp.ones(num_layers, bool)
    else:
        active = jnp.zeros(num_layers, bool)
    return active.at[-1].set(True)


def _floor_of_ratio(step: jax.Array, numerator: int, denominator: int) -> jax.Array:
    """Computes floor(step * numerator / denominator) exactly, for numerator < denominator, from its few thresholds."""
    thresholds = [-(-k * denominator // numerator) for k in range(1, numerator + 1)] if numerator else []
    return jnp.sum(step >= jnp.asarray(thresholds, jnp.int32)) if thresholds else jnp.int32(0)


def active_exits(s: LayerSkipConfig, num_layers: int, step: jax.Array | int, total_steps: int) -> jax.Array:
    """Returns the exits that a recipe trains at a step: bool [L].

    These are the curriculum's exits within exit_first..exit_last, the draft exit and the last layer.
    """
    exit_layer = 1 + jnp.arange(num_layers)
    active = _curriculum(s.exit_curriculum, num_layers, step, total_steps, s.exit_rotation)
    active &= (exit_layer >= s.exit_first) & (exit_layer <= (s.exit_last or num_layers))
    return active | (exit_layer == s.draft_exit) | (exit_layer == num_layers)


def exit_distillation(s: LayerSkipConfig, num_layers: int, step: jax.Array | int, total_steps: int) -> jax.Array:
    """Returns the factor of each exit's divergence from the last layer in the loss: float32 [L].

    The schedule "linear" grows as t/(T-1), because a last layer that knows little yet is a poor teacher (PS-KD, arXiv
    2006.12000). With a draft exit, all other exits have 0.
    """
    exit_layer = 1 + jnp.arange(num_layers)
    taught = exit_layer == s.draft_exit if s.draft_exit else exit_layer < num_layers
    growth = (
        jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1) if s.exit_distillation_schedule == "linear" else 1.0
    )
    return jnp.where(taught, s.exit_distillation * growth, 0.0)


def exit_weights(num_layers: int, exit_scale: float, active: jax.Array, floor: float = 0.0) -> jax.Array:
    """Returns the weights w(t, l) of Eq. 6: float32 [L], zero where inactive, summing to 1.

    e(l) = e_scale l(l+1)/2 for l < L-1, and e(L-1) = (L-1) + e_scale (L-2)(L-1)/2. A model of one layer has
    e(0) = 0 by that formula; its only exit gets the whole weight.

    exit_scale: e_scale.
    active: bool [L], from `exit_curriculum`.
    floor: raises every e(l) to at least this share of e(L-1). It is not in the paper, where the first exits have
        almost no weight.

    Raises UserError for numbers outside their range, for `active` of another shape, and when no weight is left (the
    values of a traced `active` are not checked).
    """
    check_integer("num_layers", num_layers, 1)
    check_number("exit_scale", exit_scale, 0, 1)
    check_number("floor", floor, 0, 1)
    _check_active(active, num_layers)
    layer = jnp.arange(num_layers, dtype=jnp.float32)
    last = num_layers - 1
    scale = exit_scale * layer * (layer + 1) / 2
    scale = scale.at[last].set(max(last + exit_scale * (last - 1) * last / 2, 1.0 if last == 0 else 0.0))
    scale = jnp.where(jnp.asarray(active), jnp.maximum(scale, floor * scale[last]), 0.0)
    total = jnp.sum(scale)
    if concrete(total) == 0:
        raise UserError("active: the exits that are on weigh nothing; turn on the last layer, as every curriculum does")
    return scale / total


def _check_active(active: Any, num_layers: int) -> None:
    """Raises UserError unless `active` says on or off (bool, or 0 and 1) for every layer."""
    flags = as_array("active", active)
    if flags.shape != (num_layers,):
        raise UserError(f"active must have an entry for each of {num_layers} layers, got {describe(active)}")
    values = concrete(flags)
    if values is not None and values.dtype != bool and not np.isin(values, (0, 1)).all():
        raise UserError(f"active must be True or False for each layer, got {describe(active)}")
