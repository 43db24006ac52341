"""The KV cache as the TPU kernels want it: keys and values of an entry side by side.

What a kernel does not take (more tokens than a few, as when a prompt is read) plain JAX does on the same layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import reference, tpu_attend, tpu_write
from pallas_kernels.kv_cache.int8 import Int8, is_int8, quantize

MAX_TOKENS = min(tpu_write.MAX_TOKENS, tpu_attend.MAX_TOKENS)
_CAPACITY_STEP = 32  # entries of the largest tile of numbers


class PackedCache(NamedTuple):
    """Keys (rotated), then values, of one layer: [B, K, C, 2H]; in int8 with scales, entries last: [B, K, 2, C]."""

    kv: jax.Array | Int8


def init_layer_cache(batch: int, num_kv_heads: int, capacity: int, head_width: int, dtype) -> PackedCache:
    held = held_entries(capacity, dtype)
    kv = jnp.zeros((batch, num_kv_heads, held, 2 * head_width), dtype)
    return PackedCache(Int8(kv, jnp.zeros((batch, num_kv_heads, 2, held), jnp.float32)) if is_int8(dtype) else kv)


def held_entries(capacity: int, dtype: jnp.dtype) -> int:
    """Entries of a cache that is asked for `capacity`: whole tiles, and a block at the least."""
    step = tpu_write.SCALE_TILE if is_int8(dtype) else _CAPACITY_STEP
    return max(-(-capacity // step) * step, tpu_attend.SPLIT)


def why_not(use: reference.Use) -> str | None:
    """What of it the kernels cannot do; None when nothing."""
    if jnp.dtype(use.dtype) not in (jnp.float32, jnp.bfloat16, jnp.int8):
        return f"no TPU kernels for {jnp.dtype(use.dtype)}"
    if 2 * use.head_width % tpu_attend.LANES:
        return f"no TPU kernels for head width {use.head_width}, which is no multiple of {tpu_attend.LANES // 2}"
    if use.tokens > MAX_TOKENS:
        return f"no TPU kernels for {use.tokens} tokens a pass, at most {MAX_TOKENS}"
    return None


def entries_read(use: reference.Use) -> int:
    """Of every row, by a pass: whole blocks up to its end."""
    blocks = -(-use.mean_length // tpu_attend.SPLIT)
    return min(blocks * tpu_attend.SPLIT, held_entries(use.capacity, use.dtype))


def bytes_moved(use: reference.Use) -> tuple[int, int]:
    """Of one layer's cache: (the tiles that are written, there and back; the blocks that are read)."""
    entries, scales = tpu_write.window_entries(use.tokens, use.dtype), tpu_write.scale_window_entries(use.tokens)
    written = use.bytes_of(2 * entries) + use.scale_bytes_of(2 * (scales - entries))
    return written, use.bytes_of(entries_read(use))


def extra_kernels(use: reference.Use) -> int:
    """A TPU's program is one; what it starts costs nothing."""
    return 0


def fill(cache: PackedCache, k: jax.Array, v: jax.Array) -> PackedCache:
    """Puts k, v [B, T, K, H] at the entries 0 .. T - 1 of every row."""
    put = lambda old, new: jax.lax.dynamic_update_slice(old, new, (0, 0, 0, 0))  # noqa: E731
    return jax.tree.map(put, cache, _packed(k, v, cache))


def write(cache: PackedCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> PackedCache:
    new = _packed(k, v, cache)
    if k.shape[1] <= MAX_TOKENS:
        return PackedCache(tpu_write.write(cache.kv, new.kv, positions))
    if not isinstance(cache.kv, Int8):
        return PackedCache(reference.write_rows(cache.kv, new.kv, positions))
    values = reference.write_rows(cache.kv.values, new.kv.values, positions)
    return PackedCache(Int8(values, reference.write_rows(cache.kv.scale, new.kv.scale, positions, axis=3)))


def attend(q: jax.Array, cache: PackedCache, positions: jax.Array) -> jax.Array:
    if q.shape[1] <= MAX_TOKENS:
        return tpu_attend.attend(q, cache.kv, positions)
    return reference.attend(q, apart(cache), positions)


def apart(cache: PackedCache) -> reference.LayerCache:
    """As plain JAX would hold it, up to a larger capacity."""
    if not isinstance(cache.kv, Int8):
        return reference.LayerCache(*jnp.split(cache.kv, 2, axis=3))
    halves = jnp.split(cache.kv.values, 2, axis=3)
    return reference.LayerCache(*(Int8(half, cache.kv.scale[:, :, side]) for side, half in enumerate(halves)))


def _packed(k: jax.Array, v: jax.Array, cache: PackedCache) -> PackedCache:
    """[B, T, K, H] each -> [B, K, T, 2H], as the cache holds them."""
    k, v = (new.swapaxes(1, 2) for new in (k, reference.finite(v)))
    if not isinstance(cache.kv, Int8):
        return PackedCache(jnp.concatenate([k, v], axis=3).astype(cache.kv.dtype))
    values, scale = quantize(jnp.stack([k, v], axis=3))
    return PackedCache(Int8(values.reshape(*k.shape[:3], -1), scale.swapaxes(2, 3)))
