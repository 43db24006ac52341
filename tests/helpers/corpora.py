"""Reads whole corpora into memory, for tests that look at documents."""

from lsjax.config import DataConfig
from lsjax.data.corpus import Skipped, list_corpus
from lsjax.data.documents import read_documents


def read_texts(config: DataConfig) -> tuple[dict[str, str], Skipped]:
    """Returns the texts of a corpus by name, with the number of the line in JSONL, and what was left out."""
    corpus, found = list_corpus(config), {}
    for unit in corpus.units():
        for document in read_documents(unit.pieces, config, corpus.skipped):
            piece = document.place.piece
            found[str(document.place).replace(piece.path, piece.name, 1)] = document.text
    return found, corpus.skipped
