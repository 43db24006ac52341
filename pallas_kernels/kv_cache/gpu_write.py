"""Writing new tokens into a KV cache in place, on GPU: one kernel for the keys and values of all rows.

Plain JAX writes in place too, by a kernel for each row. Here a program stores one entry of one head, at the position
of its row: no two programs meet, and no other entry is touched.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_cache.triton_backend import on_triton

MAX_TOKENS = 16


def write(
    k: jax.Array, v: jax.Array, new_k: jax.Array, new_v: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """k, v [B, K, C, H] with new_k, new_v [B, T, K, H] at entries positions[b] .. of row b; both are updated in place.

    A value that is not finite is stored as 0. H is a power of two. Positions past C - T are taken as C - T.
    """
    batch, tokens, heads, width = new_k.shape
    new = pl.BlockSpec((None, None, None, width), lambda token, head, row: (row, token, head, 0))
    cache = pl.BlockSpec((None, None, k.shape[2], width), lambda token, head, row: (row, head, 0, 0))
    return pl.pallas_call(
        _kernel,
        grid=(tokens, heads, batch),
        in_specs=[pl.BlockSpec((batch,), lambda *_: (0,)), new, new, cache, cache],
        out_specs=(cache, cache),
        out_shape=(jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)),
        input_output_aliases={3: 0, 4: 1},
        name="kv_write",
        **on_triton(num_warps=1),
    )(positions, new_k, new_v, k, v)


def _kernel(positions, new_k, new_v, _k, _v, k, v):
    token, row = pl.program_id(0), pl.program_id(2)
    entry = jnp.clip(positions[row], 0, k.shape[0] - pl.num_programs(0)) + token
    k[entry] = new_k[...].astype(k.dtype)
    value = new_v[...]
    v[entry] = jnp.where(jnp.isfinite(value), value, 0).astype(v.dtype)
