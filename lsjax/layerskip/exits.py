"""Which exits are trained at a step, and how much each counts (Eq. 5-6).

Index l of every [L] array here is the loss read off x_{l+1}, the state after layer l: exit_layer l + 1.
"""

import jax
import jax.numpy as jnp

from lsjax.config import LayerSkipConfig


def exit_curriculum(
    name: str, num_layers: int, step: jax.Array | int, total_steps: int, rotation: int = 1
) -> jax.Array:
    """A(t, l): which exits are active at step t: bool [L]. `step` may be traced; the last layer is always on.

    "rotational": those l with l = t mod R, so each is on once in R = `rotation` steps. "gradual": from the last
    layer down to the first, one more every T/(2L) steps. "all". "none": the last layer only.
    """
    layer = jnp.arange(num_layers)
    step = jnp.asarray(step, jnp.int32)
    if name == "rotational":
        active = layer % rotation == step % rotation
    elif name == "gradual":
        # floor(2Lt/T) in two parts, since 2Lt overflows 32 bits on long runs.
        per_step, rest = divmod(2 * num_layers, total_steps)
        enabled = 1 + step * per_step + _floor_of_ratio(step, rest, total_steps)
        active = layer >= num_layers - enabled
    elif name == "all":
        active = jnp.ones(num_layers, bool)
    elif name == "none":
        active = jnp.zeros(num_layers, bool)
    else:
        raise ValueError(f"unknown exit curriculum {name!r}")
    return active.at[-1].set(True)


def _floor_of_ratio(step: jax.Array, numerator: int, denominator: int) -> jax.Array:
    """floor(step * numerator / denominator) exactly, for numerator < denominator, from its few thresholds."""
    thresholds = [-(-k * denominator // numerator) for k in range(1, numerator + 1)] if numerator else []
    return jnp.sum(step >= jnp.asarray(thresholds, jnp.int32)) if thresholds else jnp.int32(0)


def active_exits(s: LayerSkipConfig, num_layers: int, step: jax.Array | int, total_steps: int) -> jax.Array:
    """Those of the curriculum within exit_first..exit_last, the draft exit and the last layer: bool [L]."""
    exit_layer = 1 + jnp.arange(num_layers)
    active = exit_curriculum(s.exit_curriculum, num_layers, step, total_steps, s.exit_rotation)
    active &= (exit_layer >= s.exit_first) & (exit_layer <= (s.exit_last or num_layers))
    return active | (exit_layer == s.draft_exit) | (exit_layer == num_layers)


def exit_distillation(s: LayerSkipConfig, num_layers: int, step: jax.Array | int, total_steps: int) -> jax.Array:
    """What share of its divergence from the last layer is added to each exit's cross-entropy: float32 [L]. "linear"
    grows as t/(T-1): a last layer that knows little yet is a poor teacher (PS-KD, arXiv 2006.12000). With a draft exit
    all others are 0."""
    exit_layer = 1 + jnp.arange(num_layers)
    taught = exit_layer == s.draft_exit if s.draft_exit else exit_layer < num_layers
    growth = {"constant": lambda: 1.0, "linear": lambda: jnp.asarray(step, jnp.float32) / max(total_steps - 1, 1)}
    return jnp.where(taught, s.exit_distillation * growth[s.exit_distillation_schedule](), 0.0)


def exit_weights(num_layers: int, exit_scale: float, active: jax.Array, floor: float = 0.0) -> jax.Array:
    """w(t, l) of Eq. 6: float32 [L], zero where inactive, summing to 1.

    e(l) = e_scale l(l+1)/2 for l < L-1, and e(L-1) = (L-1) + e_scale (L-2)(L-1)/2. A model of one layer has
    e(0) = 0 by that formula; its only exit gets the whole weight. Not in the paper, whose first exits weigh next to
    nothing: `floor` raises every e(l) to at least that share of e(L-1).
    """
    layer = jnp.arange(num_layers, dtype=jnp.float32)
    last = num_layers - 1
    scale = exit_scale * layer * (layer + 1) / 2
    scale = scale.at[last].set(max(last + exit_scale * (last - 1) * last / 2, 1.0 if last == 0 else 0.0))
    scale = jnp.where(active, jnp.maximum(scale, floor * scale[last]), 0.0)
    return scale / jnp.sum(scale)
