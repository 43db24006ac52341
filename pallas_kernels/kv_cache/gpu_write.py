"""Writes new tokens into a KV cache in place, on GPU: one kernel for the keys and values of the whole batch.

Plain JAX also writes in place, but with one kernel per sequence. Here each program stores one entry of one head, so no
two programs touch the same entry, and no other entry changes. For an int8 cache the program rounds what it stores.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_cache.int8 import CacheArray
from pallas_kernels.kv_cache.reference import finite, in_cache_dtype
from pallas_kernels.kv_cache.triton_backend import on_triton

MAX_TOKENS = 16


def write(
    k: CacheArray, v: CacheArray, new_k: jax.Array, new_v: jax.Array, positions: jax.Array
) -> tuple[CacheArray, CacheArray]:
    """Writes new_k, new_v [B, T, K, H] into k, v [B, K, C, H] at entries positions[b] .. of sequence b, in place.

    An int8 cache has scales [B, K, C] beside its values. H must be a power of two.
    A value that is not finite is stored as 0. A position past C - T is taken as C - T.
    """
    batch_size, tokens, heads, width = new_k.shape
    arrays = jax.tree.leaves((k, v))
    new = pl.BlockSpec((None, None, None, width), lambda token, head, row: (row, token, head, 0))
    cache = jax.tree.map(_head_block, (k, v))
    return pl.pallas_call(
        _kernel,
        grid=(tokens, heads, batch_size),
        in_specs=[pl.BlockSpec((batch_size,), lambda *_: (0,)), new, new, *cache],
        out_specs=cache,
        out_shape=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), (k, v)),
        # Each cache array, after the three inputs before it, shares its buffer with the output.
        input_output_aliases={3 + index: index for index in range(len(arrays))},
        name="kv_write",
        **on_triton(num_warps=1),
    )(positions, new_k, new_v, k, v)


def _head_block(array: jax.Array) -> pl.BlockSpec:
    """Returns the block that holds all entries of one head of one sequence."""
    sizes = array.shape[2:]
    return pl.BlockSpec((None, None, *sizes), lambda token, head, row: (row, head, *[0] * len(sizes)))


def _kernel(positions, new_k, new_v, _k, _v, k, v):
    token, row = pl.program_id(0), pl.program_id(2)
    arrays = jax.tree.leaves((k, v))
    entry = jnp.clip(positions[row], 0, arrays[0].shape[0] - pl.num_programs(0)) + token
    parts = jax.tree.leaves((in_cache_dtype(new_k[...], k), in_cache_dtype(finite(new_v[...]), v)))
    for array, part in zip(arrays, parts, strict=True):
        array[entry] = part
