"""The product of states with weights, for weights in every layout and number type."""

import functools

import jax
import jax.numpy as jnp

from lsjax.model.lora import LoraWeight
from lsjax.model.quantization import Quantized, QuantizedLeft
from lsjax.model.weight_layout import LeftOperand, OutputMajor

# A weight is an array [inputs..., outputs...], or one of these forms that decoding makes of it.
LaidOut = OutputMajor | LeftOperand | Quantized | QuantizedLeft


def matmul(
    x: jax.Array, weight: jax.Array | LaidOut | LoraWeight, axes: int = 1, out_dtype: jnp.dtype | None = None
) -> jax.Array:
    """Multiplies states by a weight: x [..., inputs...], weight [inputs..., outputs...] -> [..., outputs...].

    axes: the number of input axes, contracted over: the last ones of x, the first ones of the weight.
    out_dtype: the result's dtype; None means x's.
    """
    if isinstance(weight, LaidOut):
        return weight.multiply(x, axes, out_dtype)
    if isinstance(weight, LoraWeight):
        thin = weight.scale * matmul(x, weight.lora_a, axes)
        return matmul(x, weight.weight, axes, out_dtype) + matmul(thin, weight.lora_b, 1, out_dtype)
    return _product(x, weight, axes, out_dtype)


# Code traced inside `rounding_products(True)` multiplies float32 states and weights as bfloat16, with float32 sums.
# JAX's own matmul precision setting does not serve here: XLA:CPU ignores it.
rounding_products = jax.make_user_context(False)


def product_factor(x: jax.Array) -> jax.Array:
    """Returns x as a factor of a product with weights: float32 becomes bfloat16 inside `rounding_products(True)`."""
    return x.astype(jnp.bfloat16) if rounding_products.value and x.dtype == jnp.float32 else x


# tensordot and not einsum: einsum contracts the axes in another order, for which XLA transposes the weight each time.
@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: jax.Array, weight: jax.Array, axes: int, out_dtype: jnp.dtype | None) -> jax.Array:
    return jnp.tensordot(product_factor(x), product_factor(weight), axes, preferred_element_type=out_dtype or x.dtype)


def _product_forward(x, weight, axes, out_dtype):
    return _product(x, weight, axes, out_dtype), (x, weight)


def _product_backward(axes, out_dtype, inputs, gradient):
    """Computes both gradients, the weight's in the weight's own axis order.

    JAX's own rule gives the transpose of the weight's gradient, which XLA:CPU then copies.
    """
    x, weight = inputs
    output_axes = weight.ndim - axes
    last_axes = tuple(range(gradient.ndim - output_axes, gradient.ndim)), tuple(range(axes, weight.ndim))
    x_gradient = jnp.tensordot(
        product_factor(gradient), product_factor(weight), last_axes, preferred_element_type=gradient.dtype
    )
    weight_gradient = sum_over_rows(x, gradient, x.ndim - axes, gradient.dtype)
    return x_gradient.astype(x.dtype), weight_gradient.astype(weight.dtype)


_product.defvjp(_product_forward, _product_backward)


def sum_over_rows(a: jax.Array, b: jax.Array, rows: int, out_dtype: jnp.dtype) -> jax.Array:
    """Sums outer products over the first `rows` axes: a [..., I...], b [..., O...] -> [I..., O...].

    This is the gradient of a weight.
    """
    if not rounding_products.value:
        return jnp.tensordot(a, b, (tuple(range(rows)),) * 2, preferred_element_type=out_dtype)
    # XLA:CPU multiplies bfloat16 only as rows times columns. The axes of a move one by one because XLA would undo the
    # transpose of a matrix.
    a, b = product_factor(a), product_factor(b)
    columns = jnp.moveaxis(a, range(rows), range(a.ndim - rows, a.ndim)).reshape(*a.shape[rows:], -1)
    return jnp.tensordot(columns, b.reshape(-1, *b.shape[rows:]), 1, preferred_element_type=out_dtype)
