"""Writing new tokens into a KV cache in place, on TPU: read-modify-write of the tiles that hold them.

The cache stays in HBM, keys and values of an entry side by side: [B, K, C, 2H]. A DMA may begin only at a whole tile of
entries (8 in float32, 16 in bfloat16, 32 in int8), while a position is any. So for every row

    window = the tiles that hold positions[b] .. positions[b] + T - 1, all KV heads
    HBM -> VMEM  window           one DMA a row, the rows of a group all at once
    VMEM         the new entries take their places in it, the others stay bit by bit
    VMEM -> HBM  window           one DMA a row, started as soon as its row is ready

Rows never share a tile, so no two DMAs meet. The window is moved down where it would pass the end of the cache: no
entries beyond the capacity are needed. Input and output are one buffer, pinned to HBM on both sides, or XLA would move
the whole cache through VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

MAX_TOKENS = 16
_GROUP_BYTES = 4 << 20  # of VMEM for the windows of the rows that are written together
_GROUP_ROWS = 32  # a TPU has 512 semaphores; a row takes two


def tile_entries(dtype: jnp.dtype) -> int:
    """Entries of a cache that lie in one tile of HBM: 32 bytes of a lane."""
    return 32 // jnp.dtype(dtype).itemsize


def window_entries(tokens: int, dtype: jnp.dtype) -> int:
    """Entries of the tiles that `tokens` successive positions may touch."""
    tile = tile_entries(dtype)
    return (1 + -(-(tokens - 1) // tile)) * tile


def write_bytes(cache_shape: tuple[int, ...], tokens: int, dtype: jnp.dtype) -> int:
    """What one call moves between HBM and VMEM: every row's window there and back, and the new tokens."""
    rows, heads, _, width = cache_shape
    return rows * heads * (2 * window_entries(tokens, dtype) + tokens) * width * jnp.dtype(dtype).itemsize


def write(cache: jax.Array, new: jax.Array, positions: jax.Array) -> jax.Array:
    """cache [B, K, C, W] with new [B, K, T, W] at entries positions[b] .. of row b; the cache is updated in place.

    C is a multiple of the tile, W of 128 (lanes), T at most MAX_TOKENS. Positions past C - T are taken as C - T.
    """
    rows, heads, capacity, width = cache.shape
    tokens, dtype = new.shape[2], cache.dtype
    entries = window_entries(tokens, dtype)
    group = _group(rows, heads * entries * width * dtype.itemsize)
    return pl.pallas_call(
        functools.partial(_kernel, entries=entries),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows // group,),
            in_specs=[
                pl.BlockSpec((group, heads, tokens, width), lambda step, _: (step, 0, 0, 0)),
                pl.BlockSpec(memory_space=pltpu.HBM),
            ],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            scratch_shapes=[
                pltpu.VMEM((group, heads, entries, width), dtype),
                pltpu.SemaphoreType.DMA((2, group)),
            ],
        ),
        out_shape=pltpu.HBM(cache.shape, dtype),
        input_output_aliases={2: 0},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=write_bytes(cache.shape, tokens, dtype)
        ),
        name="kv_write",
    )(jnp.clip(positions, 0, capacity - tokens), new, pltpu.with_memory_space_constraint(cache, pltpu.HBM))


def _group(rows: int, row_bytes: int) -> int:
    """How many rows to write together: they divide the batch, and their windows fit."""
    divisors = [size for size in range(1, min(rows, _GROUP_ROWS) + 1) if rows % size == 0]
    return max(size for size in divisors if size == 1 or size * row_bytes <= _GROUP_BYTES)


def _kernel(positions, new, _, cache, windows, semaphores, *, entries):
    group, _, tokens, _ = new.shape
    tile, capacity = tile_entries(cache.dtype), cache.shape[2]
    first = pl.program_id(0) * group

    def window(row):
        """(the window in HBM, where the new entries begin in it)."""
        position = positions[first + row]
        start = pl.multiple_of(jnp.minimum(position // tile * tile, capacity - entries), tile)
        return cache.at[first + row, :, pl.ds(start, entries), :], position - start

    def read(row):
        return pltpu.make_async_copy(window(row)[0], windows.at[row], semaphores.at[0, row])

    def write_back(row):
        return pltpu.make_async_copy(windows.at[row], window(row)[0], semaphores.at[1, row])

    def begin(row, _):
        read(row).start()

    def replace(row, _):
        read(row).wait()
        offset = window(row)[1]
        entry = jax.lax.broadcasted_iota(jnp.int32, windows.shape[1:], 1)
        is_new = (entry >= offset) & (entry < offset + tokens)
        windows[row] = jnp.where(is_new, _shifted(new[row], entries, offset), windows[row])
        write_back(row).start()

    def end(row, _):
        write_back(row).wait()

    for step in (begin, replace, end):
        jax.lax.fori_loop(0, group, step, None)


def _shifted(new: jax.Array, entries: int, offset: jax.Array) -> jax.Array:
    """new [K, T, W] -> [K, entries, W], moved on by `offset`; what lies around it does not matter."""
    heads, tokens, width = new.shape
    if tokens == 1:
        return jnp.broadcast_to(new, (heads, entries, width))
    # Rotation is of 32 bits; the way there and back is exact.
    wide = new.astype(jnp.float32 if jnp.issubdtype(new.dtype, jnp.floating) else jnp.int32)
    padded = jnp.concatenate([wide, jnp.zeros((heads, entries - tokens, width), wide.dtype)], axis=1)
    return pltpu.roll(padded, offset, 1).astype(new.dtype)
