"""The KV cache that the decoder uses, in front of plain JAX and the kernels of each platform.

Letters: B sequences of a batch, T new tokens per sequence, K KV heads, G query heads per KV head, H head width,
C capacity (entries per sequence). An entry is what one token leaves in the cache: for each KV head a key and a value.

`init_layer_cache` makes a cache, `fill` puts whole prompts into it, `write` adds a few tokens, `attend` reads it. The
type of the cache says which code owns it, so the decoder never needs to know the layout:

    LayerCache   plain JAX  keys [B, K, C, H], values [B, K, C, H]  the entries of one head lie together
    GpuCache     GPU        keys [B, K, C, H], values [B, K, C, H]  as plain JAX, which does what the kernels do not
    PackedCache  TPU        keys and values [B, K, C, 2H]           one copy moves both; fills the 128 lanes at H = 64
    SplitCache   any of these, with the K heads split over several devices

A TPU moves memory in tiles: the last axis in 128 lanes, the axis before it in 8 to 32 entries, depending on the dtype.
A last axis of 64 would waste half of every tile, so PackedCache puts keys and values side by side. A GPU has no such
tiles. It needs many independent programs that read contiguous memory, so each side keeps an array of its own.

An int8 cache stores each array as Int8: the numbers in the layout above, and float32 scales in an array of their own,
one per entry, KV head and side. The scales are [B, K, C] beside separate keys and values, and [B, K, 2, C] in a
PackedCache: entries last, which is how attention has its scores on TPU, so scales and scores multiply directly.

To add a platform, write a module with a cache type of its own and the functions of tpu.py, and register it in KERNELS
and _MODULE_OF_TYPE.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels.kv_cache import gpu, reference, split, tpu
from pallas_kernels.kv_cache.int8 import CacheArray, Int8, dequantize
from pallas_kernels.kv_cache.reference import PLAIN, CacheUse

WholeCache = reference.LayerCache | tpu.PackedCache | gpu.GpuCache
LayerCache = WholeCache | split.SplitCache

KERNELS = {PLAIN: reference, "tpu": tpu, "gpu": gpu}  # PLAIN, or the platform's name
SETTINGS = ("auto", "on", "off")
# Starting one more GPU kernel counts as this much traffic: what an A100 reads in 2 microseconds. Assumed, not measured.
_START_BYTES = 4 << 20
_MODULE_OF_TYPE = {reference.LayerCache: reference, tpu.PackedCache: tpu, gpu.GpuCache: gpu}


class Kernels(NamedTuple):
    """A choice of kernels.

    name: a key of KERNELS. reason: why plain JAX was chosen; empty otherwise.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.reason})" if self.reason else self.name


def choose(setting: str, platform: str, use: CacheUse) -> Kernels:
    """Chooses what writes and reads the cache.

    setting: "off" takes plain JAX, "on" the platform's kernels. "auto" takes the kernels when the bytes they save
        outweigh the additional kernels they start. Plain JAX serves everything that the platform's kernels do not
        support, whatever the setting.
    platform: "cpu", "gpu" or "tpu".
    """
    if setting == "off":
        return Kernels(PLAIN, "kernels are off")
    kernels = KERNELS.get(platform)
    if kernels is None:
        return Kernels(PLAIN, f"no kernels for {platform}")
    reason = split.unsupported_reason(use) or kernels.unsupported_reason(use := split.use_per_device(use))
    if reason:
        return Kernels(PLAIN, reason)
    moved, more, plain = sum(kernels.bytes_moved(use)), kernels.extra_kernels(use), sum(reference.bytes_moved(use))
    if setting == "auto" and moved + more * _START_BYTES >= plain:
        in_more = f" in {more} more kernels per layer" if more else ""
        return Kernels(PLAIN, f"kernels would move {moved / plain:.2f} times the bytes{in_more}")
    return Kernels(platform)


def init_layer_cache(
    batch_size: int,
    num_kv_heads: int,
    capacity: int,
    head_width: int,
    dtype: jax.typing.DTypeLike,
    kernels: str = PLAIN,
    sharding: NamedSharding | None = None,
) -> LayerCache:
    """Returns an empty cache of one layer.

    dtype: a floating-point type, or int8. kernels: a key of KERNELS.
    sharding: with spec P(None, mesh axis), where the KV heads are split over a mesh; None on one device.
    """
    cache = KERNELS[kernels].init_layer_cache(batch_size, num_kv_heads, capacity, head_width, dtype)
    return cache if sharding is None or kernels == PLAIN else split.SplitCache(cache, sharding)


def fill(cache: LayerCache, k: jax.Array, v: jax.Array) -> LayerCache:
    """Writes k, v [B, T, K, H] to entries 0 .. T - 1 of every sequence: whole prompts, into a new cache."""
    if isinstance(cache, split.SplitCache):
        return split.fill(fill, cache, k, v)
    return _MODULE_OF_TYPE[type(cache)].fill(cache, k, v)


def write(cache: LayerCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> LayerCache:
    """Writes k, v [B, T, K, H] to entries positions[b] .. positions[b] + T - 1 of sequence b.

    Updates in place where the cache is donated. A value that is not finite is stored as 0.
    """
    if isinstance(cache, split.SplitCache):
        return split.write(write, cache, k, v, positions)
    return _MODULE_OF_TYPE[type(cache)].write(cache, k, v, positions)


def attend(q: jax.Array, cache: LayerCache, positions: jax.Array) -> jax.Array:
    """Computes softmax attention of T queries per sequence: query t of sequence b sees entries 0 .. positions[b] + t.

    q [B, T, K, G, H], positions [B] -> [B, T, K, G, H]. Scores are computed in float32.
    """
    if isinstance(cache, split.SplitCache):
        return split.attend(attend, q, cache, positions)
    return _MODULE_OF_TYPE[type(cache)].attend(q, cache, positions)


def numbers(cache: LayerCache) -> tuple[jax.Array, jax.Array]:
    """Returns the keys and values in the cache, each [B, K, C, H] in float32.

    C may be larger than the capacity that was asked for, since some layouts round it up.
    """
    cache = _unsplit(cache)
    plain = _MODULE_OF_TYPE[type(cache)].as_plain(cache)
    return _in_float32(plain.k), _in_float32(plain.v)


def as_read(cache: LayerCache, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns k, v [B, T, K, H] as `attend` will see them once they are written: rounded, if the cache is int8."""
    return reference.int8_round_trip(k, v) if isinstance(_unsplit(cache)[0], Int8) else (k, v)


def _in_float32(side: CacheArray) -> jax.Array:
    return dequantize(side, jnp.float32) if isinstance(side, Int8) else side.astype(jnp.float32)


def _unsplit(cache: LayerCache) -> WholeCache:
    return cache.cache if isinstance(cache, split.SplitCache) else cache
