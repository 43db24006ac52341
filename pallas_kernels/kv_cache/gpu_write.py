"""Writing new tokens into a KV cache in place, on GPU: one kernel for the keys and values of all rows.

Plain JAX writes in place too, by a kernel for each row. Here a program stores one entry of one head, at the position
of its row: no two programs meet, and no other entry is touched. For a cache in int8 it rounds what it stores.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_cache.int8 import Int8
from pallas_kernels.kv_cache.reference import as_held, finite
from pallas_kernels.kv_cache.triton_backend import on_triton

MAX_TOKENS = 16


def write(
    k: jax.Array | Int8, v: jax.Array | Int8, new_k: jax.Array, new_v: jax.Array, positions: jax.Array
) -> tuple[jax.Array | Int8, jax.Array | Int8]:
    """k, v [B, K, C, H], in int8 with scales [B, K, C], with new_k, new_v [B, T, K, H] at entries positions[b] .. of
    row b; all are updated in place.

    A value that is not finite is stored as 0. H is a power of two. Positions past C - T are taken as C - T.
    """
    batch, tokens, heads, width = new_k.shape
    arrays = jax.tree.leaves((k, v))
    new = pl.BlockSpec((None, None, None, width), lambda token, head, row: (row, token, head, 0))
    cache = jax.tree.map(_of_one_head, (k, v))
    return pl.pallas_call(
        _kernel,
        grid=(tokens, heads, batch),
        in_specs=[pl.BlockSpec((batch,), lambda *_: (0,)), new, new, *cache],
        out_specs=cache,
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (k, v)),
        input_output_aliases={3 + index: index for index in range(len(arrays))},
        name="kv_write",
        **on_triton(num_warps=1),
    )(positions, new_k, new_v, k, v)


def _of_one_head(array: jax.Array) -> pl.BlockSpec:
    sizes = array.shape[2:]
    return pl.BlockSpec((None, None, *sizes), lambda token, head, row: (row, head, *[0] * len(sizes)))


def _kernel(positions, new_k, new_v, _k, _v, k, v):
    token, row = pl.program_id(0), pl.program_id(2)
    arrays = jax.tree.leaves((k, v))
    entry = jnp.clip(positions[row], 0, arrays[0].shape[0] - pl.num_programs(0)) + token
    parts = jax.tree.leaves((as_held(new_k[...], k), as_held(finite(new_v[...]), v)))
    for array, part in zip(arrays, parts, strict=True):
        array[entry] = part
