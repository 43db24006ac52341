"""How fast a device reads a model's weights: what decoding one token costs at the least."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.passes import DRAFT, Weights, cache_dtype
from lsjax.decoding.programs import last_layer
from lsjax.decoding.strategies import AUTO, SelfSpeculative, Strategy
from pallas_kernels.kv_cache.reference import Use


def bytes_per_round(
    weights: Weights, config: ModelConfig, strategy: Strategy, rows: int, entries: int, cache: str = AUTO
) -> int:
    """What a round of a strategy reads (a pass for one token a row, where nothing is drafted): for each of its passes
    every weight but an embedding that is only looked up, and the `entries` of each row's cache that attention reads.
    d drafts through E layers, and L layers once: whether d + 1 tokens go through all of them at once, or one through
    the early and all through the others, is the same. A round of copies reads the L layers alone, and is not counted.
    """
    sizes = rows, config.num_kv_heads, config.head_width
    read = Use(*sizes, entries, entries, tokens=1, dtype=cache_dtype(weights, cache)).bytes_of(entries)

    def one_pass(weights: Weights, layers: int) -> int:
        head = weights["final_norm"], weights["lm_head" if "lm_head" in weights else "embed"]
        return _bytes((weights["layers"][:layers], head)) + layers * read

    if not isinstance(strategy, SelfSpeculative):
        return one_pass(weights, last_layer(config, strategy))
    drafting = one_pass(weights | weights.get(DRAFT, {}), strategy.exit_layer)
    return strategy.num_speculations * drafting + one_pass(weights, config.num_layers)


def _bytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


class PlainRead:
    """Reads all weights and adds them up, nothing else; timed between the measurements of decoding."""

    def __init__(self, weights: Weights):
        self.weights, self.times = weights, []
        self.bytes = _bytes(weights)
        jax.block_until_ready(_read(weights))  # compiled, and not counted

    def measure(self) -> None:
        began = time.perf_counter()
        jax.block_until_ready(_read(self.weights))
        self.times.append(time.perf_counter() - began)

    def bytes_per_second(self) -> float:
        return self.bytes / statistics.median(self.times)

    def summary(self, bytes_per_pass: int, seconds_per_pass: float | None) -> dict[str, Any]:
        """Of autoregressive decoding: the share of what the plain read reaches; None when there is no time."""
        reached = bytes_per_pass / seconds_per_pass if seconds_per_pass else None
        return {
            "plain_read_gigabytes_per_second": self.bytes_per_second() / 1e9,
            "autoregressive_bytes_per_pass": bytes_per_pass,
            "autoregressive_gigabytes_per_second": reached and reached / 1e9,
            "autoregressive_share": reached and reached / self.bytes_per_second(),
        }


@jax.jit
def _read(weights: Weights) -> jax.Array:
    # A sum a row of each array, all of them independent: XLA:CPU spreads these over the cores.
    rows = (jnp.sum(leaf.reshape(leaf.shape[0], -1), axis=1, dtype=jnp.float32) for leaf in jax.tree.leaves(weights))
    return sum(jnp.max(row) for row in rows)
