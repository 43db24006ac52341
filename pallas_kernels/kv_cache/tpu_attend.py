"""Attends to a KV cache with a few queries per sequence, on TPU; reads only the blocks that hold filled entries.

The cache lies in HBM (the TPU's main memory) as [B, K, C, W], with the key and the value of an entry side by side in
W = 2H lanes. The grid is sequences x groups of KV heads x splits of SPLIT entries, the splits of a sequence one after
the other. Pallas copies the next block from HBM to VMEM (the memory on the chip) while it computes with the present
one. A split past the end of the sequence names the block before it again, so Pallas fetches nothing, and the kernel
computes nothing. A sequence of n entries thus costs ceil(n / SPLIT) blocks, whatever the capacity.

The rows of a matmul are the queries of one KV head: T tokens x G heads. The running maximum, sum and weighted values of
the softmax are float32, and are normalized after the last split. Blocks have a fixed length and a fixed order, so the
result for a sequence does not depend, to the bit, on the rest of the batch or on the capacity.

With H = 64, keys and values share one tile of 128 lanes. The queries are then padded with zeros where the values are,
the weighted sum runs over whole entries, and its value half is kept. No lane of HBM is padding.

An int8 cache is converted block by block in VMEM. The scales of a block are [2, SPLIT] for every head, with entries on
the same axis as the scores: those of the keys multiply the scores, those of the values multiply the weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_cache.int8 import SCALE_BYTES, CacheArray, Int8, is_int8

MAX_TOKENS = 16
SPLIT = 256  # entries per block
LANES = 128
_BLOCK_BYTES = 2 << 20  # of VMEM, for a block of the heads that are read together, or for their scores
_QUERY_TILE = 16  # the number of queries is padded to a multiple of this
_MASKED = -1e30


def attend_bytes(cache_shape: tuple[int, ...], lengths, dtype: jnp.dtype) -> int:
    """Returns the bytes that one call reads from HBM for sequences of `lengths` entries: whole blocks."""
    _, heads, capacity, width = cache_shape
    entries = sum(min(-(-int(length) // SPLIT) * SPLIT, capacity) for length in lengths)
    scales = 2 * SCALE_BYTES if is_int8(dtype) else 0
    return entries * heads * (width * jnp.dtype(dtype).itemsize + scales)


def attend(q: jax.Array, cache: CacheArray, positions: jax.Array) -> jax.Array:
    """Attends with q [B, T, K, G, H] to a cache [B, K, C, 2H], an int8 cache with scales [B, K, 2, C].

    Query t of sequence b sees entries 0 .. positions[b] + t, as in the reference. What lies past them has no influence,
    even NaN. C must be at least SPLIT and a multiple of the cache's tile, 2H a multiple of LANES, and T at most
    MAX_TOKENS.
    """
    batch_size, tokens, heads, group, head_width = q.shape
    arrays = jax.tree.leaves(cache)
    capacity, width = arrays[0].shape[2:]
    shared = head_width % LANES != 0  # keys and values lie in one tile of lanes
    queries = -(-tokens * group // _QUERY_TILE) * _QUERY_TILE
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch_size, heads, tokens * group, head_width)
    query_width = width if shared else head_width
    q = jnp.pad(q, ((0, 0), (0, 0), (0, queries - tokens * group), (0, query_width - head_width)))
    # int8 blocks are widened in VMEM, so budget for the wider dtype.
    block_width_bytes = width * max(arrays[0].dtype.itemsize, q.dtype.itemsize)
    together = _heads_per_block(heads, SPLIT * max(block_width_bytes, queries * 4))
    blocks = _cache_blocks(cache, together, tokens)

    def query_block(row, heads, split, positions):
        return row, heads, 0, 0

    mixed = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, group=group, head_width=head_width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch_size, heads // together, -(-capacity // SPLIT)),
            in_specs=[
                pl.BlockSpec((1, together, queries, query_width), query_block),
                blocks,
            ],
            out_specs=pl.BlockSpec((1, together, queries, query_width), query_block),
            scratch_shapes=[
                pltpu.VMEM((together, queries, 1), jnp.float32),
                pltpu.VMEM((together, queries, 1), jnp.float32),
                pltpu.VMEM((together, queries, query_width), jnp.float32),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=_cost(q.shape, arrays),
        name="decode_attend",
    )(positions, q, jax.tree.map(lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM), cache))
    mixed = mixed[:, :, : tokens * group, query_width - head_width :]
    return mixed.reshape(batch_size, heads, tokens, group, head_width).transpose(0, 2, 1, 3, 4)


def last_split(position: jax.Array | int, tokens: int) -> jax.Array | int:
    """Returns the index of the split that holds the last entry that a sequence's queries see."""
    return (position + tokens - 1) // SPLIT


