"""The KV cache that the decoder uses: made once by `init_layer_cache`, for plain JAX or for the kernels of a platform.

A cache's type says who wrote it and can read it, so whoever holds one need not know its layout. A new platform is a
module with a type of its own and the functions of `tpu`, and a line below.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels.kv_cache import gpu, reference, split, tpu
from pallas_kernels.kv_cache.int8 import Int8, dequantize
from pallas_kernels.kv_cache.reference import PLAIN, Use

LayerCache = reference.LayerCache | tpu.PackedCache | gpu.GpuCache | split.SplitCache

KERNELS = {PLAIN: reference, "tpu": tpu, "gpu": gpu}  # the latter by platform
SETTINGS = ("auto", "on", "off")
# What an A100 reads in 2 microseconds, about what it takes to start a kernel: assumed, not measured.
_START_BYTES = 4 << 20
_BY_TYPE = {reference.LayerCache: reference, tpu.PackedCache: tpu, gpu.GpuCache: gpu}


class Kernels(NamedTuple):
    """What runs, a name of KERNELS; and where that is plain JAX, why."""

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose(setting: str, platform: str, use: Use) -> Kernels:
    """setting: "off" is plain JAX, "on" the platform's kernels, "auto" the kernels where they move fewer bytes than
    plain JAX, and so many fewer that it makes up for more kernels to start. What the platform has no kernels for is
    done by plain JAX whatever the setting."""
    if setting == "off":
        return Kernels(PLAIN, "kernels are off")
    kernels = KERNELS.get(platform)
    if kernels is None:
        return Kernels(PLAIN, f"no kernels for {platform}")
    reason = split.why_not(use) or kernels.why_not(use := split.of_one_device(use))
    if reason:
        return Kernels(PLAIN, reason)
    moved, more, plain = sum(kernels.bytes_moved(use)), kernels.extra_kernels(use), sum(reference.bytes_moved(use))
    if setting == "auto" and moved + more * _START_BYTES >= plain:
        in_more = f" in {more} more kernels a layer" if more else ""
        return Kernels(PLAIN, f"kernels would move {moved / plain:.2f} times the bytes{in_more}")
    return Kernels(platform)


def init_layer_cache(
    batch: int,
    num_kv_heads: int,
    capacity: int,
    head_width: int,
    dtype,
    kernels: str = PLAIN,
    sharding: NamedSharding | None = None,
) -> LayerCache:
    """An empty cache of one layer for `kernels` (a name of KERNELS), in a type of floating-point numbers or in int8;
    sharding, of P(None, mesh axis): where its heads are split over a mesh."""
    cache = KERNELS[kernels].init_layer_cache(batch, num_kv_heads, capacity, head_width, dtype)
    return cache if sharding is None or kernels == PLAIN else split.SplitCache(cache, sharding)


def fill(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at the entries 0 .. T - 1 of every row: whole prompts, into a new cache."""
    if isinstance(cache, split.SplitCache):
        return split.store(fill, cache, k, v)
    return _BY_TYPE[type(cache)].fill(cache, k, v)


def write(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Puts k, v [B, T, K, H] at positions[b] .. positions[b] + T - 1 of row b, in place where the cache is donated; a
    value that is not finite, as 0."""
    if isinstance(cache, split.SplitCache):
        return split.store(write, cache, k, v, positions)
    return _BY_TYPE[type(cache)].write(cache, k, v, positions)


def attend(q: jax.Array, cache: LayerCache, positions: jax.Array) -> jax.Array:
    """Softmax attention of T queries a row: query t of row b sees cache entries 0 .. positions[b] + t.

    q [B, T, K, G, H] (G query heads per KV head), positions [B] -> [B, T, K, G, H]. Scores are float32.
    """
    if isinstance(cache, split.SplitCache):
        return split.attend(attend, q, cache, positions)
    return _BY_TYPE[type(cache)].attend(q, cache, positions)


def numbers(cache: LayerCache) -> tuple[jax.Array, jax.Array]:
    """What it holds: keys and values [B, K, C, H], float32, C the capacity asked for or a larger one."""
    cache = _whole(cache)
    sides = _BY_TYPE[type(cache)].apart(cache)
    return tuple(dequantize(a, jnp.float32) if isinstance(a, Int8) else a.astype(jnp.float32) for a in sides)


def as_read(cache: LayerCache, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """k, v [B, T, K, H] as `attend` will find them once they are written: in a cache in int8, rounded."""
    return reference.rounded(k, v) if isinstance(_whole(cache)[0], Int8) else (k, v)


def _whole(cache: LayerCache) -> LayerCache:
    return cache.cache if isinstance(cache, split.SplitCache) else cache
