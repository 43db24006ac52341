"""A small batch of random text, in which some tokens have weight 0."""

import numpy as np

from lsjax.data.batch import Batch


def weighted_batch() -> Batch:
    """Returns 2 sequences of 8 tokens (ids below 320), one document each, with three weights at 0."""
    tokens = np.random.default_rng(0).integers(0, 320, (2, 9)).astype(np.int32)
    return Batch(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        weights=np.array([[1, 1, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 1, 0]], np.float32),
        positions=np.broadcast_to(np.arange(8, dtype=np.int32), (2, 8)),
        segment_ids=np.zeros((2, 8), np.int32),
    )
