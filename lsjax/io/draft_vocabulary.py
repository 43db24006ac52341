"""The list of a model's frequent tokens, draft_vocabulary.json beside it, from which drafts take their vocabulary."""

import hashlib
import json
import numbers
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lsjax.errors import UserError
from lsjax.files import path_of, read_json, write_atomically
from lsjax.io.beside import is_beside, path_beside

FILE = "draft_vocabulary.json"


class RankedTokens(NamedTuple):
    """The tokens of a text by falling count; equal counts by rising id.

    ids: int32 [n]. counts: how often each occurs [n]. vocab_size: V of the model. source: the text that was counted.
    """

    ids: np.ndarray
    counts: np.ndarray
    vocab_size: int
    source: str


def list_path(model_path: str | Path) -> Path:
    """Returns where the list of the model at a path lies (`path_beside`)."""
    return path_beside(model_path, FILE, instead="a list, or of a copy of the model")


def has_list(model_path: str | Path) -> bool:
    """Returns whether a list lies beside the model at a path."""
    return is_beside(model_path, FILE)


def write_list(path: Path, ranked: RankedTokens) -> None:
    """Writes a list, whole or not at all."""
    content = {
        "vocab_size": ranked.vocab_size,
        "source": ranked.source,
        "sha256": ids_digest(ranked.ids),
        "ids": ranked.ids.tolist(),
        "counts": ranked.counts.tolist(),
    }
    write_atomically(path, json.dumps(content))


def read_list(path: str | Path, vocab_size: int) -> np.ndarray:
    """Reads the ids of a list, in their order: int32 [n]. Only the key `ids` is required.

    Raises UserError when the file cannot be read, is damaged, or is of a model with another vocabulary.
    """
    content = read_json(path_of(path))
    ids = content.get("ids")
    if not isinstance(ids, list):
        raise UserError(f'{path} must hold "ids", a list of token ids')
    size = content.get("vocab_size", vocab_size)
    if size != vocab_size:
        raise UserError(f"{path} is of another model: its vocab_size is {size}, this model's {vocab_size}")
    checked = checked_ids(ids, vocab_size, str(path))
    if content.get("sha256", ids_digest(checked)) != ids_digest(checked):
        raise UserError(f"{path} is damaged: its ids do not have the SHA-256 that stands in it; make it again")
    return checked


def checked_ids(ids: Sequence[Any], vocab_size: int, where: str) -> np.ndarray:
    """Returns token ids as int32 [n], in their order.

    Raises UserError, with `where` in it, when there is none, or one is no id of the vocabulary or occurs twice.
    """
    if not len(ids):
        raise UserError(f"{where} is empty: it needs at least one token id")
    seen: set[int] = set()
    for value in ids:
        if isinstance(value, bool) or not isinstance(value, numbers.Integral):
            raise UserError(f"{where} holds {value!r}, which is no token id")
        index = int(value)
        if not 0 <= index < vocab_size:
            raise UserError(f"{where} holds id {index}, outside the vocabulary 0..{vocab_size - 1}")
        if index in seen:
            raise UserError(f"{where} holds id {index} twice")
        seen.add(index)
    return np.array(ids, np.int32)


def ids_digest(ids: np.ndarray) -> str:
    """Returns the SHA-256 of ids in their order, each as four bytes, the lowest first."""
    return hashlib.sha256(np.asarray(ids, "<i4").tobytes()).hexdigest()
