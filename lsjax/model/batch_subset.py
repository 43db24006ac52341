"""Layer dropout that saves compute: a layer runs only on the sequences that it keeps, gathered from the batch.

Here a row is one sequence of the batch.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lsjax.parallel.sharding import BATCH_AXES, batch_ways, whole_layer

# The named scope of the branch that leaves rows out. lsjax/aot finds the branch by it in compiled programs.
SUBSET_BRANCH = "subset_branch"

Update = Callable[[Any, jax.Array, Any], jax.Array]  # (layer, x [b,S,D], per_row) -> f(x) [b,S,D]


def subset_update(
    update: Update, layer: Any, x: jax.Array, per_row: Any, keep: jax.Array, pieces: tuple[int, ...]
) -> jax.Array:
    """Computes M f(x) of Eq. 1 without the compute of dropped rows, for any mask keep [B].

    update: update(layer, x, per_row) returns f(x).
    x: [B,S,D].
    per_row: a tree of [B, ...] arrays with the rows' own inputs.
    pieces: how many rows each piece has; together all rows of a device.

    Each device sorts the rows it keeps to the front and runs them piece by piece: always the first piece, and the
    others as long as any device has rows left.
    """
    most = jnp.max(jnp.sum(keep.reshape(batch_ways(), -1) != 0, axis=1))
    running = most > jnp.array([0, *itertools.accumulate(pieces[:-1])])
    run = functools.partial(_run_rows, update, pieces=pieces)
    if jax.sharding.get_abstract_mesh().empty:
        return run(layer, x, per_row, keep, running)

    # shard_map gathers the layer's weights once. The compiler would gather them, and reduce their gradient, per piece.
    rows, whole = P(BATCH_AXES), P()
    split = jax.shard_map(
        run,
        in_specs=(whole, rows, rows, rows, whole),
        out_specs=rows,
        axis_names=set(BATCH_AXES),
        check_vma=False,
    )
    return split(whole_layer(layer), x, per_row, keep, running)


def _run_rows(update: Update, layer, x, per_row, keep, running, pieces: tuple[int, ...]) -> jax.Array:
    """Does the work of `subset_update` for the rows [b, ...] of one device.

    running: bool [pieces], whether any device needs the piece.
    """
    order = jnp.argsort(keep == 0, stable=True)
    place = jnp.argsort(order)
    per_row, keep = jax.tree.map(lambda a: _take(a, order), (per_row, keep))
    rows = _permuted(x, order, place), per_row, keep
    added = []
    # Unrolled, because a loop would copy what each piece keeps for the backward pass once more.
    for index, end in enumerate(itertools.accumulate(pieces)):
        x_piece, per_row_piece, keep_piece = jax.tree.map(lambda a, part=slice(end - pieces[index], end): a[part], rows)
        added.append(
            _run_piece(
                functools.partial(update, layer),
                x_piece,
                per_row_piece,
                keep_piece,
                running[index] if index else None,
            )
        )
    return _permuted(jnp.concatenate(added), place, order)


def _run_piece(update, x: jax.Array, per_row: Any, keep: jax.Array, running: jax.Array | None) -> jax.Array:
    """Computes M f(x) for one piece, under a branch unless `running` is None (always)."""

    def run():
        return keep[:, None, None] * update(x, per_row)

    if not x.size:
        return x
    if running is None:
        return run()
    with jax.named_scope(SUBSET_BRANCH):
        return jax.lax.cond(running, run, lambda: jnp.zeros_like(x))


def _take(a: jax.Array, order: jax.Array) -> jax.Array:
    """Returns the rows of `a` in this order."""
    return jnp.asarray(a).at[order].get(mode="promise_in_bounds", unique_indices=True)


# JAX differentiates a gather into a scatter-add. For a permutation, the inverse permutation is enough.
@jax.custom_vjp
def _permuted(x: jax.Array, order: jax.Array, place: jax.Array) -> jax.Array:
    """Returns the rows of x in `order`; `place` is the inverse permutation."""
    return _take(x, order)


def _permuted_forward(x, order, place):
    return _permuted(x, order, place), (order, place)


def _permuted_backward(orders, gradient):
    order, place = orders
    return _permuted(gradient, place, order), None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)
