"""What one training step reads."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """Packed sequences, all [B, S]. `targets` is the next token, `weights` 0 where it must not be learned
    (the end of a document); positions and attention start anew at each document."""

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray
    segment_ids: jax.Array | np.ndarray
