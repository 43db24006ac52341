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

A cache in int8 has its scales in an array of their own, [B, K, 2, C]: entries on lanes, where a block of scores has
them too, and so in tiles of 128. They have windows of their own, and go the same way in the same kernel.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_cache.int8 import Int8

MAX_TOKENS = 16
SCALE_TILE = 128  # entries whose scales lie in one tile of HBM
_GROUP_BYTES = 4 << 20  # of VMEM for the windows of the rows that are written together
_GROUP_ROWS = 32  # a TPU has 512 semaphores; a row takes two, with scales four


def tile_entries(dtype: jnp.dtype) -> int:
    """Entries of a cache that lie in one tile of HBM: 32 bytes of a lane."""
    return 32 // jnp.dtype(dtype).itemsize


def window_entries(tokens: int, dtype: jnp.dtype) -> int:
    """Entries of the tiles that `tokens` successive positions may touch."""
    return _window(tokens, tile_entries(dtype))


def scale_window_entries(tokens: int) -> int:
    """The same for scales."""
    return _window(tokens, SCALE_TILE)


def _window(tokens: int, tile: int) -> int:
    return (1 + -(-(tokens - 1) // tile)) * tile


class _Layout(NamedTuple):
    """How entries lie in a row of an array of the cache: along which axis, how many in a tile, how many in a window."""

    axis: int
    tile: int
    entries: int

    def window(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, in an array of `shape`."""
        return tuple(self.entries if axis == self.axis else size for axis, size in enumerate(shape[1:]))

    def within(self, array, row, start):
        """The window of a row that begins at entry `start`."""
        entries = pl.ds(start, self.entries)
        return array.at[row, :, entries, :] if self.axis == 1 else array.at[row, :, :, entries]


def _layouts(cache: jax.Array | Int8, tokens: int) -> list[_Layout]:
    tiles = [tile_entries(cache.values.dtype), SCALE_TILE] if isinstance(cache, Int8) else [tile_entries(cache.dtype)]
    return [_Layout(axis, tile, _window(tokens, tile)) for axis, tile in enumerate(tiles, 1)]


def write(cache: jax.Array | Int8, new: jax.Array | Int8, positions: jax.Array) -> jax.Array | Int8:
    """cache [B, K, C, W] with new [B, K, T, W] at entries positions[b] .. of row b, in int8 also scales [B, K, 2, C]
    with [B, K, 2, T]; the cache is updated in place.

    C is a multiple of every tile, W of 128 (lanes), T at most MAX_TOKENS. Positions past C - T are taken as C - T.
    """
    arrays, news = jax.tree.leaves(cache), jax.tree.leaves(new)
    (rows, _, capacity, _), tokens = arrays[0].shape, news[0].shape[2]
    layouts = _layouts(cache, tokens)
    windows = [jax.ShapeDtypeStruct(lay.window(a.shape), a.dtype) for lay, a in zip(layouts, arrays, strict=True)]
    window_bytes = sum(math.prod(w.shape) * w.dtype.itemsize for w in windows)
    group = _group(rows, window_bytes)
    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), cache)
    return pl.pallas_call(
        functools.partial(_kernel, layouts=layouts, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(rows // group,),
            in_specs=[
                jax.tree.map(lambda a: pl.BlockSpec((group, *a.shape[1:]), lambda step, _: (step, 0, 0, 0)), new),
                in_hbm,
            ],
            out_specs=in_hbm,
            scratch_shapes=[
                [pltpu.VMEM((group, *w.shape), w.dtype) for w in windows],
                pltpu.SemaphoreType.DMA((2, len(arrays), group)),
            ],
        ),
        out_shape=jax.tree.map(lambda a: pltpu.HBM(a.shape, a.dtype), cache),
        input_output_aliases={1 + len(news) + index: index for index in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        # Every row's windows there and back, and the new tokens.
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * rows * window_bytes + sum(a.size * a.dtype.itemsize for a in news),
        ),
        name="kv_write",
    )(
        jnp.clip(positions, 0, capacity - tokens),
        new,
        jax.tree.map(lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM), cache),
    )


def _group(rows: int, row_bytes: int) -> int:
    """How many rows to write together: they divide the batch, and their windows fit."""
    divisors = [size for size in range(1, min(rows, _GROUP_ROWS) + 1) if rows % size == 0]
    return max(size for size in divisors if size == 1 or size * row_bytes <= _GROUP_BYTES)


def _kernel(positions, new, _, *refs, layouts, tokens):
    new, (*cache, windows, semaphores) = jax.tree.leaves(new), refs
    group, capacity = new[0].shape[0], cache[0].shape[2]
    first = pl.program_id(0) * group

    def window(index, row):
        """(the window in HBM of one of the arrays, where the new entries begin in it)."""
        layout, position = layouts[index], positions[first + row]
        start = jnp.minimum(position // layout.tile * layout.tile, capacity - layout.entries)
        start = pl.multiple_of(start, layout.tile)
        return layout.within(cache[index], first + row, start), position - start

    def read(index, row):
        return pltpu.make_async_copy(window(index, row)[0], windows[index].at[row], semaphores.at[0, index, row])

    def write_back(index, row):
        return pltpu.make_async_copy(windows[index].at[row], window(index, row)[0], semaphores.at[1, index, row])

    def replace(index, row):
        read(index, row).wait()
        (axis, _, entries), offset, held = layouts[index], window(index, row)[1], windows[index]
        entry = jax.lax.broadcasted_iota(jnp.int32, held.shape[1:], axis)
        is_new = (entry >= offset) & (entry < offset + tokens)
        held[row] = jnp.where(is_new, _shifted(new[index][row], entries, offset, axis), held[row])
        write_back(index, row).start()

    steps = (lambda *at: read(*at).start()), replace, (lambda *at: write_back(*at).wait())
    for step in steps:
        for index in range(len(cache)):
            jax.lax.fori_loop(0, group, lambda row, _, step=step, index=index: step(index, row), None)


def _shifted(new: jax.Array, entries: int, offset: jax.Array, axis: int) -> jax.Array:
    """new [K, T, W] or [K, 2, T] with its T as many as `entries`, moved on by `offset`; what lies around it does not
    matter."""
    shape = list(new.shape)
    tokens, shape[axis] = shape[axis], entries
    if tokens == 1:
        return jnp.broadcast_to(new, shape)
    # Rotation is of 32 bits; the way there and back is exact.
    wide = new.astype(jnp.float32 if jnp.issubdtype(new.dtype, jnp.floating) else jnp.int32)
    shape[axis] = entries - tokens
    return pltpu.roll(jnp.concatenate([wide, jnp.zeros(shape, wide.dtype)], axis), offset, axis).astype(new.dtype)
