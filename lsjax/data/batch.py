"""Defines the batch that one training step reads."""

from typing import NamedTuple

import jax
import numpy as np


class Batch(NamedTuple):
    """Packed sequences. Every array is [B, S].

    targets: the token that follows each token.
    weights: 0 where the target must not be learned, at the end of a document; 1 elsewhere.
    positions, segment_ids: make positions and attention start anew at each document. None means that each row is
    one text with positions from 0.
    """

    tokens: jax.Array | np.ndarray
    targets: jax.Array | np.ndarray
    weights: jax.Array | np.ndarray
    positions: jax.Array | np.ndarray | None = None
    segment_ids: jax.Array | np.ndarray | None = None
