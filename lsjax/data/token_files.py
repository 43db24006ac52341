"""Reads files of tokens that another program made: .npy, or .bin without a header, of uint16 or uint32."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from lsjax.errors import UserError
from lsjax.scratch import on_disk

_SEARCHED_AT_ONCE = 1 << 20


def is_token_file(name: str) -> bool:
    """Returns whether a file may hold tokens, by its name."""
    return name.lower().endswith((".npy", ".bin"))


def open_tokens(path: Path, dtype: str) -> np.ndarray:
    """Maps the tokens of a file into memory. dtype: that of a .bin file; an .npy file says its own.

    One in a bucket is copied to this machine's disk first.
    """
    path = on_disk(path)
    try:
        if not path.name.lower().endswith(".npy"):
            return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
        tokens = np.load(path, mmap_mode="r")
    except Exception as error:  # the header of an .npy file is Python, which may be wrong in many ways
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"cannot read {path} as tokens: {reason}") from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{path} holds several arrays; save one row of tokens with numpy.save")
    if tokens.ndim != 1 or tokens.dtype not in (np.uint16, np.uint32):
        raise UserError(f"{path} must hold one row of uint16 or uint32, got {tokens.dtype} of shape {tokens.shape}")
    return tokens


def read_token_documents(tokens: np.ndarray, separator: int, start: int, end: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields the documents whose first token lies in [start, end): that token's index, and its tokens.

    Each ends with the separator, which the last document of a file gets if it lacks one.
    """
    first = max(start - 1, 0)
    after = first + np.flatnonzero(tokens[first:end] == separator) + 1
    begins = [0] * (start == 0 and len(tokens) > 0) + [int(index) for index in after if index < min(end, len(tokens))]
    for number, begin in enumerate(begins, 1):
        stop = begins[number] if number < len(begins) else _next_begin(tokens, separator, begin)
        document = np.asarray(tokens[begin:stop]).astype(np.int64)
        if document[-1] != separator:
            document = np.append(document, separator)
        yield begin, document


def _next_begin(tokens: np.ndarray, separator: int, begin: int) -> int:
    """Returns the index after the first separator at or after `begin`, or that after the last token."""
    for position in range(begin, len(tokens), _SEARCHED_AT_ONCE):
        found = np.flatnonzero(tokens[position : position + _SEARCHED_AT_ONCE] == separator)
        if len(found):
            return position + int(found[0]) + 1
    return len(tokens)
