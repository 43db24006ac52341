"""The loss of given states at several exits, with the logits of only one chunk of tokens in memory at a time.

loss.py calls `exit_losses` and says which states and weights; cross_entropy.py has the formulas for one exit and one
chunk. This module loops over chunks and exits, splits the work over the mesh, and defines the gradient.

The gradient of a chunk is computed in the forward pass, right after its logits. The backward pass then needs one
[B,S,D] array per exit, and no logits are computed twice. (loss.py checkpoints the exits inside the layer loop, so there
they are computed twice: keeping a gradient of the head for every layer would cost more.)
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsjax.config import ModelConfig
from lsjax.layerskip.cross_entropy import Exits, Targets, exit_loss, read_teacher
from lsjax.model.transformer import Params, final_norm, head_matrix
from lsjax.parallel.sharding import BATCH_AXES, PARAMETER_AXES, constrain, width_axis

_STATES = (None, "batch", None, None)  # logical axes of states [E,B,S,D]
# The named scope of the branch that leaves an exit out. lsjax/aot finds the branch by it in compiled programs.
EXIT_BRANCH = "exit_branch"


class _Static(NamedTuple):
    """The arguments of `exit_losses` that are not arrays; hashable, for `jax.custom_vjp`."""

    config: ModelConfig
    chunk: int
    z_loss: float
    head_learns: bool
    learns_text: bool


def exit_losses(
    params: Params,
    states: jax.Array,
    targets: Targets,
    exits: Exits,
    config: ModelConfig,
    chunk: int,
    z_loss: float = 0.0,
    head_learns: bool = True,
    learns_text: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Computes the weighted loss of E exits and the cross-entropy of each, summed over tokens.

    states: [E,B,S,D], the hidden states that the E exits read, before the final norm.
    targets: next tokens, token weights and optionally a teacher's states; no gradient flows through the teacher.
    exits: [E] arrays with the weight w(e) of each exit and whether it is active; an inactive exit costs nothing.
    chunk: tokens whose logits exist at once.
    head_learns: whether the vocabulary projection gets a gradient.
    learns_text: False leaves CE_e out of the sum below, for exits that learn from the teacher alone.

    Returns sum_e w(e) (CE_e + distillation(e) KL_e + z_loss (log Z_e)^2), and CE_e [E] without a gradient. With
    learns_text=False, the teacher's CE follows those of the exits: [E+1].
    """
    if targets.teacher is not None:
        targets = targets._replace(teacher=jax.lax.stop_gradient(final_norm(params, targets.teacher, config)))
    weights = head_matrix(params) | {"final_norm": params["final_norm"]}
    return _losses(weights, states, targets, exits, _Static(config, chunk, z_loss, head_learns, learns_text))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(params, states, targets, exits, static):
    return _run(params, states, targets, exits, static, with_gradient=False)[0]


def _losses_forward(params, states, targets, exits, static):
    return _run(params, states, targets, exits, static, with_gradient=True)


def _losses_backward(static, gradients, cotangents):
    scale = cotangents[0]
    params, states = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return params, states, None, None


_losses.defvjp(_losses_forward, _losses_backward)


def _run(params, states, targets: Targets, exits: Exits, static: _Static, with_gradient: bool):
    """Returns (objective, CE [E]) and the gradients of params and states (None unless `with_gradient`)."""
    active = exits.active
    if active is None or active.ndim:
        return _normed_run(params, states, targets, exits, static, with_gradient)

    def run():
        return _normed_run(params, states, targets, exits._replace(active=None), static, with_gradient)

    def skip():
        return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run))

    # The branch stands here, outside the loop over chunks, so that devices exchange nothing for an exit that is off.
    with jax.named_scope(EXIT_BRANCH):
        result, gradients = jax.lax.cond(active, run, skip)
    return result, gradients and _constrain_gradients(gradients)


def _constrain_gradients(gradients):
    """Splits gradients as their arrays are split; otherwise the compiler gathers them at the end of the branch."""
    params_gradient, states_gradient = gradients

    def constrain_parameter(name, gradient):
        axes = PARAMETER_AXES[name if name in PARAMETER_AXES else f"{name}/scale"]
        return jax.tree.map(lambda a: constrain(a, *axes), gradient)

    params_gradient = {name: constrain_parameter(name, gradient) for name, gradient in params_gradient.items()}
    return params_gradient, constrain(states_gradient, *_STATES)


def _normed_run(params, states, targets: Targets, exits: Exits, static: _Static, with_gradient: bool):
    """Applies the final norm to the exits' states and computes their loss; results as in `_run`."""
    head = head_matrix(params)

    def norm(scale, x):
        return constrain(final_norm({"final_norm": scale}, constrain(x, *_STATES), static.config), *_STATES)

    if not with_gradient:
        normed = norm(params["final_norm"], states)
        return _mesh_run(head, normed, targets, exits, static, with_gradient)
    normed, norm_vjp = jax.vjp(norm, params["final_norm"], states)
    result, gradients = _mesh_run(head, normed, targets, exits, static, with_gradient)
    assert gradients is not None
    head_gradient, normed_gradient = gradients
    scale_gradient, states_gradient = norm_vjp(normed_gradient)
    # A head that does not learn has no gradient array at all, not an array of zeros.
    return result, ((head_gradient or dict.fromkeys(head)) | {"final_norm": scale_gradient}, states_gradient)


