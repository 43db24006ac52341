"""How fast a device reads a model's weights: what decoding one token costs at the least."""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.decoding.passes import Weights


def bytes_per_pass(weights: Weights, config: ModelConfig, rows: int, entries: int) -> int:
    """What a pass for one token a row reads: every weight but an embedding that is only looked up, and the
    `entries` of each row's cache that attention reads."""
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
    if "lm_head" in weights:
        read -= weights["embed"].nbytes
    entry = 2 * config.num_layers * config.num_kv_heads * config.head_width * weights["embed"].dtype.itemsize
    return read + rows * entries * entry


class PlainRead:
    """Reads all weights and adds them up, nothing else; timed between the measurements of decoding."""

    def __init__(self, weights: Weights):
        self.weights, self.times = weights, []
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(weights))
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
