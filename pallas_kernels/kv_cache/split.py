"""A KV cache whose heads are split over devices: each of them writes and attends to those that it holds.

A kernel is a call that no compiler can split; under `jax.shard_map` it runs on every device, on a cache of fewer heads,
and nothing is sent. Plain JAX needs none of this.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.kv_cache.reference import Use


@functools.partial(jax.tree_util.register_dataclass, data_fields=["cache"], meta_fields=["sharding"])
@dataclasses.dataclass(frozen=True)
class SplitCache:
    """A cache of any kind, each of its arrays [B, K, ...] split along K: `sharding` is of P(None, mesh axis)."""

    cache: Any
    sharding: NamedSharding

    def on_each(self, function: Callable, inputs: tuple[PartitionSpec, ...], output: PartitionSpec) -> Callable:
        # Kernels do not say along which mesh axes their results vary, which is what would be checked.
        return jax.shard_map(function, mesh=self.sharding.mesh, in_specs=inputs, out_specs=output, check_vma=False)

    @property
    def tokens(self) -> PartitionSpec:
        """Of arrays [B, T, K, ...]."""
        return PartitionSpec(None, *self.sharding.spec)


def why_not(use: Use) -> str | None:
    """What keeps kernels from a cache that lies on several devices; None when nothing."""
    if use.parts < use.devices:
        return f"no kernels for a cache in {use.parts} part(s) on {use.devices} devices"
    if use.num_kv_heads % use.parts:
        return f"no kernels for {use.num_kv_heads} KV heads split over {use.parts} devices"
    return None


def of_one_device(use: Use) -> Use:
    """Its share: the heads that it holds."""
    return use._replace(num_kv_heads=use.num_kv_heads // use.parts, devices=1, parts=1)


def store(function: Callable, cache: SplitCache, k: jax.Array, v: jax.Array, *positions: jax.Array) -> SplitCache:
    """`function` (cache, k, v, positions) -> cache, on every device: `fill` or `write` of the interface."""
    entries, whole = cache.sharding.spec, (PartitionSpec(),) * len(positions)
    each = cache.on_each(function, (entries, cache.tokens, cache.tokens, *whole), entries)
    return dataclasses.replace(cache, cache=each(cache.cache, k, v, *positions))


def attend(function: Callable, q: jax.Array, cache: SplitCache, positions: jax.Array) -> jax.Array:
    """`function` (q, cache, positions) -> [B, T, K, G, H], on every device."""
    each = cache.on_each(function, (cache.tokens, cache.sharding.spec, PartitionSpec()), cache.tokens)
    return each(q, cache.cache, positions)