def _mesh_run(head, states, targets: Targets, exits: Exits, static: _Static, with_gradient: bool):
    """Computes the loss of normed states, each device for its own sequences.

    Returns (objective, CE [E]) and the gradients of head and states (None unless `with_gradient`).
    """
    run = functools.partial(_run_rows, static=static, with_gradient=with_gradient)
    if jax.sharding.get_abstract_mesh().empty:
        return run(head, states, targets, exits)

    # shard_map, with the head gathered along D, reduces over the devices once. The compiler would reduce once for every
    # chunk and exit.
    def mine(head, states, targets, exits):
        whole = {name: jax.lax.all_gather(a, "fsdp", axis=width_axis(name), tiled=True) for name, a in head.items()}
        result, gradients = run(whole, states, targets, exits)
        result = jax.lax.psum(result, BATCH_AXES)
        if gradients is None or gradients[0] is None:
            return result, gradients
        head_gradient = {
            name: jax.lax.psum(jax.lax.psum_scatter(a, "fsdp", scatter_dimension=width_axis(name), tiled=True), "data")
            for name, a in gradients[0].items()
        }
        return result, (head_gradient, gradients[1])

    head_specs = {name: P(*["fsdp" if axis == width_axis(name) else None for axis in range(2)]) for name in head}
    rows, states_spec = P(BATCH_AXES), P(None, BATCH_AXES)
    learns = with_gradient and static.head_learns
    gradient_specs = ((head_specs if learns else None), states_spec) if with_gradient else None
    return jax.shard_map(
        mine,
        in_specs=(head_specs, states_spec, rows, P()),
        out_specs=(P(), gradient_specs),
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )(head, states, targets, exits)


def _run_rows(head, states, targets: Targets, exits: Exits, static: _Static, with_gradient: bool):
    """Does the work of `_mesh_run` for the sequences of one device: chunk by chunk, and in a chunk exit by exit."""

    def chunk_losses(head_sum, piece):
        states, targets = piece
        teacher = read_teacher(head, targets)
        loss_of = functools.partial(
            exit_loss,
            head,
            targets=targets,
            teacher=teacher,
            z_loss=static.z_loss,
            with_gradient=with_gradient,
            head_learns=static.head_learns,
            learns_text=static.learns_text,
        )
        one_exit = functools.partial(_one_exit, loss_of, with_gradient)
        head_sum, (values, losses, gradients) = jax.lax.scan(one_exit, head_sum, (states, exits))
        if teacher is not None and not static.learns_text:
            losses = jnp.append(losses, teacher.cross_entropy)
        return head_sum, (values, losses, gradients)

    state_pieces, target_pieces = split_tokens((jnp.moveaxis(states, 0, 2), targets), static.chunk)
    pieces = (jnp.moveaxis(state_pieces, 3, 1), target_pieces)  # [pieces,E,B,s,D] and targets [pieces,B,s]
    head_sum = None
    if with_gradient and static.head_learns:
        head_sum = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
    head_sum, (values, losses, states_gradient) = jax.lax.scan(chunk_losses, head_sum, pieces)
    result = jnp.sum(values), jnp.sum(losses, axis=0)
    if states_gradient is None:
        return result, None
    head_gradient = head_sum and jax.tree.map(lambda a, s: s.astype(a.dtype), head, head_sum)
    return result, (head_gradient, jnp.moveaxis(states_gradient, 0, 2).reshape(states.shape))


def _one_exit(loss_of, with_gradient: bool, head_sum, state_and_exit):
    """Computes the loss of one exit in one chunk, unless the exit is inactive.

    Returns head_sum plus the gradient of the head (None if not wanted), and (objective, CE, gradient of the states).
    """
    x, exit_ = state_and_exit

    def run(head_sum):
        objective, cross_entropy, head_gradient, states_gradient = loss_of(x, exit_)
        if head_sum is not None:
            head_sum = jax.tree.map(jnp.add, head_sum, head_gradient)
        return head_sum, (objective, cross_entropy, states_gradient.astype(x.dtype) if with_gradient else None)

    def skip(head_sum):
        zero = jnp.float32(0.0)
        return head_sum, (zero, zero, jnp.zeros_like(x) if with_gradient else None)

    if exit_.active is None:
        return run(head_sum)
    with jax.named_scope(EXIT_BRANCH):
        return jax.lax.cond(exit_.active, run, skip, head_sum)


def split_tokens(arrays: Any, chunk: int) -> Any:
    """Cuts a tree of [B,S,...] arrays into pieces [pieces,B,S/pieces,...] of at most `chunk` tokens if possible.

    Only the sequence axis is cut, into equal parts, so a sharded batch axis stays where it is.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    wanted = min(length, -(-batch * length // chunk))
    pieces = next(n for n in range(wanted, length + 1) if length % n == 0)
    return jax.tree.map(lambda a: a.reshape(batch, pieces, -1, *a.shape[2:]).swapaxes(0, 1), arrays)
