"""Weights for XLA:CPU, with their outputs as rows: W[outputs, inputs] @ X[inputs, tokens].

With the weight as the right operand, 2 to 8 tokens cost XLA:CPU 1.5 to 2.4 times one token, and a verification that
should be a read of the weights is none; as the left operand they cost 1.0 to 1.3 times (more, the narrower the model).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Weights of a layer, and how many of their axes are inputs.
INPUT_AXES = {"qkv": 1, "output": 3, "gate_up": 1, "down": 1}
_PADDED_TOKENS = 32  # up to as many, a number of tokens that is no power of two costs more than the next that is one


class OutputMajor(NamedTuple):
    """The weight [inputs..., outputs...] as kernel [outputs..., inputs...]."""

    kernel: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., inputs] times the weight, as `matmul`."""
        outputs = self.kernel.shape[: self.kernel.ndim - axes]
        inputs = math.prod(self.kernel.shape[-axes:])
        columns = x.reshape(-1, inputs)
        tokens = columns.shape[0]
        if tokens <= _PADDED_TOKENS:
            columns = jnp.pad(columns, ((0, (1 << (tokens - 1).bit_length()) - tokens), (0, 0)))
        kernel = self.kernel.reshape(-1, inputs)
        y = jnp.einsum("nk,tk->nt", kernel, columns, preferred_element_type=out_dtype)
        # XLA would fold the transpose into the product, and make the weight its right operand again.
        y = jax.lax.optimization_barrier(y)
        return y[:, :tokens].T.reshape(*x.shape[:-axes], *outputs)


def output_major(weight: jax.Array, input_axes: int) -> OutputMajor:
    return OutputMajor(jnp.moveaxis(weight, range(input_axes), range(-input_axes, 0)))


def with_output_major(weights: dict[str, Any]) -> dict[str, Any]:
    """Decoder weights with those of every layer and the head in this layout. A tied embedding is its own head, as it
    lies; what is in another layout of its own stays so."""

    def change(path, leaf):
        plain = isinstance(path[-1], jax.tree_util.DictKey) and path[-1].key in INPUT_AXES
        return output_major(leaf, INPUT_AXES[path[-1].key]) if plain else leaf

    head = weights.get("lm_head", OutputMajor(weights["embed"]))
    head = output_major(head, 1) if isinstance(head, jax.Array) else head
    return weights | {"layers": jax.tree_util.tree_map_with_path(change, weights["layers"]), "lm_head": head}
