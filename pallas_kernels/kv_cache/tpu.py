"""The KV cache on TPU: the key and the value of an entry lie side by side, in one array [B, K, C, 2H].

A TPU stores the last axis of an array in 128 lanes. With H = 64, keys and values side by side fill all of them, where
separate arrays would leave half of every tile empty. One copy between HBM and VMEM then moves both.

The kernels take a few tokens per sequence. Plain JAX does the rest (such as reading a prompt) on the same layout.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import reference, tpu_attend, tpu_write
from pallas_kernels.kv_cache.int8 import CacheArray, Int8, is_int8, quantize

MAX_TOKENS = min(tpu_write.MAX_TOKENS, tpu_attend.MAX_TOKENS)
_CAPACITY_STEP = 32  # entries per tile in int8, the most of any dtype


class PackedCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, side by side: kv [B, K, C, 2H].

    An int8 cache has scales [B, K, 2, C] beside it: first those of the keys, then those of the values. Their entries
    are on the last axis, because attention's scores have them there too.
    """

    kv: CacheArray


def init_layer_cache(
    batch_size: int, num_kv_heads: int, capacity: int, head_width: int, dtype: jax.typing.DTypeLike
) -> PackedCache:
    """Returns an empty cache of one layer, for B sequences of at least `capacity` entries."""
    entries = padded_capacity(capacity, dtype)
    kv = jnp.zeros((batch_size, num_kv_heads, entries, 2 * head_width), dtype)
    return PackedCache(
        Int8(kv, jnp.zeros((batch_size, num_kv_heads, 2, entries), jnp.float32)) if is_int8(dtype) else kv
    )


def padded_capacity(capacity: int, dtype: jax.typing.DTypeLike) -> int:
    """Rounds a capacity up to whole tiles, and to at least one block of the attention kernel."""
    step = tpu_write.SCALE_TILE if is_int8(dtype) else _CAPACITY_STEP
    return max(-(-capacity // step) * step, tpu_attend.SPLIT)


def unsupported_reason(use: reference.CacheUse) -> str | None:
    """Returns why the TPU kernels cannot serve this use, or None when they can."""
    if jnp.dtype(use.dtype) not in (jnp.float32, jnp.bfloat16, jnp.int8):
        return f"no TPU kernels for {jnp.dtype(use.dtype)}, only for float32, bfloat16 and int8"
    if 2 * use.head_width % tpu_attend.LANES:
        return f"no TPU kernels for head width {use.head_width}, only for multiples of {tpu_attend.LANES // 2}"
    if use.tokens > MAX_TOKENS:
        return f"no TPU kernels for {use.tokens} tokens per pass, only for up to {MAX_TOKENS}"
    return None


def entries_read(use: reference.CacheUse) -> int:
    """Returns how many entries of each sequence one pass reads: whole blocks, up to its last filled entry."""
    blocks = -(-use.mean_length // tpu_attend.SPLIT)
    return min(blocks * tpu_attend.SPLIT, padded_capacity(use.capacity, use.dtype))


def bytes_moved(use: reference.CacheUse) -> tuple[int, int]:
    """Returns (bytes moved by writing, bytes read) in one layer's cache by one pass.

    Writing moves whole tiles twice: from HBM to VMEM and back.
    """
    entries, scales = tpu_write.window_entries(use.tokens, use.dtype), tpu_write.scale_window_entries(use.tokens)
    written = use.cache_bytes(2 * entries) + use.scale_bytes(2 * (scales - entries))
    return written, use.cache_bytes(entries_read(use))


def extra_kernels(use: reference.CacheUse) -> int:
    """Returns 0: a TPU runs one program, so starting a kernel inside it costs nothing."""
    return 0


def fill(cache: PackedCache, k: jax.Array, v: jax.Array) -> PackedCache:
    """Writes k, v [B, T, K, H] to entries 0 .. T - 1 of every sequence."""

    def write_at_start(old: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice(old, new, (0, 0, 0, 0))

    return jax.tree.map(write_at_start, cache, PackedCache(_pack(k, v, cache.kv)))


def write(cache: PackedCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> PackedCache:
    """Writes k, v [B, T, K, H] to entries positions[b] .. positions[b] + T - 1 of sequence b."""
    if k.shape[1] <= MAX_TOKENS:
        return PackedCache(tpu_write.write(cache.kv, _pack(k, v, cache.kv), positions))
    if not isinstance(cache.kv, Int8):
        return PackedCache(reference.write_entries(cache.kv, _pack_numbers(k, v, cache.kv.dtype), positions))
    new = _pack_int8(k, v)
    values = reference.write_entries(cache.kv.values, new.values, positions)
    return PackedCache(Int8(values, reference.write_entries(cache.kv.scale, new.scale, positions, axis=3)))


def attend(q: jax.Array, cache: PackedCache, positions: jax.Array) -> jax.Array:
    """Attends with q [B, T, K, G, H]; query t of sequence b sees entries 0 .. positions[b] + t."""
    if q.shape[1] <= MAX_TOKENS:
        return tpu_attend.attend(q, cache.kv, positions)
    return reference.attend(q, as_plain(cache), positions)


def as_plain(cache: PackedCache) -> reference.LayerCache:
    """Returns the cache in plain JAX's layout. C may be larger than the capacity that was asked for."""
    if not isinstance(cache.kv, Int8):
        k, v = jnp.split(cache.kv, 2, axis=3)
        return reference.LayerCache(k, v)
    k, v = jnp.split(cache.kv.values, 2, axis=3)
    return reference.LayerCache(Int8(k, cache.kv.scale[:, :, 0]), Int8(v, cache.kv.scale[:, :, 1]))


def _pack(k: jax.Array, v: jax.Array, kv: CacheArray) -> CacheArray:
    """Puts new keys and values [B, T, K, H] side by side, [B, K, T, 2H], in the number type of the cache `kv`."""
    return _pack_int8(k, v) if isinstance(kv, Int8) else _pack_numbers(k, v, kv.dtype)


def _pack_numbers(k: jax.Array, v: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    return jnp.concatenate(_heads_first(k, v), axis=3).astype(dtype)


def _pack_int8(k: jax.Array, v: jax.Array) -> Int8[jax.Array]:
    k, v = _heads_first(k, v)
    values, scale = quantize(jnp.stack([k, v], axis=3))
    return Int8(values.reshape(*k.shape[:3], -1), scale.swapaxes(2, 3))


def _heads_first(k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns new keys and values [B, T, K, H] as [B, K, T, H], and only finite values."""
    return k.swapaxes(1, 2), reference.finite(v).swapaxes(1, 2)
