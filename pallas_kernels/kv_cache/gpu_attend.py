"""Attends to a KV cache with a few queries per sequence, on GPU; reads the filled entries and nothing past them.

Keys and values are separate arrays [B, K, C, H]. Two kernels do the work (flash decoding):

1. Each sequence is cut into splits of SPLIT entries, and every (split, KV head, sequence) has a program of its own, so
   that a few sequences keep a whole GPU busy. A split past the end of its sequence costs nothing. A program walks
   through its split block by block. The rows of its matmuls are the queries of one KV head: T tokens x G heads. It
   leaves the running maximum, sum and weighted values of a softmax, in float32 and not yet normalized.
2. The second kernel combines these partial results of all splits of a sequence, in order, and normalizes.

Splits and blocks have fixed lengths, so the result for a sequence does not depend, to the bit, on the rest of the batch
or on the capacity.

An int8 cache is converted on the way into the products. The scales of the keys multiply the scores, those of the values
multiply the weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from pallas_kernels.kv_cache.int8 import CacheArray, Int8
from pallas_kernels.kv_cache.triton_backend import on_triton, triton

MAX_TOKENS = 16
MAX_QUERIES = 128  # rows of a matmul: T x G, each padded to a power of two
SPLIT = 256  # entries per program of the first kernel
_FEWEST_ROWS = 16  # the fewest rows of a matmul
_BLOCK_BYTES = 16 << 10  # size of a block of keys, and of a block of values, in shared memory
_MASKED = -1e30


def padded_queries(tokens: int, group: int) -> tuple[int, int]:
    """Pads T and G to powers of two whose product is the number of rows of a matmul."""
    heads = pl.next_power_of_2(group)
    return max(pl.next_power_of_2(tokens), _FEWEST_ROWS // heads), heads


def partial_bytes(entries: int, tokens: int, group: int, width: int) -> int:
    """Returns the bytes of partial results that the splits of one KV head write and the second kernel reads back.

    Each query leaves `width` weighted values, a maximum and a sum, in float32.
    """
    return 2 * pl.cdiv(entries, SPLIT) * tokens * group * (width + 2) * 4


def attend(q: jax.Array, k: CacheArray, v: CacheArray, positions: jax.Array) -> jax.Array:
    """Attends with q [B, T, K, G, H] to k, v [B, K, C, H], an int8 cache with scales [B, K, C].

    Query t of sequence b sees entries 0 .. positions[b] + t, as in the reference. Nothing past them is read.
    H must be a power of two, T at most MAX_TOKENS, and T x G, after `padded_queries`, at most MAX_QUERIES.
    """
    capacity = jax.tree.leaves(k)[0].shape[2]
    return _combine_splits(_attend_to_splits(q, k, v, positions, capacity), positions, q, capacity)


def _attend_to_splits(q, k, v, positions, capacity) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the partial results of all splits, in float32, with T and G padded.

    These are the weighted values [B, K, splits, T G, H], and the maximum and the sum [B, K, splits, T G]. Only the
    splits that hold an entry of their sequence are filled in.
    """
    batch_size, tokens, heads, group, width = q.shape
    splits, (tile_tokens, tile_heads) = pl.cdiv(capacity, SPLIT), padded_queries(tokens, group)
    rows = tile_tokens * tile_heads
    cache = pl.BlockSpec((None, None, capacity, width), lambda split, head, row: (row, head, 0, 0))
    if isinstance(k, Int8):
        cache = Int8(cache, pl.BlockSpec((None, None, capacity), lambda split, head, row: (row, head, 0)))
    queries = pl.BlockSpec((None, tile_tokens, None, tile_heads, width), lambda split, head, row: (row, 0, head, 0, 0))
    sums = pl.BlockSpec((None, None, None, rows), lambda split, head, row: (row, head, split, 0))
    sums_shape = jax.ShapeDtypeStruct((batch_size, heads, splits, rows), jnp.float32)
    # Shared memory holds what is multiplied: for an int8 cache, the numbers after conversion.
    block = min(_BLOCK_BYTES // (width * (q if isinstance(k, Int8) else k).dtype.itemsize), SPLIT)
    return pl.pallas_call(
        functools.partial(_split_kernel, tokens=tokens, group=group, block=block, capacity=capacity),
        grid=(splits, heads, batch_size),
        in_specs=[pl.BlockSpec((batch_size,), lambda *_: (0,)), queries, cache, cache],
        out_specs=(
            pl.BlockSpec((None, None, None, rows, width), lambda split, head, row: (row, head, split, 0, 0)),
            sums,
            sums,
        ),
        out_shape=(jax.ShapeDtypeStruct((*sums_shape.shape, width), jnp.float32), sums_shape, sums_shape),
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
        is_query = (jnp.arange(tile_tokens) < tokens)[:, None] & (jnp.arange(tile_heads) < group)
        query = triton.load(q, mask=is_query[..., None], other=0).reshape(rows, width)
        token = jnp.arange(rows) // tile_heads

        def attend_to_block(index, sums):
            mixed, highest, total = sums
            entry = first + index * block + jnp.arange(block)
            # Entries past the end may hold NaN, and 0 * NaN would leak into the sum, so they are not loaded.
            (keys, key_scales), (values, value_scales) = (
                _load_block(side, first + index * block, entry < end, query.dtype) for side in (k, v)
            )
            scores = _matmul(query, keys, transposed=True) * key_scales * width**-0.5
            scores = jnp.where((entry - position)[None] <= token[:, None], scores, _MASKED)
            highest_now = jnp.maximum(highest, jnp.max(scores, axis=1))
            weights, rescale = jnp.exp(scores - highest_now[:, None]), jnp.exp(highest - highest_now)
            mixed = mixed * rescale[:, None] + _matmul((weights * value_scales).astype(values.dtype), values)
            return mixed, highest_now, total * rescale + jnp.sum(weights, axis=1)

        blocks = pl.cdiv(jnp.minimum(end - first, SPLIT), block)
        sums = jax.lax.fori_loop(0, blocks, attend_to_block, _initial_sums(rows, width))
        real = is_query.reshape(rows)
        for out, value, mask in zip((mixed, highest, total), sums, (real[:, None], real, real), strict=True):
            triton.store(out, value, mask=mask)


def _load_block(side, first, filled: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | float]:
    """Loads a block of keys or values from entry `first` on, 0 where an entry is not filled.

    Returns (operand of the matmul [block, H], factor for each entry's score or weight [block]).
    """
    block = pl.ds(first, filled.shape[0])
    if not isinstance(side, Int8):
        return triton.load(side.at[block], mask=filled[:, None], other=0), 1.0
    values = triton.load(side.values.at[block], mask=filled[:, None], other=0)
    return values.astype(dtype), triton.load(side.scale.at[block], mask=filled, other=0)


def _initial_sums(rows: int, width: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns weighted values, maximum and sum before any entry was seen."""
    return jnp.zeros((rows, width), jnp.float32), jnp.full(rows, _MASKED), jnp.zeros(rows, jnp.float32)


def _combine_splits(partials, positions, q, capacity: int) -> jax.Array:
    """Combines the partial results of the splits into the result [B, T, K, G, H].

    Each (token, KV head, sequence) has a program, for its G query heads.
    """
    batch_size, tokens, heads, group, width = q.shape
    splits, tile_heads = partials[0].shape[2], padded_queries(tokens, group)[1]
    sums = pl.BlockSpec((None, None, splits, tile_heads), lambda token, head, row: (row, head, 0, token))
    return pl.pallas_call(
        functools.partial(_combine_kernel, group=group, capacity=capacity),
        grid=(tokens, heads, batch_size),
        in_specs=[
            pl.BlockSpec((batch_size,), lambda *_: (0,)),
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
        rescale_all, rescale_here = jnp.exp(highest_all - highest_now), jnp.exp(highest_here - highest_now)
        mixed_all = mixed_all * rescale_all[:, None] + mixed_here * rescale_here[:, None]
        return mixed_all, highest_now, total_all * rescale_all + total_here * rescale_here

    end = jnp.minimum(positions[pl.program_id(2)] + pl.num_programs(0), capacity)
    mixed_all, _, total_all = jax.lax.fori_loop(0, pl.cdiv(end, SPLIT), add_split, _initial_sums(rows, width))
    triton.store(out, (mixed_all / total_all[:, None]).astype(out.dtype), mask=real[:, None])


def _matmul(left: jax.Array, right: jax.Array, transposed: bool = False) -> jax.Array:
    """Multiplies into float32."""
    # Without this a GPU would cut the mantissa of float32 operands to 10 bits.
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else None
    return triton.dot(left, right, trans_b=transposed, precision=precision)
