"""The one product of states with weights, whatever layout or number type these are in."""

import jax
import jax.numpy as jnp

from lsjax.model.output_major import LeftOperand, OutputMajor
from lsjax.model.quantized import Quantized

LaidOut = OutputMajor | LeftOperand | Quantized  # what is more than an array [inputs..., outputs...]


def matmul(x: jax.Array, weight: jax.Array | LaidOut, axes: int = 1, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., inputs] times weight [inputs, outputs...], the last `axes` axes of x with the first ones of the weight;
    in x's dtype, or `out_dtype`."""
    if isinstance(weight, LaidOut):
        return weight.multiply(x, axes, out_dtype)
    return jnp.tensordot(x, weight, axes, preferred_element_type=out_dtype)
