"""A small learned map of the state at one exit, for drafts from a model that stays as it is.

It stands between the state after layer E and the final norm: h -> h + h W (the tuned lens, arXiv 2303.08112). Only
what the exit predicts goes through it. The layers above E, the KV cache and the states that verification continues from
are the model's own.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lsjax.config import ModelConfig
from lsjax.model.matmul import matmul


@functools.partial(jax.tree_util.register_dataclass, data_fields=("kernel",), meta_fields=("exit_layer",))
@dataclasses.dataclass(frozen=True)
class ExitAdapter:
    """The adapter of one exit.

    exit_layer: E, the exit that it belongs to.
    kernel: W, an array [D,D] or a form that decoding makes of it (lsjax/model/weight_layout.py).
    """

    exit_layer: int
    kernel: Any

    def apply(self, x: jax.Array) -> jax.Array:
        """Maps states [..., D] after layer E to those that the final norm and the head read."""
        return x + matmul(x, self.kernel)


def init_kernel(config: ModelConfig) -> jax.Array:
    """Returns the kernel of an adapter that changes nothing: zeros [D,D]."""
    return jnp.zeros((config.width, config.width))
