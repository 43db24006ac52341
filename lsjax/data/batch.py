"""What one training step reads."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """Packed sequences, all [B, S]. `targets` is the next token, `weights` 0 where it must not be learned
    (the end of a document). Positions and attention start anew at each document; where these two are None, a row is
    one text from 0 on."""

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray | None = None
    segment_ids: jax.Array | np.ndarray | None = None
