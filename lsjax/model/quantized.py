"""Weights in int8, a scale for each output channel. What multiplies them, norms, RoPE and looked-up embeddings are not.

Half the bytes of bfloat16, and reading weights is what a token costs. XLA:TPU and XLA:GPU convert them on the way into
the product; XLA:CPU writes them out in float32 for every product and is 2 to 7 times slower than with float32 ones.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lsjax.model.output_major import INPUT_AXES, contract_last, outputs_first

_LARGEST = 127  # -128 is left out, so that the range is symmetric


class Quantized(NamedTuple):
    """The weight is values int8 [outputs..., inputs], each row times its scale, float32 [outputs...]; of a stack,
    both with an axis L before."""

    values: jax.Array
    scale: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """x [..., inputs] times the weight, as `matmul`."""
        # The scale is the result's, not the weight's: that would be a product for each entry, and no plain matmul.
        y = contract_last(x, self.values.astype(x.dtype), axes, jnp.float32)
        return (y * self.scale).astype(out_dtype or x.dtype)


def is_quantized(weight: object) -> bool:
    return isinstance(weight, Quantized)


@functools.partial(jax.jit, static_argnames=("input_axes", "stacked"))
def quantize_weight(weight: jax.Array, input_axes: int, stacked: bool = False) -> Quantized:
    """Symmetric rounding to the nearest of 255 values; scale: the largest |weight| of an output channel / 127."""
    weight = outputs_first(weight.astype(jnp.float32), input_axes, stacked)
    scale = jnp.max(jnp.abs(weight), axis=-1) / _LARGEST
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1)[..., None])  # a channel of zeros stays one
    return Quantized(values.astype(jnp.int8), scale)


def quantize_params(params: dict[str, Any]) -> dict[str, Any]:
    """Parameters with the four weights of every layer and the head in int8. Of a tied embedding the head is a copy:
    rows are looked up as they were."""
    head = params["lm_head"] if "lm_head" in params else params["embed"].T
    layers = quantize_layers(params["layers"], stacked=True)
    return params | {"layers": layers, "lm_head": quantize_weight(head, input_axes=1)}


def quantize_layers(layers: Any, stacked: bool = False) -> Any:
    """Layers with their four weights in int8; stacked: with an axis L before."""

    def quantized(path, leaf):
        name = path[-1].key
        return quantize_weight(leaf, INPUT_AXES[name], stacked) if name in INPUT_AXES else leaf

    return jax.tree_util.tree_map_with_path(quantized, layers)


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """Parameters in `dtype`, but for those in int8 and their scales."""
    return jax.tree.map(lambda a: a if is_quantized(a) else jnp.asarray(a, dtype), params, is_leaf=is_quantized)
