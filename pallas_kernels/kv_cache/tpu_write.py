"""Writes new tokens into a KV cache in place, on TPU, by reading, changing and writing back the tiles that hold them.

The cache stays in HBM (the TPU's main memory), with the key and the value of an entry side by side: [B, K, C, 2H]. A
DMA (a copy between HBM and VMEM, the memory on the chip) may begin only at a whole tile of entries: 8 in float32, 16 in
bfloat16, 32 in int8. A position may be anywhere in a tile. So for every sequence b:

    window       = the tiles that hold positions[b] .. positions[b] + T - 1, for all KV heads
    HBM -> VMEM    copy the window: one DMA per sequence, those of a group of sequences all at once
    VMEM           put the new entries into the window; the other entries keep their bits
    VMEM -> HBM    copy the window back: one DMA per sequence, started as soon as its window is ready

Sequences never share a tile, so no two DMAs overlap. A window that would pass the end of the cache is moved down, so
the cache needs no entries beyond the capacity. Input and output are one buffer, pinned to HBM on both sides; otherwise
XLA would move the whole cache through VMEM.

An int8 cache has its scales in an array of their own, [B, K, 2, C]. Their entries lie on lanes, as in a block of
scores, and therefore in tiles of 128. The same kernel moves them in the same way, with windows of their own.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.kv_cache.int8 import CacheArray, Int8

MAX_TOKENS = 16
SCALE_TILE = 128  # entries whose scales lie in one tile of HBM
_GROUP_BYTES = 4 << 20  # of VMEM, for the windows of the sequences that are written together
_MAX_GROUP = 32  # a TPU has 512 semaphores; a sequence takes two, or four with scales


def tile_entries(dtype: jax.typing.DTypeLike) -> int:
    """Returns how many entries of a cache lie in one tile of HBM: 32 bytes per lane."""
    return 32 // jnp.dtype(dtype).itemsize


def window_entries(tokens: int, dtype: jax.typing.DTypeLike) -> int:
    """Returns how many entries lie in the tiles that `tokens` successive positions may touch."""
    return _window(tokens, tile_entries(dtype))


def scale_window_entries(tokens: int) -> int:
    """Returns how many entries lie in the tiles of scales that `tokens` successive positions may touch."""
    return _window(tokens, SCALE_TILE)


def _window(tokens: int, tile: int) -> int:
    return (1 + -(-(tokens - 1) // tile)) * tile


class _Layout(NamedTuple):
    """The way entries lie in one sequence of an array of the cache.

    axis: the axis of the entries, the batch not counted. tile: entries per tile. entries: entries per window.
    """

    axis: int
    tile: int
    entries: int

    def window_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of a window in an array of `shape`."""
        return tuple(self.entries if axis == self.axis else size for axis, size in enumerate(shape[1:]))

    def window(self, array, row, start):
        """Returns the window of sequence `row` that begins at entry `start`."""
        entries = pl.ds(start, self.entries)
        return array.at[row, :, entries, :] if self.axis == 1 else array.at[row, :, :, entries]


def _layouts(cache: CacheArray, tokens: int) -> list[_Layout]:
    """Returns the layout of each array of the cache: the numbers, then the scales if it is int8."""
    tiles = [tile_entries(cache.values.dtype), SCALE_TILE] if isinstance(cache, Int8) else [tile_entries(cache.dtype)]
    return [_Layout(axis, tile, _window(tokens, tile)) for axis, tile in enumerate(tiles, 1)]


