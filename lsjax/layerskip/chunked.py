"""Cross-entropy at several exits without ever holding the logits of more than one chunk of tokens.

The gradient of a chunk is formed right after its logits, in the forward pass: what the backward pass needs of an
exit is then one [B, S, D] array, and no logits are computed twice. (Inside the layer loop they are: there, keeping the
gradient of the head for every layer would be dearer.)
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsjax.config import ModelConfig
from lsjax.layerskip.cross_entropy import Exits, Text, charge, read_teacher
from lsjax.model.transformer import Params, final_norm, head_matrix
from lsjax.scale.sharding import BATCH_AXES, PARAMETER_AXES, constrain, width_axis

_STATES = (None, "batch", None, None)  # logical axes of states [E,B,S,D]
EXIT_BRANCH = "exit_branch"  # the scope of the branch that leaves an exit out: compiled programs are read by it


class _Static(NamedTuple):
    config: ModelConfig
    chunk: int
    z_loss: float
    head_learns: bool


def exit_losses(
    params: Params,
    states: jax.Array,
    text: Text,
    exits: Exits,
    config: ModelConfig,
    chunk: int,
    z_loss: float = 0.0,
    head_learns: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """(sum_e w(e) (CE_e + distillation(e) KL_e + z_loss (log Z_e)^2), CE_e [E]), summed over tokens; the second
    carries no gradient.

    states [E,B,S,D] after E layers. An exit that is not active costs nothing. No gradient flows through the
    teacher. Without `head_learns` the vocabulary projection has none either.
    """
    if text.teacher is not None:
        text = text._replace(teacher=jax.lax.stop_gradient(final_norm(params, text.teacher, config)))
    weights = head_matrix(params) | {"final_norm": params["final_norm"]}
    return _losses(weights, states, text, exits, _Static(config, chunk, z_loss, head_learns))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _losses(params, states, text, exits, static):
    return _run(params, states, text, exits, static, with_gradient=False)[0]


def _losses_forward(params, states, text, exits, static):
    return _run(params, states, text, exits, static, with_gradient=True)


def _losses_backward(static, gradients, cotangents):
    scale = cotangents[0]
    params, states = jax.tree.map(lambda g: (scale * g).astype(g.dtype), gradients)
    return params, states, None, None


_losses.defvjp(_losses_forward, _losses_backward)


def _run(params, states, text: Text, exits: Exits, static: _Static, with_gradient: bool):
    """((objective, CE [E]), (gradient of params, of states) or None)."""
    active = exits.active
    if active is None or active.ndim:
        return _normed_run(params, states, text, exits, static, with_gradient)
    run = lambda: _normed_run(params, states, text, exits._replace(active=None), static, with_gradient)  # noqa: E731
    nothing = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(run))  # noqa: E731
    # The branch is taken out here and not for each chunk, so that nothing at all is sent for an exit that is off.
    with jax.named_scope(EXIT_BRANCH):
        result, gradients = jax.lax.cond(active, run, nothing)
    return result, gradients and _laid_out(*gradients)


def _laid_out(of_params, of_states):
    """Gradients where their arrays lie; the compiler has gathered them at the end of a branch."""
    axes = lambda name: PARAMETER_AXES[name if name in PARAMETER_AXES else f"{name}/scale"]  # noqa: E731
    of_params = {name: jax.tree.map(lambda a, n=name: constrain(a, *axes(n)), g) for name, g in of_params.items()}
    return of_params, constrain(of_states, *_STATES)


def _normed_run(params, states, text: Text, exits: Exits, static: _Static, with_gradient: bool):
    """The exits' states through the final norm, and then judged."""
    head = head_matrix(params)

    def norm(scale, x):
        return constrain(final_norm({"final_norm": scale}, constrain(x, *_STATES), static.config), *_STATES)

    if not with_gradient:
        normed = norm(params["final_norm"], states)
        return _mesh_run(head, normed, text, exits, static, with_gradient)
    normed, gradient_of_norm = jax.vjp(norm, params["final_norm"], states)
    result, (of_head, of_normed) = _mesh_run(head, normed, text, exits, static, with_gradient)
    of_scale, of_states = gradient_of_norm(of_normed)
    # A head that does not learn has no gradient array at all, not one of zeros.
    return result, ((of_head or dict.fromkeys(head)) | {"final_norm": of_scale}, of_states)


