"""A KV cache whose heads are split over devices. Each device writes and attends to the heads that it holds.

The compiler cannot split a Pallas kernel. Under `jax.shard_map` the kernel runs on every device, on a cache with fewer
heads, and the devices exchange nothing. Plain JAX needs none of this, since the compiler splits it by itself.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.kv_cache.reference import CacheUse

_WHOLE = PartitionSpec()


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache"], meta_fields=["sharding"])
@dataclasses.dataclass(frozen=True)
class SplitCache:
    """A cache of any layout, each of its arrays [B, K, ...] split along K.

    sharding: its spec is P(None, mesh axis).
    """

    cache: Any
    sharding: NamedSharding

    @property
    def cache_spec(self) -> PartitionSpec:
        """The spec of the cache's arrays [B, K, ...]."""
        return self.sharding.spec

    @property
    def token_spec(self) -> PartitionSpec:
        """The spec of new keys, new values and queries [B, T, K, ...]."""
        return PartitionSpec(None, *self.sharding.spec)

    def on_each_device(
        self, function: Callable, in_specs: tuple[PartitionSpec, ...], out_specs: PartitionSpec
    ) -> Callable:
        """Returns `function` as it runs on every device, on that device's share of the arguments."""
        # Varying-axes checking is off because Pallas kernels do not say along which mesh axes their results vary.
        return jax.shard_map(function, mesh=self.sharding.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def unsupported_reason(use: CacheUse) -> str | None:
    """Returns why kernels cannot serve a cache on several devices, or None when they can."""
    if use.shards < use.devices:
        return f"no kernels for a cache in {use.shards} part(s) on {use.devices} devices"
    if use.num_kv_heads % use.shards:
        return f"no kernels for {use.num_kv_heads} KV heads split over {use.shards} devices"
    return None


def use_per_device(use: CacheUse) -> CacheUse:
    """Returns the use of one device's share, which is a cache of fewer heads."""
    return use._replace(num_kv_heads=use.num_kv_heads // use.shards, devices=1, shards=1)


def fill(fill_share: Callable, cache: SplitCache, k: jax.Array, v: jax.Array) -> SplitCache:
    """Runs `fill_share`(cache, k, v) -> cache on every device."""
    specs = (cache.cache_spec, cache.token_spec, cache.token_spec)
    filled = cache.on_each_device(fill_share, specs, cache.cache_spec)(cache.cache, k, v)
    return dataclasses.replace(cache, cache=filled)


def write(write_share: Callable, cache: SplitCache, k: jax.Array, v: jax.Array, positions: jax.Array) -> SplitCache:
    """Runs `write_share`(cache, k, v, positions) -> cache on every device."""
    specs = (cache.cache_spec, cache.token_spec, cache.token_spec, _WHOLE)
    written = cache.on_each_device(write_share, specs, cache.cache_spec)(cache.cache, k, v, positions)
    return dataclasses.replace(cache, cache=written)


def attend(attend_share: Callable, q: jax.Array, cache: SplitCache, positions: jax.Array) -> jax.Array:
    """Runs `attend_share`(q, cache, positions) -> [B, T, K, G, H] on every device."""
    specs = (cache.token_spec, cache.cache_spec, _WHOLE)
    return cache.on_each_device(attend_share, specs, cache.token_spec)(q, cache.cache, positions)
