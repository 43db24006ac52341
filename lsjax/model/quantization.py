"""Weights in int8 with one scale per output channel.

Only the four weights of each layer and the head are quantised; states, norms, RoPE and looked-up embeddings are not.
int8 halves the bytes of bfloat16, and the time of a decoded token is mostly the time to read weights. Decoding has two
forms of them:

- `Quantized`, for TPU, GPU and every mesh: the weights are widened on the way into the product.
- `QuantizedLeft`, for a single CPU: XLA:CPU would write widened weights out for every product, which is 2 to 7 times
  slower than float32 weights. So states are rounded to int8 as well, one scale per token, and integers are multiplied.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.model.weight_layout import INPUT_AXES, contract_last, multiply_from_left, outputs_first

_LARGEST = 127  # -128 is left out, so that the range is symmetric
# XLA:CPU multiplies integers with a single column ten times slower than with two.
_LEAST_COLUMNS = 2


class Quantized(NamedTuple):
    """A weight in int8: row r of the kernel is values[r] * scale[r].

    values: int8 [outputs..., inputs]; scale: float32 [outputs...]. Stacked layers have an axis L before both.
    """

    values: jax.Array
    scale: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """Multiplies x [..., inputs...] by the weight; arguments as in `matmul`."""
        # Scaling the result and not the weight keeps this a plain matmul, with one product per output.
        y = contract_last(x, self.values.astype(x.dtype), axes, jnp.float32)
        return (y * self.scale).astype(out_dtype or x.dtype)


class QuantizedLeft(NamedTuple):
    """A weight in int8 that is multiplied from the left, by states in int8; `values` and `scale` as in Quantized."""

    values: jax.Array
    scale: jax.Array

    def multiply(self, x: jax.Array, axes: int, out_dtype: jnp.dtype | None = None) -> jax.Array:
        """Multiplies x [..., inputs...] by the weight, after rounding x; arguments as in `matmul`."""
        states, state_scale = _round_to_int8(x.reshape(-1, self.values.shape[-1]))
        y = multiply_from_left(self.values, states, jnp.dtype("int32"), _LEAST_COLUMNS)
        y = y * state_scale[:, None] * self.scale.reshape(-1)
        return y.reshape(*x.shape[:-axes], *self.scale.shape).astype(out_dtype or x.dtype)


def _round_to_int8(states: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rounds states [T, K] to the nearest of 255 values each. Returns them in int8, and the scale of each token [T]."""
    states = states.astype(jnp.float32)
    # A division by 127 may be compiled as this product or not, depending on the shape; tokens must not depend on that.
    scale = jnp.max(jnp.abs(states), axis=-1) * np.float32(1 / _LARGEST)
    # Beyond 127 by a rounding error at most; a token that is not finite stays so by its scale.
    values = jnp.clip(jnp.round(states / jnp.where(scale > 0, scale, 1)[:, None]), -_LARGEST, _LARGEST)
    return values.astype(jnp.int8), scale


def is_quantized(weight: object) -> bool:
    """Returns whether the weight is in int8."""
    return isinstance(weight, Quantized | QuantizedLeft)


def states_in_int8(weights: Any, rounded: bool) -> Any:
    """Gives the int8 weights of a tree the form that rounds states (True) or that does not (False); others stay."""
    form = QuantizedLeft if rounded else Quantized
    return jax.tree.map(lambda a: form(*a) if is_quantized(a) else a, weights, is_leaf=is_quantized)


@functools.partial(jax.jit, static_argnames=("input_axes", "stacked"))
def quantize_weight(weight: jax.Array, input_axes: int, stacked: bool = False) -> Quantized:
    """Rounds a weight [inputs..., outputs...] to the nearest of 255 values, symmetric about 0.

    The scale of an output channel is its largest |weight| / 127. stacked: the weight has an axis L in front.
    """
    weight = outputs_first(weight.astype(jnp.float32), input_axes, stacked)
    scale = jnp.max(jnp.abs(weight), axis=-1) / _LARGEST
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1)[..., None])  # a channel of zeros stays zero
    return Quantized(values.astype(jnp.int8), scale)


def quantize_params(params: dict[str, Any]) -> dict[str, Any]:
    """Quantises the four weights of every layer and the head.

    A tied embedding stays as it is for looking up rows; its int8 head is a copy.
    """
    head = params["lm_head"] if "lm_head" in params else params["embed"].T
    layers = quantize_layers(params["layers"], stacked=True)
    return params | {"layers": layers, "lm_head": quantize_weight(head, input_axes=1)}


def quantize_layers(layers: Any, stacked: bool = False) -> Any:
    """Quantises the four weights of every layer. stacked: the weights have an axis L in front."""

    def quantized(path, leaf):
        name = path[-1].key
        return quantize_weight(leaf, INPUT_AXES[name], stacked) if name in INPUT_AXES else leaf

    return jax.tree_util.tree_map_with_path(quantized, layers)


def cast(params: Any, dtype: jnp.dtype) -> Any:
    """Casts parameters to `dtype`, except int8 weights and their scales."""
    return jax.tree.map(lambda a: a if is_quantized(a) else jnp.asarray(a, dtype), params, is_leaf=is_quantized)
