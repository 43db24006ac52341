"""Documents -> fixed-length sequences in ArrayRecord files.

Packing happens once, ahead of training: afterwards the index of a record decides its content, so the data order
is a seed and resuming it is one integer, on any number of hosts.
"""

import dataclasses
import json
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from lsjax.config import Config
from lsjax.data.corpus import Corpus, Document, load_corpus
from lsjax.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lsjax.errors import UserError
from lsjax.files import make_folder, write_atomically

SPLITS = ("train", "held_out")
_MANIFEST = "manifest.json"
_DOCUMENTS_AT_ONCE = 256


def pack(documents: Iterable[list[int]], sequence_length: int) -> Iterator[np.ndarray]:
    """Cuts the concatenated documents into windows: int32 [2, S+1], tokens and which document each is from.

    Windows overlap by one token, the last target of one being the first input of the next. A remainder shorter
    than a window is left out.
    """
    tokens = np.empty(0, np.int32)
    owners = np.empty(0, np.int32)
    for index, document in enumerate(documents):
        tokens = np.concatenate([tokens, np.asarray(document, np.int32)])
        owners = np.concatenate([owners, np.full(len(document), index, np.int32)])
        start = 0
        while len(tokens) - start > sequence_length:
            window = slice(start, start + sequence_length + 1)
            yield np.stack([tokens[window], owners[window]])
            start += sequence_length
        tokens, owners = tokens[start:], owners[start:]


def prepare(
    config: Config, directory: Path, note: Callable[[str], None] = print, given: Tokenizer | None = None
) -> tuple[Tokenizer, dict]:
    """Makes `directory` hold the tokenizer and both packed splits of a run, unless it already does.

    `given` is the initial model's tokenizer, used unless config.data.tokenizer names another. Returns (tokenizer,
    manifest). The folder appears whole or not at all. Raises UserError when it holds something else, or there is
    too little text.
    """
    request = _request(config)
    manifest = read_manifest(directory)
    if manifest is None:
        manifest = _build(config, Path(directory), request, given)
    elif manifest["request"] != request:
        raise UserError(
            f"{directory} holds data packed for {manifest['request']}, not {request}; remove it or set "
            "config.data.directory to another folder"
        )
    corpus = manifest["corpus"]
    note(f"corpus: {corpus['documents']} documents, {corpus['bytes']:,} bytes, sha256 {corpus['sha256']}")
    for split, counts in manifest["splits"].items():
        note(f"{split}: {counts['documents']} documents, {counts['tokens']:,} tokens")
    return load_tokenizer(directory), manifest


def read_manifest(directory: Path) -> dict | None:
    path = Path(directory) / _MANIFEST
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); remove {directory} to pack the corpus again") from None


def record_path(directory: Path, split: str) -> Path:
    return Path(directory) / f"{split}.arrayrecord"


def _request(config: Config) -> dict:
    """What decides the packed bytes, apart from the text itself."""
    data = dataclasses.asdict(config.data)
    del data["directory"]
    return data | {
        "initial_model": config.initial_model,
        "vocab_size": config.model.vocab_size,
        "sequence_length": config.training.sequence_length,
    }


def _build(config: Config, directory: Path, request: dict, given: Tokenizer | None) -> dict:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"data folder {directory} exists and holds something else; choose another")
    corpus = load_corpus(config.data)
    fingerprint = corpus.fingerprint()
    tokenizer = _make_tokenizer(config, corpus, given)
    make_folder(directory.parent, "data folder")
    scratch = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        length = config.training.sequence_length
        counts = {s: _write_split(scratch, s, getattr(corpus, s), tokenizer, length) for s in SPLITS}
        tokenizer.save(scratch)
        manifest = {"request": request, "corpus": fingerprint, "splits": counts}
        write_atomically(scratch / _MANIFEST, json.dumps(manifest, indent=2))
        scratch.chmod(0o755)
        scratch.rename(directory)
    except OSError as error:
        raise UserError(f"cannot write data folder {directory}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return manifest


def _make_tokenizer(config: Config, corpus: Corpus, given: Tokenizer | None) -> Tokenizer:
    if not config.data.tokenizer and given is not None:
        return given
    if not config.data.tokenizer:
        return train_tokenizer((d.text for d in corpus.train), config.model.vocab_size)
    tokenizer = load_tokenizer(Path(config.data.tokenizer))
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"{config.data.tokenizer} has {tokenizer.vocab_size} tokens, more than config.model.vocab_size "
            f"({config.model.vocab_size})"
        )
    return tokenizer


def _write_split(folder: Path, split: str, documents: tuple[Document, ...], tokenizer: Tokenizer, length: int):
    # group_size:1 keeps every record readable on its own, without its neighbours.
    writer = ArrayRecordWriter(str(record_path(folder, split)), "group_size:1")
    sequences = 0
    for window in pack(_tokenize(documents, tokenizer), length):
        writer.write(window.tobytes())
        sequences += 1
    writer.close()
    if not sequences:
        raise UserError(
            f"the {split} documents are shorter than one sequence of {length} tokens; lower "
            "config.training.sequence_length or give more text"
        )
    return {"documents": len(documents), "sequences": sequences, "tokens": sequences * length}


def _tokenize(documents: tuple[Document, ...], tokenizer: Tokenizer) -> Iterator[list[int]]:
    for start in range(0, len(documents), _DOCUMENTS_AT_ONCE):
        yield from tokenizer.encode_documents([d.text for d in documents[start : start + _DOCUMENTS_AT_ONCE]])
