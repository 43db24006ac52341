"""KV-cache entries in int8, with one float32 scale per entry, KV head and side (keys or values).

An entry of H numbers takes H + 4 bytes. Each entry is rounded alone, when it is written, so the contents of a cache do
not depend on the pass or the batch in which an entry arrived. Attention reads the int8 numbers directly: it applies the
scale to the entry's score or weight (one number) instead of to the H numbers of the entry.
"""

from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

SCALE_BYTES = 4
_LARGEST = 127  # -128 is left out, so that the range is symmetric
# The least max|x| that a scale is computed from, so that no scale is 0 or denormal. An entry whose numbers are all
# smaller, or zero, is restored with an error of at most this much.
_SMALLEST = 1e-30

T = TypeVar("T")


class Int8(NamedTuple, Generic[T]):
    """Numbers stored as int8 values [..., H] times float32 scales [...]; keys and values have one each.

    T is jax.Array, except where a kernel is called (block specs) and inside it (references to arrays).
    """

    values: T
    scale: T


CacheArray = jax.Array | Int8[jax.Array]  # keys, values or both, as a cache holds them


def quantize(x: jax.Array) -> Int8[jax.Array]:
    """Rounds x [..., H] to int8 values [..., H] with scales max|x| / 127 [...].

    Values are rounded to the nearest integer, halves away from zero. Where a number of an entry is not finite, the
    scale is infinite and the values are 0, so reading that entry gives NaN.
    """
    x = x.astype(jnp.float32)
    # Not every backend's maximum lets NaN through, so map it to infinity first.
    largest = jnp.maximum(jnp.max(jnp.where(jnp.isfinite(x), jnp.abs(x), jnp.inf), axis=-1), _SMALLEST)
    ratio = x * (_LARGEST / largest)[..., None]
    # Conversion to int truncates. A GPU kernel has no jnp.round.
    ratio = jnp.where(jnp.isfinite(ratio), ratio + jnp.where(ratio < 0, -0.5, 0.5), 0)
    # A product, since that is what XLA makes of a division by a constant.
    return Int8(ratio.astype(jnp.int32).astype(jnp.int8), largest * (1 / _LARGEST))


def dequantize(entries: Int8[jax.Array], dtype: jax.typing.DTypeLike) -> jax.Array:
    """Returns values times scales, [..., H] in `dtype`."""
    return (entries.values.astype(jnp.float32) * entries.scale[..., None]).astype(dtype)


def is_int8(dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether a cache dtype is int8, and therefore needs scales."""
    return jnp.dtype(dtype) == jnp.int8
