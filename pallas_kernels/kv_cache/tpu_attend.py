"""Attention of a few queries to a KV cache, on TPU: only the blocks of a row that hold something are read.

The cache lies in HBM as [B, K, C, W], keys and values of an entry side by side in W = 2H lanes. The grid is rows x
groups of KV heads x splits of SPLIT entries, the splits of a row one after the other. Pallas brings the next block from
HBM to VMEM while the present one is computed with; a split past the row's end names the block before it again, for
which nothing is fetched, and computes nothing. A row of n entries thus costs ceil(n / SPLIT) blocks, whatever the
capacity.

The queries of one KV head, T tokens x G heads, are the rows of one matmul. Maximum, sum and weighted values of what was
seen so far are float32 and not normalised until the last split. Blocks have a fixed length and a fixed order, so a
row's result does not depend, bit by bit, on the batch or on the capacity.

With H = 64 keys and values share one lane tile: the queries are filled up with zeros where the values are, and of the
weighted sum of whole entries the value half is kept. No lane of HBM is padding.

A cache in int8 is converted block by block in VMEM. The scales of a block, [2, SPLIT] of every head, lie as its scores
do: those of the keys multiply the scores, those of the values the weights.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_cache.int8 import SCALE_BYTES, Int8, is_int8

MAX_TOKENS = 16
SPLIT = 256
LANES = 128
_BLOCK_BYTES = 2 << 20  # of VMEM for a block of the heads that are read together, and for their scores
_QUERY_TILE = 16
_MASKED = -1e30


def attend_bytes(cache_shape: tuple[int, ...], lengths, dtype: jnp.dtype) -> int:
    """What one call reads from HBM for rows of `lengths` entries, whole blocks."""
    _, heads, capacity, width = cache_shape
    entries = sum(min(-(-int(length) // SPLIT) * SPLIT, capacity) for length in lengths)
    scales = 2 * SCALE_BYTES if is_int8(dtype) else 0
    return entries * heads * (width * jnp.dtype(dtype).itemsize + scales)


def attend(q: jax.Array, cache: jax.Array | Int8, positions: jax.Array) -> jax.Array:
    """q [B, T, K, G, H] to the cache [B, K, C, 2H], in int8 with scales [B, K, 2, C], as in the reference: query t of
    row b sees the entries 0 .. positions[b] + t, and none of what lies past them is looked at, numbers or not.

    C is at least SPLIT and a multiple of the cache's tile, 2H a multiple of LANES, T at most MAX_TOKENS.
    """
    batch, tokens, heads, group, head_width = q.shape
    arrays = jax.tree.leaves(cache)
    capacity, width = arrays[0].shape[2:]
    shared = head_width % LANES != 0  # keys and values lie in one tile of lanes
    queries = -(-tokens * group // _QUERY_TILE) * _QUERY_TILE
    q = q.transpose(0, 2, 1, 3, 4).reshape(batch, heads, tokens * group, head_width)
    query_width = width if shared else head_width
    q = jnp.pad(q, ((0, 0), (0, 0), (0, queries - tokens * group), (0, query_width - head_width)))
    # Of a cache in int8 the block is there as what it is converted to.
    together = _heads_together(heads, SPLIT * max(width * max(arrays[0].dtype.itemsize, q.dtype.itemsize), queries * 4))
    whole = lambda row, heads, split, positions: (row, heads, 0, 0)  # noqa: E731
    ends = lambda row, positions: last_split(positions[row], tokens)  # noqa: E731
    held = lambda row, heads, split, positions: (row, heads, jnp.minimum(split, ends(row, positions)), 0)  # noqa: E731
    blocks = pl.BlockSpec((1, together, SPLIT, width), held)
    if isinstance(cache, Int8):
        held_scales = lambda *at: (*held(*at)[:2], 0, held(*at)[2])  # noqa: E731
        blocks = Int8(blocks, pl.BlockSpec((1, together, 2, SPLIT), held_scales))
    mixed = pl.pallas_call(
        functools.partial(_kernel, tokens=tokens, group=group, head_width=head_width),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch, heads // together, -(-capacity // SPLIT)),
            in_specs=[
                pl.BlockSpec((1, together, queries, query_width), whole),
                blocks,
            ],
            out_specs=pl.BlockSpec((1, together, queries, query_width), whole),
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
    return mixed.reshape(batch, heads, tokens, group, head_width).transpose(0, 2, 1, 3, 4)


def last_split(position, tokens: int):
    """The split that holds the last entry a row's queries see."""
    return (position + tokens - 1) // SPLIT


def _heads_together(heads: int, head_bytes: int) -> int:
    divisors = [size for size in range(1, heads + 1) if heads % size == 0]
    return max(size for size in divisors if size == 1 or size * head_bytes <= _BLOCK_BYTES)


def _cost(q_shape: tuple[int, ...], arrays: list[jax.Array]) -> pl.CostEstimate:
    """Of rows that are half full."""
    batch, heads, queries, _ = q_shape
    capacity, width = arrays[0].shape[2:]
    scores = batch * heads * queries * capacity // 2
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
        # Past the row's end may lie anything, and 0 * NaN would leak out of it.
        held = lambda a, axis: jnp.where(  # noqa: E731
            first + jax.lax.broadcasted_iota(jnp.int32, a.shape, axis) < position + tokens, a, jnp.zeros_like(a)
        )
        key_scales = value_scales = 1.0
        if isinstance(cache, Int8):
            block, scales = cache.values[0].astype(q.dtype), held(cache.scale[0], 2)
            key_scales, value_scales = scales[:, :1], scales[:, 1:]
        else:
            block = held(cache[0], 1)
        shared = head_width % LANES != 0
        keys, values = (block, block) if shared else (block[..., :head_width], block[..., head_width:])
        scores = _matmul(q[0], keys, contract=2) * key_scales * head_width**-0.5
        # Row r of the matmul is query r // G: entry - position <= r // G, without a division.
        entry = first + jax.lax.broadcasted_iota(jnp.int32, scores.shape, 2)
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1)
        scores = jnp.where((entry - position) * group <= row, scores, _MASKED)
        highest_now = jnp.maximum(highest[...], jnp.max(scores, axis=2, keepdims=True))
        weights, kept = jnp.exp(scores - highest_now), jnp.exp(highest[...] - highest_now)
        highest[...] = highest_now
        total[...] = total[...] * kept + jnp.sum(weights, axis=2, keepdims=True)
        mixed[...] = mixed[...] * kept + _matmul((weights * value_scales).astype(block.dtype), values, contract=1)

    @pl.when(split == pl.num_programs(2) - 1)
    def _():
        out[0] = (mixed[...] / total[...]).astype(out.dtype)


def _matmul(left: jax.Array, right: jax.Array, contract: int) -> jax.Array:
    """[K, M, X] with [K, C, W] over their X and axis `contract`, head by head, into float32."""
    # float32 stands for itself here: by default a TPU would multiply in bfloat16.
    precision = jax.lax.Precision.HIGHEST if right.dtype == jnp.float32 else None
    dimensions = (((2,), (contract,)), ((0,), (0,)))
    return jax.lax.dot_general(left, right, dimensions, precision=precision, preferred_element_type=jnp.float32)
