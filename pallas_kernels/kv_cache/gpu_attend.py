"""Attention of a few queries to a KV cache, on GPU: of each row its entries are read, and nothing past them.

The cache is [B, K, C, H], keys and values apart. So that a few rows keep a whole GPU busy, a row is cut into splits of
SPLIT entries, all of which are attended to at once by programs of their own (splits x KV heads x rows); a split past
the row's end costs nothing. A program goes through its split by blocks. The queries of one KV head, T tokens x G heads,
are the rows of its matmuls. Its maximum, sum and weighted values are float32 and not normalised; a second kernel
combines those of a row's splits, in their order.

Splits and blocks have fixed lengths, so a row's result does not depend, bit by bit, on the batch or on the capacity.

A cache in int8 is read as it is and converted on the way into the products; the scales of keys multiply scores, those
of values weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_cache.int8 import Int8
from pallas_kernels.kv_cache.triton_backend import on_triton, triton

MAX_TOKENS = 16
MAX_QUERIES = 128  # rows of a matmul: T x G, each filled up to a power of two
SPLIT = 256
_FEWEST_ROWS = 16  # of a matmul
_BLOCK_BYTES = 16 << 10  # of keys, and of values, in shared memory
_MASKED = -1e30


def tiles(tokens: int, group: int) -> tuple[int, int]:
    """T and G filled up to powers of two whose product is a matmul's number of rows."""
    heads = pl.next_power_of_2(group)
    return max(pl.next_power_of_2(tokens), _FEWEST_ROWS // heads), heads


def partial_bytes(entries: int, tokens: int, group: int, width: int) -> int:
    """What the splits of one KV head write and their combination reads: of each query its values, maximum and sum."""
    return 2 * pl.cdiv(entries, SPLIT) * tokens * group * (width + 2) * 4


def attend(q: jax.Array, k: jax.Array | Int8, v: jax.Array | Int8, positions: jax.Array) -> jax.Array:
    """q [B, T, K, G, H] to k, v [B, K, C, H], in int8 with scales [B, K, C], as in the reference: query t of row b sees
    the entries 0 .. positions[b] + t, and none of what lies past them is read.

    H is a power of two, T at most MAX_TOKENS, and T x G as of `tiles` at most MAX_QUERIES.
    """
    capacity = jax.tree.leaves(k)[0].shape[2]
    return _combined(_attend_to_splits(q, k, v, positions, capacity), positions, q, capacity)


def _attend_to_splits(q, k, v, positions, capacity) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of every split that holds something: weighted values [B, K, splits, T G, H], maximum and sum [B, K, splits, T G]
    in float32, T and G filled up."""
    batch, tokens, heads, group, width = q.shape
    splits, (tile_tokens, tile_heads) = pl.cdiv(capacity, SPLIT), tiles(tokens, group)
    rows = tile_tokens * tile_heads
    cache = pl.BlockSpec((None, None, capacity, width), lambda split, head, row: (row, head, 0, 0))
    if isinstance(k, Int8):
        cache = Int8(cache, pl.BlockSpec((None, None, capacity), lambda split, head, row: (row, head, 0)))
    queries = pl.BlockSpec((None, tile_tokens, None, tile_heads, width), lambda split, head, row: (row, 0, head, 0, 0))
    sums = pl.BlockSpec((None, None, None, rows), lambda split, head, row: (row, head, split, 0))
    a_sum = jax.ShapeDtypeStruct((batch, heads, splits, rows), jnp.float32)
    # As large as what is multiplied: of a cache in int8, what it is converted to.
    block = min(_BLOCK_BYTES // (width * (q if isinstance(k, Int8) else k).dtype.itemsize), SPLIT)
    return pl.pallas_call(
        functools.partial(_split_kernel, tokens=tokens, group=group, block=block, capacity=capacity),
        grid=(splits, heads, batch),
        in_specs=[pl.BlockSpec((batch,), lambda *_: (0,)), queries, cache, cache],
        out_specs=(
            pl.BlockSpec((None, None, None, rows, width), lambda split, head, row: (row, head, split, 0, 0)),
            sums,
            sums,
        ),
        out_shape=(jax.ShapeDtypeStruct((*a_sum.shape, width), jnp.float32), a_sum, a_sum),
        name="decode_attend",
        **on_triton(num_warps=4 if rows <= 32 else 8, num_stages=2),
    )(positions, q, k, v)


def _split_kernel(positions, q, k, v, mixed, highest, total, *, tokens, group, block, capacity):
    position, first = positions[pl.program_id(2)], pl.program_id(0) * SPLIT
    end = jnp.minimum(position + tokens, capacity)

    @pl.when(first < end)
    def _():
        tile_tokens, tile_heads, width = q.shape
        rows = tile_tokens * tile_heads
        asked = (jnp.arange(tile_tokens) < tokens)[:, None] & (jnp.arange(tile_heads) < group)
        query = triton.load(q, mask=asked[..., None], other=0).reshape(rows, width)
        token = jnp.arange(rows) // tile_heads

        def attend_to_block(index, sums):
            mixed, highest, total = sums
            entry = first + index * block + jnp.arange(block)
            # Past the row's end may lie anything, and 0 * NaN would leak out of it.
            (keys, key_scales), (values, value_scales) = (
                _factors(side, first + index * block, entry < end, query.dtype) for side in (k, v)
            )
            scores = _matmul(query, keys, transposed=True) * key_scales * width**-0.5
            scores = jnp.where((entry - position)[None] <= token[:, None], scores, _MASKED)
            highest_now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, kept = jnp.exp(scores - highest_now[:, None]), jnp.exp(highest - highest_now)
            mixed = mixed * kept[:, None] + _matmul((weights * value_scales).astype(values.dtype), values)
            return mixed, highest_now, total * kept + jnp.sum(weights, axis=1)

        blocks = pl.cdiv(jnp.minimum(end - first, SPLIT), block)
        sums = jax.lax.fori_loop(0, blocks, attend_to_block, _nothing_seen(rows, width))
        real = asked.reshape(rows)
        for out, value, mask in zip((mixed, highest, total), sums, (real[:, None], real, real), strict=True):
            triton.store(out, value, mask=mask)


def _factors(side, first, held: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Of a block of keys or values: (what to multiply with [block, H], what of the product makes it right [block])."""
    load = lambda a, mask: triton.load(a.at[pl.ds(first, held.shape[0])], mask=mask, other=0)  # noqa: E731
    if not isinstance(side, Int8):
        return load(side, held[:, None]), 1.0
    return load(side.values, held[:, None]).astype(dtype), load(side.scale, held)


def _nothing_seen(rows: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Weighted values, maximum and sum."""
    return jnp.zeros((rows, width), jnp.float32), jnp.full(rows, _MASKED), jnp.zeros(rows, jnp.float32)


def _combined(partials, positions, q, capacity: int) -> jax.Array:
    """The result [B, T, K, G, H] out of what the splits gave; a program for the heads of one KV head and token."""
    batch, tokens, heads, group, width = q.shape
    splits, tile_heads = partials[0].shape[2], tiles(tokens, group)[1]
    sums = pl.BlockSpec((None, None, splits, tile_heads), lambda token, head, row: (row, head, 0, token))
    return pl.pallas_call(
        functools.partial(_combine_kernel, group=group, capacity=capacity),
        grid=(tokens, heads, batch),
        in_specs=[
            pl.BlockSpec((batch,), lambda *_: (0,)),
            pl.BlockSpec((None, None, splits, tile_heads, width), lambda token, head, row: (row, head, 0, token, 0)),
            sums,
            sums,
        ],
        out_specs=pl.BlockSpec(
            (None, None, None, tile_heads, width), lambda token, head, row: (row, token, head, 0, 0)
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        name="decode_combine",
        **on_triton(num_warps=4),
    )(positions, *partials)


def _combine_kernel(positions, mixed, highest, total, out, *, group, capacity):
    rows, width = out.shape
    real = jnp.arange(rows) < group

    def add_split(split, sums):
        mixed_all, highest_all, total_all = sums
        highest_here, total_here = (triton.load(a.at[split], mask=real, other=0) for a in (highest, total))
        mixed_here = triton.load(mixed.at[split], mask=real[:, None], other=0)
        highest_now = jnp.maximum(highest_all, highest_here)
        kept, added = jnp.exp(highest_all - highest_now), jnp.exp(highest_here - highest_now)
        mixed_all = mixed_all * kept[:, None] + mixed_here * added[:, None]
        return mixed_all, highest_now, total_all * kept + total_here * added

    end = jnp.minimum(positions[pl.program_id(2)] + pl.num_programs(0), capacity)
    mixed_all, _, total_all = jax.lax.fori_loop(0, pl.cdiv(end, SPLIT), add_split, _nothing_seen(rows, width))
    triton.store(out, (mixed_all / total_all[:, None]).astype(out.dtype), mask=real[:, None])


def _matmul(left: jax.Array, right: jax.Array, transposed: bool = False) -> jax.Array:
    """Into float32; float32 as it is, where a GPU's matrix units would round it to 10 bits of mantissa."""
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else None
    return triton.dot(left, right, trans_b=transposed, precision=precision)
