"""The loss of one exit on one chunk of tokens, and its gradient, from one pass over the logits.

chunked.py loops over chunks and exits and calls `exit_loss`; loss.py has the loss of a whole batch.

With e = exp(logits - max), Z = sum e and one exponential per logit, loss and gradient are computed together:
    CE = log Z + max - logit(y)                          d CE / d logits = e / Z - [y]
    KL = sum q (log q - logits) + log Z + max            d KL / d logits = e / Z - q     (q: the teacher)
    z  = (log Z + max)^2                                 d z / d logits  = 2 (log Z + max) e / Z
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.model.matmul import product_factor, sum_over_rows
from lsjax.model.transformer import Params, project_vocabulary


class Targets(NamedTuple):
    """The targets that the exits should predict: the next tokens, their weights, and optionally a teacher.

    tokens: int [B,S], the next token at each position.
    weights: float [B,S], how much each position counts in the loss.
    teacher: states [B,S,D] whose predicted distribution the exits learn from, or None.
    """

    tokens: jax.Array
    weights: jax.Array
    teacher: jax.Array | None = None


class Exits(NamedTuple):
    """How each of E exits enters the loss: arrays [E], or scalars for a single exit.

    weight: the exit's weight in the objective.
    active: bool, whether the exit is on; a scalar switches all of them together, None means all are on.
    distillation: the factor of the divergence from the teacher, added to the cross-entropy; None without a teacher.
    """

    weight: jax.Array
    active: jax.Array | None = None
    distillation: jax.Array | None = None


class Teacher(NamedTuple):
    """The teacher's distribution q, float32 [B,s,V], its negative entropy sum q log q, [B,s], and its summed CE."""

    probabilities: jax.Array
    negative_entropy: jax.Array
    cross_entropy: jax.Array


class ExitLoss(NamedTuple):
    """The loss of one exit, summed over tokens, and its gradients (float32; None unless they were asked for).

    objective: what is minimised.
    cross_entropy: the unweighted cross-entropy.
    head_gradient: also None when the head does not learn.
    states_gradient: [B,s,D].
    """

    objective: jax.Array
    cross_entropy: jax.Array
    head_gradient: Params | None = None
    states_gradient: jax.Array | None = None


def read_teacher(head: Params, targets: Targets) -> Teacher | None:
    """Computes the teacher's distribution once for all exits; None without a teacher."""
    if targets.teacher is None:
        return None
    log_probabilities = jax.nn.log_softmax(project_vocabulary(head, targets.teacher))
    probabilities = jnp.exp(log_probabilities)
    right = jnp.where(_hit(log_probabilities, targets), log_probabilities, 0.0)
    cross_entropy = -jnp.sum(jnp.sum(right, axis=-1) * targets.weights)
    return Teacher(probabilities, jnp.sum(probabilities * log_probabilities, axis=-1), cross_entropy)


def _hit(logits: jax.Array, targets: Targets) -> jax.Array:
    """Returns where the targets are among logits [B,s,V]: a mask, since a gather is not local in a split vocabulary."""
    return jnp.arange(logits.shape[-1]) == targets.tokens[..., None]


def exit_loss(
    head: Params,
    x: jax.Array,
    exit_: Exits,
    targets: Targets,
    teacher: Teacher | None,
    z_loss: float,
    with_gradient: bool,
    head_learns: bool,
    learns_text: bool = True,
) -> ExitLoss:
    """Computes weight (CE + distillation KL + z_loss z) of normed states x [B,s,D], over targets.weights [B,s].

    head: the matrix of the vocabulary projection, {lm_head [D,V]} or {embed [V,D]}.
    exit_: scalars, see Exits.
    head_learns: whether to compute the gradient of the head as well.
    learns_text: whether the objective holds the cross-entropy; without it, only the teacher is learned from.
    """
    weight, distillation = exit_.weight, None if teacher is None else exit_.distillation
    logits = project_vocabulary(head, x)
    largest = jnp.max(logits, axis=-1)
    raised = jnp.exp(logits - largest[..., None])
    normalizer = jnp.sum(raised, axis=-1)
    log_normalizer = jnp.log(normalizer) + largest
    hit = _hit(logits, targets)
    each = log_normalizer - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    cross_entropy = jnp.sum(each * targets.weights)
    if not learns_text:
        each = jnp.zeros_like(each)
    if teacher is not None and distillation is not None:
        agreement = jnp.sum(teacher.probabilities * logits, axis=-1)
        each += distillation * (teacher.negative_entropy - agreement + log_normalizer)
    if z_loss:
        each += z_loss * jnp.square(log_normalizer)
    objective = weight * jnp.sum(each * targets.weights)
    if not with_gradient:
        return ExitLoss(objective, cross_entropy)
    # d objective / d logits times Z / weight; `_gradients` multiplies by the rest.
    pull = raised
    if distillation is not None or z_loss:
        share = learns_text + (0.0 if distillation is None else distillation)
        pull = raised * (share + 2.0 * z_loss * log_normalizer)[..., None]
    if teacher is not None and distillation is not None:
        pull -= distillation * normalizer[..., None] * teacher.probabilities
    if learns_text:
        pull = jnp.where(hit, pull - normalizer[..., None], pull)
    pull = product_factor(pull.astype(x.dtype))
    scale = (weight * targets.weights / normalizer)[..., None]
    head_gradient, states_gradient = _gradients(head, x, pull, scale, head_learns)
    return ExitLoss(objective, cross_entropy, head_gradient, states_gradient)


def _gradients(
    head: Params, x: jax.Array, pull: jax.Array, scale: jax.Array, head_learns: bool
) -> tuple[Params | None, jax.Array]:
    """Returns the gradients of the head (None unless it learns) and of the states x [B,s,D], in float32.

    pull [B,s,V] times scale [B,s,1] is d objective / d logits. `scale` is multiplied into the narrow (D wide) sides of
    the two products, because one more pass over the vocabulary costs XLA:CPU a fifth of them.
    """
    ((name, matrix),) = head.items()
    axes = "dv" if name == "lm_head" else "vd"
    states_gradient = scale * jnp.einsum(
        f"bsv,{axes}->bsd", pull, product_factor(matrix), preferred_element_type=jnp.float32
    )
    if not head_learns:
        return None, states_gradient
    scaled = (scale * x).astype(x.dtype)
    if name == "lm_head":
        return {name: sum_over_rows(scaled, pull, 2, jnp.float32)}, states_gradient
    return {name: sum_over_rows(pull, scaled, 2, jnp.float32)}, states_gradient
