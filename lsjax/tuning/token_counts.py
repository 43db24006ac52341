"""Counts a model's tokens in texts, to rank them for a draft vocabulary, and how much of other texts that covers."""

from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from lsjax.config import DataConfig
from lsjax.data.corpus import Corpus, Skipped
from lsjax.data.documents import Document, digest_of, is_held_out, read_documents
from lsjax.data.sources import training_corpora
from lsjax.data.tokenizer import Tokenizer
from lsjax.decoding.draft_vocabulary import always_drafted, most_frequent
from lsjax.errors import UserError
from lsjax.io.draft_vocabulary import RankedTokens

SIZES = (1024, 2048, 4096, 8192, 16384, 32768)
SAMPLE_BYTES = 64 << 20  # enough to rank tens of thousands of tokens
_SAMPLED_UNITS = 32
_TEXTS_AT_ONCE = 256


def count_tokens(tokenizer: Tokenizer, data: DataConfig, vocab_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns how often each token occurs in the documents (to train on, held out) of a corpus: int64 [V] each.

    It reads at most about SAMPLE_BYTES, spread evenly over a larger corpus; of a mixture, the same from each source.
    Raises UserError when either split has no text.
    """
    counts = np.zeros((2, vocab_size), np.int64)
    corpora = training_corpora(data)
    documents = (document for corpus in corpora for document in _sample(data, corpus, SAMPLE_BYTES // len(corpora)))
    while some := list(islice(documents, _TEXTS_AT_ONCE)):
        tokens = _encode(tokenizer, some, data)
        for document, ids in zip(some, tokens, strict=True):
            held_out = is_held_out(digest_of(document.content()), data.held_out_fraction)
            counts[int(held_out)] += np.bincount(ids, minlength=vocab_size)[:vocab_size]
    train, held_out = counts
    if not train.any() or not held_out.any():
        empty = "held out" if train.any() else "to count"
        raise UserError(f"{data.mixture or data.corpus} has too few texts: none is {empty}; give more")
    return train, held_out


def _sample(data: DataConfig, corpus: Corpus, most: int) -> Iterator[Document]:
    """Yields the documents of a small corpus, or those at the beginnings of units spread evenly over a large one.

    most: bytes of a small corpus, and about the most that are read of another.
    """
    count = sum(1 for _ in corpus.units())
    stride = 1 if corpus.size <= most else -(-count // _SAMPLED_UNITS)
    quota = most // max(1, -(-count // stride))
    for unit in islice(corpus.units(), 0, None, stride):
        taken = 0
        for document in read_documents(unit.pieces, data, Skipped()):
            yield document
            taken += len(document.content())
            if taken >= quota and corpus.size > most:
                break


def _encode(
    tokenizer: Tokenizer, documents: Sequence[Document], data: DataConfig
) -> Iterator[Sequence[int] | np.ndarray]:
    if data.token_separator >= 0:
        return (document.tokens for document in documents if document.tokens is not None)
    return tokenizer.encode_documents([document.text for document in documents])


def rank_tokens(counts: np.ndarray, source: str) -> RankedTokens:
    """Returns the tokens that occur, ranked. counts: [V]. source: the text that was counted, for people."""
    ids = np.argsort(-counts, kind="stable")[: np.count_nonzero(counts)].astype(np.int32)
    return RankedTokens(ids, counts[ids], len(counts), source)


def coverage(ranked: RankedTokens, held_out: np.ndarray, tokenizer: Tokenizer, sizes: Sequence[int]) -> list[float]:
    """Returns the share of the tokens of other texts that are in the draft vocabulary of each size.

    held_out: how often each token occurs in those texts [V].
    """
    always = always_drafted(tokenizer, ranked.vocab_size)
    total = held_out.sum()
    return [float(held_out[most_frequent(ranked.ids, always, size)].sum() / total) for size in sizes]
