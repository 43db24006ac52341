"""The KV cache on GPU: keys and values in separate arrays, in the same layout as plain JAX.

The layout is [B, K, C, H] for each: all entries of one head of one sequence lie together, so a kernel program reads
one contiguous stretch of memory. Because plain JAX uses this layout too, it can do on this cache whatever the kernels
do not support, such as reading a whole prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.kv_cache import gpu_attend, gpu_write, reference, triton_backend
from pallas_kernels.kv_cache.int8 import CacheArray, is_int8

MAX_TOKENS = min(gpu_write.MAX_TOKENS, gpu_attend.MAX_TOKENS)
_HEAD_WIDTHS = (32, 64, 128)  # powers of two, whose blocks fit into an A100's shared memory


class GpuCache(NamedTuple):
    """Keys (after RoPE) and values of one layer, each [B, K, C, H]; with scales [B, K, C] when the cache is int8."""

    k: CacheArray
    v: CacheArray


def init_layer_cache(
    batch_size: int, num_kv_heads: int, capacity: int, head_width: int, dtype: jax.typing.DTypeLike
) -> GpuCache:
    """Returns an empty cache of one layer, for B sequences of at most C entries."""
    return _as_gpu(reference.init_layer_cache(batch_size, num_kv_heads, capacity, head_width, dtype))


def unsupported_reason(use: reference.CacheUse) -> str | None:
    """Returns why the GPU kernels cannot serve this use, or None when they can."""
    if jnp.dtype(use.dtype) not in (jnp.float32, jnp.bfloat16, jnp.int8):
        return f"no GPU kernels for {jnp.dtype(use.dtype)}, only for float32, bfloat16 and int8"
    if use.head_width not in _HEAD_WIDTHS:
        return f"no GPU kernels for head width {use.head_width}, only for {', '.join(map(str, _HEAD_WIDTHS))}"
    if use.tokens > MAX_TOKENS:
        return f"no GPU kernels for {use.tokens} tokens per pass, only for up to {MAX_TOKENS}"
    tokens, heads = gpu_attend.padded_queries(use.tokens, use.group)
    if tokens * heads > gpu_attend.MAX_QUERIES:
        return f"no GPU kernels for {use.tokens} tokens per pass with {use.group} query heads per KV head"
    return triton_backend.unsupported_reason()


def entries_read(use: reference.CacheUse) -> int:
    """Returns how many entries of each sequence one pass reads: those that are filled."""
    return use.mean_length


def bytes_moved(use: reference.CacheUse) -> tuple[int, int]:
    """Returns (bytes written, bytes read) in one layer's cache by one pass.

    The bytes read include the partial results that the splits of a sequence leave to be combined.
    """
    partials = gpu_attend.partial_bytes(use.mean_length, use.tokens, use.group, use.head_width)
    read = use.cache_bytes(use.mean_length) + use.batch_size * use.num_kv_heads * partials
    return use.cache_bytes(use.tokens), read


def extra_kernels(use: reference.CacheUse) -> int:
    """Returns how many more GPU kernels run per layer than with plain JAX, as counted in the compiled programs.

    Plain JAX starts one write per sequence but rotates the keys in the same kernel. Pallas kernels take queries, keys
    and values from arrays that other kernels must produce first. In int8, plain JAX rounds in a kernel of its own.
    """
    return 0 if is_int8(use.dtype) else max(0, 4 - 2 * use.batch_size)


def fill(cache: GpuCache, k: jax.Array, v: jax.Array) -> GpuCache:
    """Writes k, v [B, T, K, H] to entries 0 .. T - 1 of every sequence."""
    return _as_gpu(reference.fill(as_plain(cache), k, v))


def write(cache: GpuCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> GpuCache:
    """Writes k, v [B, T, K, H] to entries positions[b] .. positions[b] + T - 1 of sequence b."""
    if k.shape[1] > MAX_TOKENS:
        return _as_gpu(reference.write(as_plain(cache), k, v, positions))
    new_k, new_v = gpu_write.write(cache.k, cache.v, k, v, positions)
    return GpuCache(new_k, new_v)


def attend(q: jax.Array, cache: GpuCache, positions: jax.Array) -> jax.Array:
    """Attends with q [B, T, K, G, H]; query t of sequence b sees entries 0 .. positions[b] + t."""
    if q.shape[1] > MAX_TOKENS:
        return reference.attend(q, as_plain(cache), positions)
    return gpu_attend.attend(q, cache.k, cache.v, positions)


def as_plain(cache: GpuCache) -> reference.LayerCache:
    """Returns the cache in plain JAX's layout; nothing is copied."""
    return reference.LayerCache(cache.k, cache.v)


def _as_gpu(cache: reference.LayerCache) -> GpuCache:
    return GpuCache(cache.k, cache.v)
