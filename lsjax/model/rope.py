"""Rotary position embedding in the half-split form, with linear and Llama 3.1 frequency scaling."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from lsjax.config import ModelConfig, RopeScaling


def inverse_frequencies(config: ModelConfig) -> np.ndarray:
    """Returns the radians per position of the H/2 rotated pairs: theta^(-2i/H), scaled. float64 [H/2]."""
    half = config.head_width // 2
    frequencies = config.rope_theta ** (-np.arange(half, dtype=np.float64) / half)
    scaling = config.rope_scaling
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(frequencies, scaling)
    return frequencies


def _llama3(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Keeps short wavelengths, stretches long ones by `factor` and interpolates between (Llama 3.1)."""
    turns = scaling.original_context_length * frequencies / (2 * math.pi)
    low, high = scaling.low_frequency_factor, scaling.high_frequency_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1.0 - keep) / scaling.factor)


def rotation(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Returns cosine and sine of the angles for token positions [B,S]: float32, each [B,S,H/2]."""
    angles = positions[..., None].astype(jnp.float32) * inverse_frequencies(config).astype(np.float32)
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cos_sin: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates heads x [B,S,...,H] by the angles of their positions."""
    heads = x.ndim - 3
    cos, sin = (jnp.expand_dims(a, tuple(range(2, 2 + heads))) for a in cos_sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
