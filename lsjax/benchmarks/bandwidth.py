"""The memory traffic of decoding, and how fast a device reads a model's weights: the least that a token can cost."""

import functools
import operator
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.forward import DRAFT, EXIT_ADAPTER, Weights, cache_dtype
from lsjax.decoding.strategies import AUTO, SelfSpeculative, Strategy
from pallas_kernels.kv_cache.reference import CacheUse


def bytes_per_round(
    weights: Weights, config: ModelConfig, strategy: Strategy, batch_size: int, entries: int, cache: str = AUTO
) -> int:
    """Counts the bytes that one round of a strategy must read.

    Each pass reads every weight, except an embedding that is only looked up, and `entries` cache entries per sequence.
    Without drafts a round is one pass for one token per sequence. Self-speculation reads the first E layers d times and
    all L layers once. It makes no difference whether d + 1 tokens go through all L layers together, or one token
    through the first E layers and d + 1 through the others. A round of copied drafts reads only the L layers; it is
    not counted here.

    entries: cache entries per sequence that attention reads. cache: number type of the KV cache, as in `load`.
    """
    use = CacheUse(
        batch_size=batch_size,
        num_kv_heads=config.num_kv_heads,
        head_width=config.head_width,
        capacity=entries,
        mean_length=entries,
        tokens=1,
        dtype=cache_dtype(weights, cache),
    )
    cache_bytes = use.cache_bytes(entries)

    def one_pass(weights: Weights, layers: int) -> int:
        head = weights["final_norm"], weights["lm_head" if "lm_head" in weights else "embed"]
        return _bytes((weights["layers"][:layers], head, weights.get(EXIT_ADAPTER))) + layers * cache_bytes

    if not isinstance(strategy, SelfSpeculative):
        return one_pass(weights, strategy.layers_run(config.num_layers))
    drafting = one_pass(weights | weights.get(DRAFT, {}), int(strategy.exit_layer))
    return int(strategy.num_speculations) * drafting + one_pass(weights, config.num_layers)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class PlainRead:
    """Times a program that reads all weights and adds them up: the fastest that these weights can be read.

    A benchmark measures it between its decodings, so that both see the same state of the machine.
    """

    def __init__(self, weights: Weights):
        self.weights, self.times = weights, []
        self.bytes = _bytes(weights)
        jax.block_until_ready(_read(weights))  # compiles, outside the measured times

    def measure(self) -> None:
        """Reads the weights once and keeps the time."""
        began = time.perf_counter()
        jax.block_until_ready(_read(self.weights))
        self.times.append(time.perf_counter() - began)

    def bytes_per_second(self) -> float:
        """Returns the bandwidth that the median read reached."""
        return self.bytes / statistics.median(self.times)

    def summary(self, bytes_per_pass: int, seconds_per_pass: float | None) -> dict[str, Any]:
        """Compares the bandwidth of autoregressive decoding with that of the plain read.

        seconds_per_pass: None when there is no time to compare; the rates are then None as well.
        """
        rate = bytes_per_pass / seconds_per_pass if seconds_per_pass else None
        return {
            "plain_read_gigabytes_per_second": self.bytes_per_second() / 1e9,
            "autoregressive_bytes_per_pass": bytes_per_pass,
            "autoregressive_gigabytes_per_second": rate and rate / 1e9,
            "autoregressive_share": rate and rate / self.bytes_per_second(),
        }


@jax.jit
def _read(weights: Weights) -> jax.Array:
    # One sum per row of each array, all of them independent, which XLA:CPU spreads over the cores.
    rows = (jnp.sum(leaf.reshape(leaf.shape[0], -1), axis=1, dtype=jnp.float32) for leaf in jax.tree.leaves(weights))
    return functools.reduce(operator.add, (jnp.max(row) for row in rows))
