"""What one exit is charged for a chunk of tokens, and its gradient, from one pass over the logits.

With e = exp(logits - max), Z = sum e and one exponential a logit, loss and gradient are written down together:
    CE = log Z + max - logit(y)                          d CE / d logits = e / Z - [y]
    KL = sum q (log q - logits) + log Z + max            d KL / d logits = e / Z - q     (q: the teacher)
    z  = (log Z + max)^2                                 d z / d logits  = 2 (log Z + max) e / Z
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from lsjax.model.matmul import rounded, sum_over_rows
from lsjax.model.transformer import Params, project_vocabulary


class Text(NamedTuple):
    """What the exits' states [E,B,S,D] are judged by: targets and weights [B,S], perhaps a teacher's states [B,S,D]."""

    targets: jax.Array
    weights: jax.Array
    teacher: jax.Array | None = None


class Exits(NamedTuple):
    """How each exit is charged, data all of it, [E]: its weight in the objective; whether it is on ([]: all of them
    together, None: all are); how much of its divergence from the teacher is added to its cross-entropy (None: there is
    no teacher). Of a single exit: []."""

    weight: jax.Array
    active: jax.Array | None = None
    distillation: jax.Array | None = None


class Teacher(NamedTuple):
    """q, float32 [B,s,V], and sum q log q, [B,s]."""

    probabilities: jax.Array
    negative_entropy: jax.Array


class Charge(NamedTuple):
    """Sums over the tokens: what is minimised, and the cross-entropy in it. With gradients, float32: of the head
    (None: it does not learn), of the states [B,s,D]."""

    objective: jax.Array
    cross_entropy: jax.Array
    of_head: Params | None = None
    of_states: jax.Array | None = None


def read_teacher(head: Params, text: Text) -> Teacher | None:
    if text.teacher is None:
        return None
    log_probabilities = jax.nn.log_softmax(project_vocabulary(head, text.teacher))
    probabilities = jnp.exp(log_probabilities)
    return Teacher(probabilities, jnp.sum(probabilities * log_probabilities, axis=-1))


def charge(
    head: Params,
    x: jax.Array,
    exit_: Exits,
    text: Text,
    teacher: Teacher | None,
    z_loss: float,
    with_gradient: bool,
    head_learns: bool,
) -> Charge:
    """weight (CE + distillation KL + z_loss z) of normed states x [B,s,D], over text.weights [B,s]."""
    weight, distillation = exit_.weight, None if teacher is None else exit_.distillation
    logits = project_vocabulary(head, x)
    largest = jnp.max(logits, axis=-1)
    raised = jnp.exp(logits - largest[..., None])
    normalizer = jnp.sum(raised, axis=-1)
    log_normalizer = jnp.log(normalizer) + largest
    # A masked sum, not a gather: it stays local when the vocabulary is sharded.
    hit = jnp.arange(logits.shape[-1]) == text.targets[..., None]
    each = log_normalizer - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
    cross_entropy = jnp.sum(each * text.weights)
    if distillation is not None:
        agreement = jnp.sum(teacher.probabilities * logits, axis=-1)
        each += distillation * (teacher.negative_entropy - agreement + log_normalizer)
    if z_loss:
        each += z_loss * jnp.square(log_normalizer)
    objective = weight * jnp.sum(each * text.weights)
    if not with_gradient:
        return Charge(objective, cross_entropy)

    # d / d logits times Z / weight. What differs from token to token only is multiplied to the narrow sides of the two
    # products, D wide: another pass over the vocabulary costs XLA:CPU a fifth of them.
    pull = raised
    if distillation is not None or z_loss:
        pull = (
            raised * (1.0 + (0.0 if distillation is None else distillation) + 2.0 * z_loss * log_normalizer)[..., None]
        )
    if distillation is not None:
        pull -= distillation * normalizer[..., None] * teacher.probabilities
    pull = rounded(jnp.where(hit, pull - normalizer[..., None], pull).astype(x.dtype))
    scale = (weight * text.weights / normalizer)[..., None]
    ((name, matrix),) = head.items()
    axes = "dv" if name == "lm_head" else "vd"
    of_states = scale * jnp.einsum(f"bsv,{axes}->bsd", pull, rounded(matrix), preferred_element_type=jnp.float32)
    if not head_learns:
        return Charge(objective, cross_entropy, None, of_states)
    scaled = (scale * x).astype(x.dtype)
    factors = (scaled, pull) if name == "lm_head" else (pull, scaled)
    of_head = sum_over_rows(*factors, 2, jnp.float32)
    return Charge(objective, cross_entropy, {name: of_head}, of_states)
