"""Entries of a KV cache in int8, with a float32 scale for each entry, KV head and side (keys, values).

An entry of H numbers takes H + 4 bytes. It is rounded when it is written, by itself alone, so what stands in a cache
does not depend on the pass or on the batch that an entry came with; and read as it lies: a scale is applied to the
score, or to the weight, of its entry and not to the H numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

SCALE_BYTES = 4
_LARGEST = 127  # -128 is left out, so that the range is symmetric
# Of max|x|, so that no scale is 0 or denormal: numbers below it, zeros among them, come back within it.
_SMALLEST = 1e-30


class Int8(NamedTuple):
    """Each entry is its values, int8, times its scale, float32. Of one side: values [..., H] and scale [...]."""

    values: jax.Array
    scale: jax.Array


def quantize(x: jax.Array) -> Int8:
    """x [..., H] -> values [..., H], scale [...]: max|x| / 127. Rounded to the nearest, halves away from zero.

    Where not all of x is finite, the scale is infinite and the values are 0: what reads such an entry gets no number.
    """
    x = x.astype(jnp.float32)
    # Not every backend's maximum lets NaN through.
    largest = jnp.maximum(jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf), axis=-1), _SMALLEST)
    ratio = x * (_LARGEST / largest)[..., None]
    # Conversion cuts off. In a kernel for GPU there is no jnp.round.
    ratio = jnp.where(jnp.isfinite(ratio), ratio + jnp.where(ratio < 0, -0.5, 0.5), 0)
    # Spelled out as XLA would have it: a product.
    return Int8(ratio.astype(jnp.int32).astype(jnp.int8), largest * (1 / _LARGEST))


def dequantize(entries: Int8, dtype: jnp.dtype) -> jax.Array:
    return (entries.values.astype(jnp.float32) * entries.scale[..., None]).astype(dtype)


def is_int8(dtype: jnp.dtype) -> bool:
    return jnp.dtype(dtype) == jnp.int8
