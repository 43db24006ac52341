"""Attention to a KV cache by its definition, query by query, in float64."""

import numpy as np


def softmax_over(q, k, v, positions) -> np.ndarray:
    """q [B, T, K, G, H] to k, v [B, K, C, H]: query t of row b sees the entries 0 .. positions[b] + t, and nothing past
    them is looked at."""
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    mixed = np.zeros(q.shape)
    for b, t, head, g in np.ndindex(q.shape[:-1]):
        seen = positions[b] + t + 1
        scores = k[b, head, :seen] @ q[b, t, head, g] / np.sqrt(q.shape[-1])
        weights = np.exp(scores - scores.max())
        mixed[b, t, head, g] = weights @ v[b, head, :seen] / weights.sum()
    return mixed
