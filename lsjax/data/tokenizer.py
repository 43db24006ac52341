"""Byte-level BPE through the `tokenizers` library, and the little of it that the rest of lsjax needs."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lsjax.errors import UserError
from lsjax.files import write_atomically

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"


class Tokenizer:
    """Text <-> token ids. `begin` (or None) opens a document, `stop` holds the ids that end one."""

    def __init__(self, backend: tokenizers.Tokenizer, begin: int | None, stop: tuple[int, ...]):
        self.backend = backend
        # Text is text: "<|end_of_text|>" written in a document or a prompt must not end anything.
        self.backend.encode_special_tokens = True
        self.begin = begin
        self.stop = stop

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so that it can size an embedding."""
        return max(self.backend.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """A prompt: `begin`, then the text's tokens."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids if self.begin is None else [self.begin, *ids]

    def encode_documents(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Whole documents: `begin`, tokens, the first of `stop`."""
        head = [] if self.begin is None else [self.begin]
        for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield [*head, *encoding.ids, self.stop[0]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def save(self, path: Path) -> None:
        write_atomically(path, self.backend.to_str(pretty=False))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-level BPE: every byte is a token, so any text can be encoded and comes back exactly."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise UserError(f"config.model.vocab_size ({vocab_size}) must be at least {len(alphabet) + 2} for bytes")
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    begin, end = backend.token_to_id(BEGIN), backend.token_to_id(END)
    # Other tools that open tokenizer.json then begin a text as we do.
    backend.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, begin)])
    return Tokenizer(backend, begin, (end,))


def load_tokenizer(path: Path) -> Tokenizer:
    """A tokenizer.json that has the begin and end tokens of `train_tokenizer`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        json.loads(text)
        backend = tokenizers.Tokenizer.from_str(text)
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {path}") from None
    except Exception as error:  # the library raises bare Exception on a bad file
        raise UserError(f"{path} is not a tokenizer.json: {error}") from None
    begin, end = backend.token_to_id(BEGIN), backend.token_to_id(END)
    if end is None:
        raise UserError(f"{path} has no {END} token to end a document with")
    return Tokenizer(backend, begin, (end,))
