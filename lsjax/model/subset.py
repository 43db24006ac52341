"""A layer computed of the rows that it keeps alone, gathered from the batch."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsjax.scale.sharding import BATCH_AXES, batch_ways, whole_layer

SUBSET_BRANCH = "subset_branch"  # the scope of the branch that leaves rows out: compiled programs are read by it

Update = Callable[[Any, jax.Array, Any], jax.Array]  # (layer, x [b,S,D], per_row) -> f(x) [b,S,D]


def subset_update(
    update: Update, layer: Any, x: jax.Array, per_row: Any, keep: jax.Array, pieces: tuple[int, ...]
) -> jax.Array:
    """M f(x) of Eq. 1 for any mask keep [B], with compute of the rows that it drops left out.

    x [B,S,D]; update(layer, x, per_row) gives f, per_row being a tree of [B, ...] arrays that belong to the rows. Each
    device puts the rows it keeps first and runs them by pieces, of so many rows each: the first one in any case, the
    others while some device has rows left.
    """
    most = jnp.max(jnp.sum(keep.reshape(batch_ways(), -1) != 0, axis=1))
    running = most > jnp.array([0, *itertools.accumulate(pieces[:-1])])
    run = functools.partial(_run_rows, update, pieces=pieces)
    if jax.sharding.get_abstract_mesh().empty:
        return run(layer, x, per_row, keep, running)

    # By hand: left to the compiler, every piece would gather the layer's weights and reduce their gradient.
    rows, whole = P(BATCH_AXES), P()
    how = {"axis_names": set(BATCH_AXES), "check_vma": False}
    split = jax.shard_map(run, in_specs=(whole, rows, rows, rows, whole), out_specs=rows, **how)
    return split(whole_layer(layer), x, per_row, keep, running)


def _run_rows(update: Update, layer, x, per_row, keep, running, pieces: tuple[int, ...]) -> jax.Array:
    """The same of one device's rows [b, ...]; running [pieces]: whether any device needs a piece."""
    order = jnp.argsort(keep == 0, stable=True)
    place = jnp.argsort(order)
    rows = _permuted(x, order, place), *jax.tree.map(lambda a: _take(a, order), (per_row, keep))
    added = []
    # Unrolled: in a loop, what a piece keeps for the backward pass would be copied once more.
    for index, end in enumerate(itertools.accumulate(pieces)):
        piece = jax.tree.map(lambda a, part=slice(end - pieces[index], end): a[part], rows)
        added.append(_run_piece(functools.partial(update, layer), *piece, running[index] if index else None))
    return _permuted(jnp.concatenate(added), place, order)


def _run_piece(update, x: jax.Array, per_row: Any, keep: jax.Array, running: jax.Array | None) -> jax.Array:
    run = lambda: keep[:, None, None] * update(x, per_row)  # noqa: E731
    if not x.size:
        return x
    if running is None:
        return run()
    with jax.named_scope(SUBSET_BRANCH):
        return jax.lax.cond(running, run, lambda: jnp.zeros_like(x))


def _take(a: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.asarray(a).at[order].get(mode="promise_in_bounds", unique_indices=True)


# JAX's gradient of a gather is a scatter, which adds; of a permutation it is the permutation back.
@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Rows of x in `order`, whose inverse is `place`."""
    return _take(x, order)


_permuted.defvjp(
    lambda x, order, place: (_permuted(x, order, place), (order, place)),
    lambda orders, gradient: (_permuted(gradient, *orders[::-1]), None, None),
)
