"""The one product of states with weights, whatever layout or number type these are in."""

import functools

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
    return _product(x, weight, axes, out_dtype)


# Not an einsum, which would contract axes in another order: XLA would transpose the weight for it, every time.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, weight: jax.Array, axes: int, out_dtype: jnp.dtype | None) -> jax.Array:
    return jnp.tensordot(x, weight, axes, preferred_element_type=out_dtype)


def _product_forward(x, weight, axes, out_dtype):
    return _product(x, weight, axes, out_dtype), (x, weight)


def _product_backward(axes, out_dtype, inputs, gradient):
    """The gradient of the weight comes out as the weight lies. JAX's own is its transpose, which XLA:CPU copies."""
    x, weight = inputs
    outputs, rows = weight.ndim - axes, tuple(range(x.ndim - axes))
    last = lambda a: tuple(range(a.ndim - outputs, a.ndim))  # noqa: E731
    of_x = jnp.tensordot(gradient, weight, (last(gradient), last(weight)))
    return of_x.astype(x.dtype), jnp.tensordot(x, gradient, (rows, rows)).astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)
