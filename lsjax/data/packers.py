"""Packs examples into sequences of fixed length: windows of int32 [R, S+1], which become records.

Row 0 holds tokens, row 1 the document of each. Where only a part of an example is learned there is a row 2, which is 1
for the tokens that are learned. A window is filled with padding: token 0 of the document NO_DOCUMENT.
"""

from collections.abc import Iterator

import numpy as np

from lsjax.data.examples import Example
from lsjax.data.packed import NO_DOCUMENT

_OPEN_SEQUENCES = 64


class Packer:
    """Cuts the concatenated documents into windows of two rows.

    Windows overlap by one token: the last target of a window is the first input of the next.
    """

    def __init__(self, sequence_length: int):
        self._length = sequence_length
        self._waiting = np.empty((2, 0), np.int32)
        self.documents = self.sequences = self.padding = self.cut = 0

    def add(self, example: Example) -> Iterator[np.ndarray]:
        """Yields the windows that the next document fills."""
        owners = np.full_like(example.tokens, self.documents)
        self._waiting = np.hstack([self._waiting, np.stack([example.tokens, owners])])
        self.documents += 1
        start = 0
        while self._waiting.shape[1] - start > self._length:
            self.sequences += 1
            yield self._waiting[:, start : start + self._length + 1]
            start += self._length
        self._waiting = self._waiting[:, start:]

    def finish(self) -> Iterator[np.ndarray]:
        """Yields the last window, if any token is left that is yet to be predicted."""
        missing = self._length + 1 - self._waiting.shape[1]
        if self._waiting.shape[1] > 1:
            self.sequences += 1
            self.padding += missing
            yield _fill(self._waiting, missing)


class WholePacker:
    """Puts whole examples into windows of three rows: each into the fullest open window that has room for it.

    Only an example longer than a window is cut; `cut` counts them. Its parts overlap by one token.
    """

    def __init__(self, sequence_length: int):
        self._size = sequence_length + 1
        self._open: list[np.ndarray] = []
        self.documents = self.sequences = self.padding = self.cut = 0

    def add(self, example: Example) -> Iterator[np.ndarray]:
        """Yields the windows that the next example completes."""
        owners = np.full_like(example.tokens, self.documents)
        rows = np.stack([example.tokens, owners, example.learned.astype(np.int32)])
        self.documents += 1
        self.cut += rows.shape[1] > self._size
        while rows.shape[1] > self._size:
            self.sequences += 1
            yield rows[:, : self._size]
            rows = rows[:, self._size - 1 :]
        fitting = [index for index, window in enumerate(self._open) if self._room(window) >= rows.shape[1]]
        if fitting:
            best = min(fitting, key=lambda index: self._room(self._open[index]))
            self._open[best] = np.hstack([self._open[best], rows])
        else:
            self._open.append(rows)
        if len(self._open) > _OPEN_SEQUENCES:
            fullest = min(range(len(self._open)), key=lambda index: self._room(self._open[index]))
            yield self._close(self._open.pop(fullest))

    def finish(self) -> Iterator[np.ndarray]:
        """Yields the windows that are still open."""
        yield from map(self._close, self._open)
        self._open = []

    def _room(self, window: np.ndarray) -> int:
        return self._size - window.shape[1]

    def _close(self, window: np.ndarray) -> np.ndarray:
        self.sequences += 1
        self.padding += self._room(window)
        return _fill(window, self._room(window))


def _fill(window: np.ndarray, missing: int) -> np.ndarray:
    padding = np.zeros((len(window), missing), np.int32)
    padding[1] = NO_DOCUMENT
    return np.hstack([window, padding])
