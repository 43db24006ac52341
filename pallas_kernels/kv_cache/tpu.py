"""The KV cache as the TPU kernels want it: keys and values of an entry side by side.

What a kernel does not take (more tokens than a few, as when a prompt is read) plain JAX does on the same layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import reference, tpu_attend, tpu_write

MAX_TOKENS = min(tpu_write.MAX_TOKENS, tpu_attend.MAX_TOKENS)
_CAPACITY_STEP = 32  # entries of the largest tile


class PackedCache(NamedTuple):
    """Keys (rotated), then values, of one layer: [B, K, C, 2H]."""

    kv: jax.Array


def init_layer_cache(batch: int, num_kv_heads: int, capacity: int, head_width: int, dtype) -> PackedCache:
    return PackedCache(jnp.zeros((batch, num_kv_heads, held_entries(capacity), 2 * head_width), dtype))


def held_entries(capacity: int) -> int:
    """Entries of a cache that is asked for `capacity`: whole tiles, and a block at the least."""
    return max(-(-capacity // _CAPACITY_STEP) * _CAPACITY_STEP, tpu_attend.SPLIT)


def why_not(use: reference.Use) -> str | None:
    """What of it the kernels cannot do; None when nothing."""
    if jnp.dtype(use.dtype) not in (jnp.float32, jnp.bfloat16):
        return f"no TPU kernels for {jnp.dtype(use.dtype)}"
    if 2 * use.head_width % tpu_attend.LANES:
        return f"no TPU kernels for head width {use.head_width}, which is no multiple of {tpu_attend.LANES // 2}"
    if use.tokens > MAX_TOKENS:
        return f"no TPU kernels for {use.tokens} tokens a pass, at most {MAX_TOKENS}"
    return None


def entries_read(use: reference.Use) -> int:
    """Of every row, by a pass: whole blocks up to its end."""
    blocks = -(-use.mean_length // tpu_attend.SPLIT)
    return min(blocks * tpu_attend.SPLIT, held_entries(use.capacity))


def bytes_moved(use: reference.Use) -> tuple[int, int]:
    """Of one layer's cache: (the tiles that are written, there and back; the blocks that are read)."""
    return use.bytes_of(2 * tpu_write.window_entries(use.tokens, use.dtype)), use.bytes_of(entries_read(use))


def extra_kernels(use: reference.Use) -> int:
    """A TPU's program is one; what it starts costs nothing."""
    return 0


def fill(cache: PackedCache, k: jax.Array, v: jax.Array) -> PackedCache:
    """Puts k, v [B, T, K, H] at the entries 0 .. T - 1 of every row."""
    return PackedCache(jax.lax.dynamic_update_slice(cache.kv, _packed(k, v, cache.kv.dtype), (0, 0, 0, 0)))


def write(cache: PackedCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> PackedCache:
    new = _packed(k, v, cache.kv.dtype)
    if new.shape[2] <= MAX_TOKENS:
        return PackedCache(tpu_write.write(cache.kv, new, positions))
    return PackedCache(reference.write_rows(cache.kv, new, positions))


def attend(q: jax.Array, cache: PackedCache, positions: jax.Array) -> jax.Array:
    if q.shape[1] <= MAX_TOKENS:
        return tpu_attend.attend(q, cache.kv, positions)
    k, v = jnp.split(cache.kv, 2, axis=3)
    return reference.attend(q, reference.LayerCache(k, v), positions)


def _packed(k: jax.Array, v: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """[B, T, K, H] each -> [B, K, T, 2H]."""
    return jnp.concatenate([k, reference.finite(v)], axis=3).swapaxes(1, 2).astype(dtype)
