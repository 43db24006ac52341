"""Defines the batch that one training step reads."""

from typing import Generic, NamedTuple, TypeVar

T = TypeVar("T")


class Batch(NamedTuple, Generic[T]):
    """Packed sequences. Every array is [B, S].

    T: np.ndarray on the host, jax.Array on devices, jax.ShapeDtypeStruct in a description.
    targets: the token that follows each token.
    weights: 0 where the target must not be learned, at the end of a document; 1 elsewhere.
    positions, segment_ids: make positions and attention start anew at each document. None means that each row is
    one text with positions from 0.
    """

    tokens: T
    targets: T
    weights: T
    positions: T | None = None
    segment_ids: T | None = None
