"""The KV cache as the GPU kernels want it: laid out as plain JAX's, so that what they do not take it can do."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import gpu_attend, gpu_write, reference, triton_backend
from pallas_kernels.kv_cache.int8 import Int8, is_int8

MAX_TOKENS = min(gpu_write.MAX_TOKENS, gpu_attend.MAX_TOKENS)
_HEAD_WIDTHS = (32, 64, 128)  # powers of two, whose blocks fit into an A100's shared memory


class GpuCache(NamedTuple):
    """Keys (rotated) and values of one layer, each [B, K, C, H]; in int8 with scales [B, K, C]."""

    k: jax.Array | Int8
    v: jax.Array | Int8


def init_layer_cache(batch: int, num_kv_heads: int, capacity: int, head_width: int, dtype) -> GpuCache:
    return GpuCache(*reference.init_layer_cache(batch, num_kv_heads, capacity, head_width, dtype))


def why_not(use: reference.Use) -> str | None:
    """What of it the kernels cannot do; None when nothing."""
    if jnp.dtype(use.dtype) not in (jnp.float32, jnp.bfloat16, jnp.int8):
        return f"no GPU kernels for {jnp.dtype(use.dtype)}"
    if use.head_width not in _HEAD_WIDTHS:
        return f"no GPU kernels for head width {use.head_width}, only {', '.join(map(str, _HEAD_WIDTHS))}"
    if use.tokens > MAX_TOKENS:
        return f"no GPU kernels for {use.tokens} tokens a pass, at most {MAX_TOKENS}"
    tokens, heads = gpu_attend.tiles(use.tokens, use.group)
    if tokens * heads > gpu_attend.MAX_QUERIES:
        return f"no GPU kernels for {use.tokens} tokens of {use.group} query heads a KV head"
    return triton_backend.why_not()


def entries_read(use: reference.Use) -> int:
    """Of every row, by a pass: its own."""
    return use.mean_length


def bytes_moved(use: reference.Use) -> tuple[int, int]:
    """Of one layer's cache: (the entries written; those read, and what the splits of a row leave to be combined)."""
    partials = gpu_attend.partial_bytes(use.mean_length, use.tokens, use.group, use.head_width)
    return use.bytes_of(use.tokens), use.bytes_of(use.mean_length) + use.rows * use.num_kv_heads * partials


def extra_kernels(use: reference.Use) -> int:
    """How many more of them run for a layer, as compiled, than in plain JAX. That writes row by row, but rotates keys
    on the way in, where kernels take queries, keys and values from arrays of their own; in int8 it rounds them first.
    """
    return 0 if is_int8(use.dtype) else max(0, 4 - 2 * use.rows)


def fill(cache: GpuCache, k: jax.Array, v: jax.Array) -> GpuCache:
    """Puts k, v [B, T, K, H] at the entries 0 .. T - 1 of every row."""
    return _plain(reference.fill, cache, k, v)


def write(cache: GpuCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> GpuCache:
    if k.shape[1] <= MAX_TOKENS:
        return GpuCache(*gpu_write.write(*cache, k, v, positions))
    return _plain(reference.write, cache, k, v, positions)


def attend(q: jax.Array, cache: GpuCache, positions: jax.Array) -> jax.Array:
    if q.shape[1] <= MAX_TOKENS:
        return gpu_attend.attend(q, *cache, positions)
    return reference.attend(q, apart(cache), positions)


def apart(cache: GpuCache) -> reference.LayerCache:
    """As plain JAX would hold it."""
    return reference.LayerCache(*cache)


def _plain(function, cache: GpuCache, *arguments) -> GpuCache:
    return GpuCache(*function(apart(cache), *arguments))
