"""Tokenizers through the `tokenizers` library, and the little of them that the rest of lsjax needs.

A folder keeps one as Hugging Face does: tokenizer.json (vocabulary and rules), tokenizer_config.json (special
tokens, chat template) and generation_config.json (which tokens stop).
"""

import contextlib
import functools
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lsjax.data.chat import render_chat
from lsjax.errors import UserError
from lsjax.files import read_json, write_atomically

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """Text <-> token ids. `stop` holds the ids that end a text; `begin` (or None) opens one.

    `begin` is what the backend's own post-processor puts first. `settings` is tokenizer_config.json as found.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stop: Sequence[int], settings: dict[str, Any] | None = None):
        self.backend = backend
        # A model's own limits on length belong to other uses; a document is encoded whole.
        self.backend.no_truncation()
        self.backend.no_padding()
        # Text is text: "<|end_of_text|>" written in a document or a prompt must not end anything.
        self.backend.encode_special_tokens = True
        self.begin = _begin(backend)
        self.stop = tuple(stop)
        self.settings = dict(settings or {})
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1  # it sizes an embedding

    def encode(self, text: str) -> list[int]:
        """A prompt: `begin`, then the text's tokens."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return ids if self.begin is None else [self.begin, *ids]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """A conversation [{"role": ..., "content": ...}] in the model's chat template, up to where it answers.

        As everywhere else, special tokens are recognised in the whole rendered text, contents included. Raises
        UserError when the model has no template.
        """
        names = {key: _token_text(value) for key, value in self.settings.items() if key.endswith("_token")}
        text = render_chat(self.settings.get("chat_template"), messages, names)
        self.backend.encode_special_tokens = False
        try:
            return self.backend.encode(text, add_special_tokens=False).ids
        finally:
            self.backend.encode_special_tokens = True

    def encode_documents(self, texts: Sequence[str]) -> Iterable[list[int]]:
        """Whole documents: `begin`, tokens, the first of `stop`."""
        head = [] if self.begin is None else [self.begin]
        for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False):
            yield [*head, *encoding.ids, self.stop[0]]

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def decode_settled(self, ids: Sequence[int]) -> str:
        """What the text of `ids` begins with whatever follows them: all of it but a character that is not whole yet."""
        end = len(ids)
        while end and ids[end - 1] in self._unsettled:
            end -= 1
        # Of bytes that begin a character and do not finish it, a byte-level decoder makes one sign.
        return self.decode(ids[:end]).removesuffix("\ufffd")

    @functools.cached_property
    def _unsettled(self) -> frozenset[int]:
        """Tokens of single bytes (SentencePiece decodes a run of them at once), and those a run may stretch across."""
        one_byte = {index for token, index in self.backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token)}
        added = self.backend.get_added_tokens_decoder()
        return frozenset(one_byte | {index for index, token in added.items() if token.special})

    def save(self, folder: Path) -> None:
        """Writes its three files. tokenizer.json comes last: with it, the tokenizer is there."""
        generation = {"eos_token_id": list(self.stop)}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.settings
        settings.setdefault("eos_token", self.backend.id_to_token(self.stop[0]))
        if self.begin is not None:
            generation["bos_token_id"] = self.begin
            settings.setdefault("bos_token", self.backend.id_to_token(self.begin))
        write_atomically(Path(folder) / GENERATION, json.dumps(generation, indent=2))
        write_atomically(Path(folder) / SETTINGS, json.dumps(settings, indent=2, ensure_ascii=False))
        write_atomically(Path(folder) / TOKENIZER, self.backend.to_str(pretty=False))


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
    begin_with(backend, BEGIN)
    return Tokenizer(backend, (backend.token_to_id(END),))


def begin_with(backend: tokenizers.Tokenizer, token: str) -> None:
    """Makes a backend open every text with `token`, for us and for other tools that open its tokenizer.json."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, backend.token_to_id(token))],
    )


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a folder, or a tokenizer.json with whatever lies beside it.

    Raises UserError when it cannot be read, or nothing there says which token ends a text.
    """
    path = Path(path)
    path = path / TOKENIZER if path.is_dir() else path
    try:
        text = path.read_text(encoding="utf-8")
        json.loads(text)
    except FileNotFoundError:
        raise UserError(f"no tokenizer at {path}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not a tokenizer.json: {error}") from None
    with building(f"{path} is not a tokenizer.json"):
        backend = tokenizers.Tokenizer.from_str(text)
        settings = _optional_json(path.parent / SETTINGS)
        template = path.parent / "chat_template.jinja"
        if template.is_file():
            settings["chat_template"] = template.read_text(encoding="utf-8")
        return Tokenizer(backend, _stop_ids(path, backend, settings), settings)


@contextlib.contextmanager
def building(complaint: str) -> Iterator[None]:
    """The tokenizers library raises bare Exception, and panics, on a vocabulary that makes no sense."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # its panics are no Exception
        raise UserError(f"{complaint}: {error}") from None


def _begin(backend: tokenizers.Tokenizer) -> int | None:
    opened = backend.encode("a", add_special_tokens=True).ids
    plain = backend.encode("a", add_special_tokens=False).ids
    added = len(opened) > len(plain) and (not plain or opened[: len(plain)] != plain)
    return opened[0] if added else None


def _stop_ids(path: Path, backend: tokenizers.Tokenizer, settings: dict[str, Any]) -> tuple[int, ...]:
    """From generation_config.json, else config.json, else the end token that the settings, or we, name."""
    for name in (GENERATION, "config.json"):
        ids = _optional_json(path.parent / name).get("eos_token_id")
        if ids is not None:
            ids = ids if isinstance(ids, list) else [ids]
            if not ids or not all(_is_token(i, backend) for i in ids):
                raise UserError(f"{path.parent / name}: eos_token_id {ids} is not in the vocabulary of {path}")
            return tuple(ids)
    for token in (_token_text(settings.get("eos_token")), END):
        if isinstance(token, str) and backend.token_to_id(token) is not None:
            return (backend.token_to_id(token),)
    raise UserError(
        f"nothing says which token of {path} ends a text: give eos_token_id in {path.parent / GENERATION}, or "
        f"eos_token in {path.parent / SETTINGS}"
    )


def _token_text(value: Any) -> Any:
    """Hugging Face writes a special token as its text, or as an object with a `content`."""
    return value.get("content") if isinstance(value, dict) else value


def _is_token(index: Any, backend: tokenizers.Tokenizer) -> bool:
    return isinstance(index, int) and 0 <= index < 2**31 and backend.id_to_token(index) is not None


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