def write(cache: CacheArray, new: CacheArray, positions: jax.Array) -> CacheArray:
    """Writes new [B, K, T, W] into a cache [B, K, C, W] at entries positions[b] .. of sequence b, in place.

    In int8 also writes scales [B, K, 2, T] into scales [B, K, 2, C]. C must be a multiple of every tile, W of 128
    (lanes), and T at most MAX_TOKENS. A position past C - T is taken as C - T.
    """
    arrays, news = jax.tree.leaves(cache), jax.tree.leaves(new)
    (batch_size, _, capacity, _), tokens = arrays[0].shape, news[0].shape[2]
    layouts = _layouts(cache, tokens)
    windows = [jax.ShapeDtypeStruct(lay.window_shape(a.shape), a.dtype) for lay, a in zip(layouts, arrays, strict=True)]
    window_bytes = sum(math.prod(w.shape) * w.dtype.itemsize for w in windows)
    group = _group_size(batch_size, window_bytes)
    in_hbm = jax.tree.map(lambda _: pl.BlockSpec(memory_space=pltpu.HBM), cache)
    return pl.pallas_call(
        functools.partial(_kernel, layouts=layouts, tokens=tokens),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch_size // group,),
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
        # The windows of every sequence, read and written back, and the new tokens.
        cost_estimate=pl.CostEstimate(
            flops=0,
            transcendentals=0,
            bytes_accessed=2 * batch_size * window_bytes + sum(a.size * a.dtype.itemsize for a in news),
        ),
        name="kv_write",
    )(
        jnp.clip(positions, 0, capacity - tokens),
        new,
        jax.tree.map(lambda a: pltpu.with_memory_space_constraint(a, pltpu.HBM), cache),
    )


def _group_size(batch_size: int, window_bytes: int) -> int:
    """Returns how many sequences to write together: the most that divide the batch and whose windows fit into VMEM.

    window_bytes: size of the windows of one sequence.
    """
    divisors = [size for size in range(1, min(batch_size, _MAX_GROUP) + 1) if batch_size % size == 0]
    return max(size for size in divisors if size == 1 or size * window_bytes <= _GROUP_BYTES)


def _kernel(positions, new, _, *refs, layouts, tokens):
    new, (*cache, windows, semaphores) = jax.tree.leaves(new), refs
    group, capacity = new[0].shape[0], cache[0].shape[2]
    first = pl.program_id(0) * group

    def window(index, row):
        """Returns (window in HBM of one of the arrays, offset in it at which the new entries begin)."""
        layout, position = layouts[index], positions[first + row]
        start = jnp.minimum(position // layout.tile * layout.tile, capacity - layout.entries)
        start = pl.multiple_of(start, layout.tile)
        return layout.window(cache[index], first + row, start), position - start

    def read(index, row):
        return pltpu.make_async_copy(window(index, row)[0], windows[index].at[row], semaphores.at[0, index, row])

    def write_back(index, row):
        return pltpu.make_async_copy(windows[index].at[row], window(index, row)[0], semaphores.at[1, index, row])

    def replace(index, row):
        read(index, row).wait()
        (axis, _, entries), offset, in_vmem = layouts[index], window(index, row)[1], windows[index]
        entry = jax.lax.broadcasted_iota(jnp.int32, in_vmem.shape[1:], axis)
        is_new = (entry >= offset) & (entry < offset + tokens)
        in_vmem[row] = jnp.where(is_new, _shift(new[index][row], entries, offset, axis), in_vmem[row])
        write_back(index, row).start()

    def start_read(index, row):
        read(index, row).start()

    def finish_write_back(index, row):
        write_back(index, row).wait()

    for step in (start_read, replace, finish_write_back):
        for index in range(len(cache)):
            jax.lax.fori_loop(0, group, lambda row, _, step=step, index=index: step(index, row), None)


def _shift(new: jax.Array, entries: int, offset: jax.Array, axis: int) -> jax.Array:
    """Pads new [K, T, W] or [K, 2, T] from T to `entries` and moves it on by `offset`; the rest is arbitrary."""
    shape = list(new.shape)
    tokens, shape[axis] = shape[axis], entries
    if tokens == 1:
        return jnp.broadcast_to(new, shape)
    # Rotation works on 32-bit numbers; converting there and back is exact.
    wide = new.astype(jnp.float32 if jnp.issubdtype(new.dtype, jnp.floating) else jnp.int32)
    shape[axis] = entries - tokens
    return pltpu.roll(jnp.concatenate([wide, jnp.zeros(shape, wide.dtype)], axis), offset, axis).astype(new.dtype)