def _mesh_run(head, states, text: Text, exits: Exits, static: _Static, with_gradient: bool):
    """((objective, CE [E]), (gradient of head, of states)), each device judging its own rows. States are normed."""
    run = functools.partial(_run_rows, static=static, with_gradient=with_gradient)
    if jax.sharding.get_abstract_mesh().empty:
        return run(head, states, text, exits)

    # By hand, with a head that is whole along D: what the compiler would make of the sum over chunks and exits is a
    # reduction over the devices for each of them; here it is one.
    def mine(head, states, text, exits):
        whole = {name: jax.lax.all_gather(a, "fsdp", axis=width_axis(name), tiled=True) for name, a in head.items()}
        result, gradients = run(whole, states, text, exits)
        result = jax.lax.psum(result, BATCH_AXES)
        if gradients is None or gradients[0] is None:
            return result, gradients
        of_head = {
            name: jax.lax.psum(jax.lax.psum_scatter(a, "fsdp", scatter_dimension=width_axis(name), tiled=True), "data")
            for name, a in gradients[0].items()
        }
        return result, (of_head, gradients[1])

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
    )(head, states, text, exits)


def _run_rows(head, states, text: Text, exits: Exits, static: _Static, with_gradient: bool):
    """The same of one device's rows: chunk by chunk, in each exit by exit."""
    _, chunk, z_loss, head_learns = static

    def chunk_losses(head_sum, piece):
        states, text = piece
        judged = {"text": text, "teacher": read_teacher(head, text), "z_loss": z_loss}
        charged = functools.partial(charge, head, **judged, with_gradient=with_gradient, head_learns=head_learns)
        one_exit = functools.partial(_one_exit, charged, with_gradient)
        return jax.lax.scan(one_exit, head_sum, (states, exits))

    states_pieces, text_pieces = split_tokens((jnp.moveaxis(states, 0, 2), text), chunk)
    pieces = (jnp.moveaxis(states_pieces, 3, 1), text_pieces)  # [pieces, E, B, s, D], and text [pieces, B, s]
    head_sum = None
    if with_gradient and head_learns:
        head_sum = jax.tree.map(lambda a: jnp.zeros(a.shape, jnp.float32), head)
    head_sum, (values, losses, of_states) = jax.lax.scan(chunk_losses, head_sum, pieces)
    result = jnp.sum(values), jnp.sum(losses, axis=0)
    if not with_gradient:
        return result, None
    of_head = head_sum and jax.tree.map(lambda a, s: s.astype(a.dtype), head, head_sum)
    return result, (of_head, jnp.moveaxis(of_states, 0, 2).reshape(states.shape))


def _one_exit(charged, with_gradient: bool, head_sum, exit_):
    """Adds an active exit's gradient to head_sum (None: not wanted); gives (objective, CE, gradient of its states)."""
    x, charges = exit_

    def run(head_sum):
        objective, cross_entropy, of_head, of_states = charged(x, charges)
        if head_sum is not None:
            head_sum = jax.tree.map(jnp.add, head_sum, of_head)
        return head_sum, (objective, cross_entropy, of_states.astype(x.dtype) if with_gradient else None)

    def skip(head_sum):
        zero = jnp.float32(0.0)
        return head_sum, (zero, zero, jnp.zeros_like(x) if with_gradient else None)

    if charges.active is None:
        return run(head_sum)
    with jax.named_scope(EXIT_BRANCH):
        return jax.lax.cond(charges.active, run, skip, head_sum)


def split_tokens(arrays, chunk: int):
    """A tree of [B, S, ...] -> [pieces, B, S/pieces, ...], each piece at most `chunk` tokens if it can be.

    Only the sequence axis is cut, into equal parts: a sharded batch axis stays where it is.
    """
    batch, length = jax.tree.leaves(arrays)[0].shape[:2]
    wanted = min(length, -(-batch * length // chunk))
    pieces = next(n for n in range(wanted, length + 1) if length % n == 0)
    return jax.tree.map(lambda a: a.reshape(batch, pieces, -1, *a.shape[2:]).swapaxes(0, 1), arrays)
