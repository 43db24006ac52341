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


# Inside `rounding_products(True)`, float32 states times weights are traced as products of bfloat16 with float32 sums.
# JAX's own matmul precision is for the accelerators' compilers: XLA:CPU ignores it.
rounding_products = jax.make_user_context(False)


def rounded(x: jax.Array) -> jax.Array:
    """A factor as products with weights take it."""
    return x.astype(jnp.bfloat16) if rounding_products.value and x.dtype == jnp.float32 else x


# Not an einsum, which would contract axes in another order: XLA would transpose the weight for it, every time.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, weight: jax.Array, axes: int, out_dtype: jnp.dtype | None) -> jax.Array:
    return jnp.tensordot(rounded(x), rounded(weight), axes, preferred_element_type=out_dtype or x.dtype)


def _product_forward(x, weight, axes, out_dtype):
    return _product(x, weight, axes, out_dtype), (x, weight)


def _product_backward(axes, out_dtype, inputs, gradient):
    """The gradient of the weight comes out as the weight lies. JAX's own is its transpose, which XLA:CPU copies."""
    x, weight = inputs
    outputs = weight.ndim - axes
    last = lambda a: tuple(range(a.ndim - outputs, a.ndim))  # noqa: E731
    axes_of_outputs = last(gradient), last(weight)
    of_x = jnp.tensordot(rounded(gradient), rounded(weight), axes_of_outputs, preferred_element_type=gradient.dtype)
    of_weight = sum_over_rows(x, gradient, x.ndim - axes, gradient.dtype)
    return of_x.astype(x.dtype), of_weight.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def sum_over_rows(a: jax.Array, b: jax.Array, rows: int, out_dtype: jnp.dtype) -> jax.Array:
    """a [..., I...] and b [..., O...] -> [I..., O...], summed over their first `rows` axes: a weight's gradient."""
    if not rounding_products.value:
        return jnp.tensordot(a, b, (tuple(range(rows)),) * 2, preferred_element_type=out_dtype)
    # XLA:CPU has a bfloat16 product of rows with columns only. Transposed as a matrix, a would be turned back.
    a, b = rounded(a), rounded(b)
    columns = jnp.moveaxis(a, range(rows), range(a.ndim - rows, a.ndim)).reshape(*a.shape[rows:], -1)
    return jnp.tensordot(columns, b.reshape(-1, *b.shape[rows:]), 1, preferred_element_type=out_dtype)
