"""A layer computed of the rows that it keeps alone, gathered from the batch."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsjax.scale.sharding import BATCH_AXES, batch_ways, constrain

SUBSET_BRANCH = "subset_branch"  # the scope of the branch that leaves rows out: compiled programs are read by it


def subset_update(
    update: Callable[[jax.Array, Any], jax.Array], x: jax.Array, per_row: Any, keep: jax.Array, pieces: tuple[int, ...]
) -> jax.Array:
    """M f(x) of Eq. 1 for any mask keep [B], with compute of the rows that it drops left out.

    x [B,S,D]; update(x, per_row) gives f, per_row being a tree of [B, ...] arrays that belong to the rows. Each device
    puts the rows it keeps first and runs them by pieces, of so many rows each: the first one in any case, the others
    while some device has rows left. Unrolled: in a loop, what a piece keeps for the backward pass would be copied
    once more.
    """
    order = jnp.argsort(keep.reshape(batch_ways(), -1) == 0, axis=1, stable=True)  # [devices, b]
    place = jnp.argsort(order, axis=1)
    per_row, keep = jax.tree.map(lambda a: _by_device(_take, a, order), (per_row, keep))
    rows, ends = (_permuted(x, order, place), per_row, keep), itertools.accumulate(pieces)
    cut = (
        jax.tree.map(functools.partial(_rows_of_each, end=end, size=size), rows)
        for end, size in zip(ends, pieces, strict=True)
    )
    added = [_run_piece(update, *piece, in_any_case=index == 0) for index, piece in enumerate(cut)]
    return _permuted(_joined(added), place, order)


def _run_piece(update, x: jax.Array, per_row: Any, keep: jax.Array, in_any_case: bool) -> jax.Array:
    run = lambda: keep[:, None, None] * update(x, per_row)  # noqa: E731
    if not x.size:
        return x
    if in_any_case:
        return run()
    with jax.named_scope(SUBSET_BRANCH):
        return jax.lax.cond(jnp.any(keep != 0), run, lambda: jnp.zeros_like(x))


def _take(a: jax.Array, order: jax.Array) -> jax.Array:
    """Rows [b, ...] of one device in that order [1, b]."""
    return jnp.take(a, order[0], axis=0)


def _by_device(function: Callable, *arrays: jax.Array) -> jax.Array:
    """The function of every device's own rows."""
    if jax.sharding.get_abstract_mesh().empty:
        return function(*arrays)
    rows = P(BATCH_AXES)
    return jax.shard_map(function, in_specs=rows, out_specs=rows, axis_names=set(BATCH_AXES), check_vma=False)(*arrays)


# JAX's gradient of a gather is a scatter, which adds; of a permutation it is the permutation back.
@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Each device's rows of x [B, ...] in `order` [devices, b], whose inverse is `place`."""
    return _by_device(_take, x, order)


_permuted.defvjp(
    lambda x, order, place: (_permuted(x, order, place), (order, place)),
    lambda orders, gradient: (_permuted(gradient, *orders[::-1]), None, None),
)


def _rows_of_each(a: jax.Array, end: int, size: int) -> jax.Array:
    """[B, ...] -> [devices * size, ...]: the `size` rows of every device before its row `end`."""
    rows = a.reshape(batch_ways(), -1, *a.shape[1:])[:, end - size : end]
    return constrain(rows.reshape(-1, *a.shape[1:]), "batch", *[None] * (a.ndim - 1))


def _joined(pieces: list[jax.Array]) -> jax.Array:
    """The inverse of cutting by `_rows_of_each`."""
    rest = pieces[0].shape[1:]
    rows = jnp.concatenate([piece.reshape(batch_ways(), -1, *rest) for piece in pieces], axis=1)
    return constrain(rows.reshape(-1, *rest), "batch", *[None] * len(rest))