def _cache_blocks(cache: CacheArray, heads_per_block: int, tokens: int) -> pl.BlockSpec | Int8[pl.BlockSpec]:
    """Returns the blocks of the cache that each grid step reads; past a sequence's end, the last one again."""

    def block_index(row, heads, split, positions):
        return row, heads, jnp.minimum(split, last_split(positions[row], tokens)), 0

    def scale_block_index(row, heads, split, positions):
        return row, heads, 0, jnp.minimum(split, last_split(positions[row], tokens))

    width = jax.tree.leaves(cache)[0].shape[3]
    blocks = pl.BlockSpec((1, heads_per_block, SPLIT, width), block_index)
    if not isinstance(cache, Int8):
        return blocks
    return Int8(blocks, pl.BlockSpec((1, heads_per_block, 2, SPLIT), scale_block_index))


def _heads_per_block(heads: int, head_bytes: int) -> int:
    """Returns the most KV heads, a divisor of all, whose blocks fit into _BLOCK_BYTES; at least 1."""
    divisors = [size for size in range(1, heads + 1) if heads % size == 0]
    return max(size for size in divisors if size == 1 or size * head_bytes <= _BLOCK_BYTES)


def _cost(q_shape: tuple[int, ...], arrays: list[jax.Array]) -> pl.CostEstimate:
    """Estimates the cost of a call for sequences that fill half of the capacity."""
    batch_size, heads, queries, _ = q_shape
    capacity, width = arrays[0].shape[2:]
    scores = batch_size * heads * queries * capacity // 2
    return pl.CostEstimate(
        flops=2 * scores * width,
        transcendentals=scores,
        bytes_accessed=sum(a.size * a.dtype.itemsize for a in arrays) // 2,
    )


def _kernel(positions, q, cache, out, highest, total, mixed, *, tokens, group, head_width):
    split, position = pl.program_id(2), positions[pl.program_id(0)]
    first = split * SPLIT

    @pl.when(split == 0)
    def _():
        highest[...] = jnp.full_like(highest, _MASKED)
        total[...] = jnp.zeros_like(total)
        mixed[...] = jnp.zeros_like(mixed)

    @pl.when(split <= last_split(position, tokens))
    def _():
        # Entries past the end may hold NaN, and 0 * NaN would leak into the sum.
        def zero_past_end(block, axis):
            entry = first + jax.lax.broadcasted_iota(jnp.int32, block.shape, axis)
            return jnp.where(entry < position + tokens, block, jnp.zeros_like(block))

        key_scales = value_scales = 1.0
        if isinstance(cache, Int8):
            block, scales = cache.values[0].astype(q.dtype), zero_past_end(cache.scale[0], axis=2)
            key_scales, value_scales = scales[:, :1], scales[:, 1:]
        else:
            block = zero_past_end(cache[0], axis=1)
        shared = head_width % LANES != 0
        keys, values = (block, block) if shared else (block[..., :head_width], block[..., head_width:])
        scores = _matmul(q[0], keys, contract=2) * key_scales * head_width**-0.5
        # Row r of the matmul belongs to token r // G and sees an entry if entry - position <= r // G. This form
        # avoids the division.
        entry = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where((entry - position) * group <= row, scores, _MASKED)
        highest_now = jnp.maximum(highest[...], jnp.max(scores, axis=2, keepdims=True))
        weights, rescale = jnp.exp(scores - highest_now), jnp.exp(highest[...] - highest_now)
        highest[...] = highest_now
        total[...] = total[...] * rescale + jnp.sum(weights, axis=2, keepdims=True)
        mixed[...] = mixed[...] * rescale + _matmul((weights * value_scales).astype(block.dtype), values, contract=1)

    @pl.when(split == pl.num_programs(2) - 1)
    def _():
        out[0] = (mixed[...] / total[...]).astype(out.dtype)


def _matmul(left: jax.Array, right: jax.Array, contract: int) -> jax.Array:
    """Multiplies [K, M, X] with [K, C, W], head by head, over X and the axis `contract`, into float32."""
    # Without this a TPU would multiply float32 operands in bfloat16.
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else None
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
