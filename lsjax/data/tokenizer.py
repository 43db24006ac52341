"""Encodes and decodes text with the `tokenizers` library; trains and saves tokenizers.

`lsjax.data.tokenizer_files` loads them from the files that `Tokenizer.save` and others write.
"""

import contextlib
import functools
import itertools
import json
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lsjax.data.chat import render_chat, render_turns
from lsjax.errors import UserError
from lsjax.files import path_of, write_atomically

BEGIN, END = "<|begin_of_text|>", "<|end_of_text|>"
TOKENIZER, SETTINGS, GENERATION = "tokenizer.json", "tokenizer_config.json", "generation_config.json"
_CANNOT_ENCODE = "this tokenizer cannot encode a text"
_BYTE_TOKEN = re.compile("<0x[0-9A-F]{2}>")


class Tokenizer:
    """Converts text to token ids and back.

    begin: the id that opens a text, which the backend's post-processor puts first; None when there is none.
    stop: the ids that end a text.
    settings: the content of tokenizer_config.json.
    vocab_size: the highest id plus one.
    """

    def __init__(self, backend: tokenizers.Tokenizer, stop: Sequence[int], settings: dict[str, Any] | None = None):
        self.backend = backend
        # A tokenizer.json may ask to truncate or pad; a document is always encoded whole.
        self.backend.no_truncation()
        self.backend.no_padding()
        if getattr(self.backend.model, "dropout", None):  # of training: each call would cut a text by other chances
            self.backend.model.dropout = None
        # "<|end_of_text|>" written in a document or a prompt is plain text and must not become the special token.
        self.backend.encode_special_tokens = True
        self.begin = _begin(backend)
        self.stop = tuple(stop)
        self.settings = dict(settings or {})
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1
        self._rows = self.vocab_size

    def restrict_to(self, rows: int, where: str) -> None:
        """Adapts the tokenizer to an embedding with `rows` rows. From then on `encode` refuses texts with other ids.

        Released models have added tokens beyond their embedding, which no text of theirs uses. Raises UserError when
        any other token is beyond it, or the token that opens a text, or all tokens that end one.
        """
        if self.vocab_size <= rows:
            return
        base = max(self.backend.get_vocab(with_added_tokens=False).values(), default=-1) + 1
        added = self.backend.get_added_tokens_decoder()
        self.stop = tuple(index for index in self.stop if index < rows)
        if (
            any(index not in added for index in range(rows, base))
            or not self.stop
            or (self.begin is not None and self.begin >= rows)
        ):
            raise UserError(f"{where}: its tokenizer has {self.vocab_size} tokens, its embedding {rows}")
        self._rows = rows

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a prompt: `begin`, then the tokens of the text."""
        ids = self._encode(self.backend, text)
        return ids if self.begin is None else [self.begin, *ids]

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Returns the ids of a conversation in the model's chat template, up to where the model answers.

        messages: [{"role": ..., "content": ...}, ...].

        As in transformers, special tokens are recognised in the whole rendered text, contents included. Raises
        UserError when the model has no template.
        """
        text = render_chat(self.settings.get("chat_template"), messages, self._named_tokens())
        return self._encode(self._chat_backend, text)

    def encode_turns(self, messages: Sequence[dict[str, Any]]) -> tuple[list[int], list[bool]]:
        """Returns the ids of a whole conversation, and for each whether the assistant says it.

        The special token that ends a turn belongs to it; white space that a template puts behind does not. Special
        tokens are recognised as by `encode_chat`. Raises UserError as `render_turns`.
        """
        text, spans = render_turns(self.settings.get("chat_template"), messages, self._named_tokens())
        with building(_CANNOT_ENCODE):
            encoding = self._chat_backend.encode(text, add_special_tokens=False)
        ids, special = self._check_ids(encoding.ids), set(self.special_tokens.values())
        said = [False] * len(ids)
        for start, end in spans:
            inside = [i for i, (a, b) in enumerate(encoding.offsets) if max(a, start) < min(b, end)]
            last = max((i for i in inside if ids[i] in special), default=None)
            if last is not None and not text[encoding.offsets[last][1] : end].strip():
                inside = [i for i in inside if i <= last]
            for index in inside:
                said[index] = True
        return ids, said

    def _named_tokens(self) -> dict[str, str]:
        """Returns the special tokens that a chat template may name, such as bos_token."""
        names = {key: token_text(value) for key, value in self.settings.items() if key.endswith("_token")}
        return {key: text for key, text in names.items() if isinstance(text, str)}

    @functools.cached_property
    def _chat_backend(self) -> tokenizers.Tokenizer:
        """A copy of the backend that recognises special tokens in text.

        It is a copy because threads share a tokenizer: a flag switched for one would change the texts of another.
        """
        return tokenizers.Tokenizer.from_str(self.backend.to_str())

    def _encode(self, backend: tokenizers.Tokenizer, text: str) -> list[int]:
        with building(_CANNOT_ENCODE):
            try:
                return self._check_ids(backend.encode(text, add_special_tokens=False).ids)
            except TypeError:
                check_text(text, "a text to encode")
                raise

    def _check_ids(self, ids: list[int]) -> list[int]:
        if self._rows < self.vocab_size and ids and max(ids) >= self._rows:
            token = self.backend.id_to_token(max(ids))
            raise UserError(
                f"a text holds the token {token!r} (id {max(ids)}), but the embedding has {self._rows} rows"
            )
        return ids

    def encode_texts(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yields the ids of texts, without `begin` and `stop`."""
        with building(_CANNOT_ENCODE):
            encodings = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        for encoding in encodings:
            yield self._check_ids(encoding.ids)

    def encode_documents(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yields the ids of whole documents: `begin`, the tokens of the text, the first of `stop`."""
        head = [] if self.begin is None else [self.begin]
        for ids in self.encode_texts(texts):
            yield [*head, *ids, self.stop[0]]

    def decode(self, ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """Returns the text of `ids`, without special tokens.

        context: the ids before `ids`, such as the prompt. The result is then what `ids` add to the text of `context`.
        It differs from the text of `ids` alone when the decoder drops the space before the first word, as that of
        Llama 1 and 2 does, or when `context` ends within a character.
        """
        nearest = self._nearest(context)
        with building("this tokenizer cannot decode its tokens"):
            whole = self.backend.decode([*nearest, *ids], skip_special_tokens=True)
            before = self.backend.decode(nearest, skip_special_tokens=True) if nearest else ""
        if not nearest:
            return whole
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[same:]

    def _nearest(self, context: Sequence[int]) -> list[int]:
        """Returns the end of `context`, as much of it as the text of later ids depends on."""
        last = len(context) - 1
        while last >= 0 and context[last] in self._unsettled:
            last -= 1
        # The last settled token may end a character of up to four bytes, each in a token of its own.
        return [int(index) for index in context[max(0, last - 3) :]]

    def describe(self, index: int) -> str:
        """Returns the text of one token as it stands inside a text, or the name of a token that `decode` leaves out.

        A part of a character is a replacement sign; an id beyond the vocabulary is <ID>.
        """
        name = self.backend.id_to_token(index) or f"<{index}>"
        # The token follows itself, because some decoders drop the space before the first word.
        return name if index in self.special_tokens.values() else self.decode([index], context=[index]) or name

    @functools.cached_property
    def special_tokens(self) -> dict[str, int]:
        """The ids of the tokens that `decode` leaves out, by their texts. A stop string cannot match such a text."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: index for index, token in added.items() if token.special}

    def decode_settled(self, ids: Sequence[int], context: Sequence[int] = ()) -> str:
        """Returns the part of the text of `ids` that later ids cannot change: all but an unfinished last character.

        context: the ids before `ids`, as for `decode`.
        """
        end = len(ids)
        while end and ids[end - 1] in self._unsettled:
            end -= 1
        # A byte-level decoder turns the bytes of an unfinished character into one replacement sign.
        return self.decode(ids[:end], context).removesuffix("\ufffd")

    @functools.cached_property
    def _unsettled(self) -> frozenset[int]:
        """The ids whose text later ids may change.

        These are single bytes, because SentencePiece decodes a run of them at once, and the special tokens that such
        a run may contain.
        """
        one_byte = {index for token, index in self.backend.get_vocab().items() if _BYTE_TOKEN.fullmatch(token)}
        return frozenset(one_byte | set(self.special_tokens.values()))

    def save(self, folder: Path) -> None:
        """Writes the three files of a tokenizer, as Hugging Face does.

        They are generation_config.json (the tokens that end a text), tokenizer_config.json (special tokens, chat
        template) and tokenizer.json (vocabulary and rules), which comes last and marks the tokenizer as complete.
        """
        files = self.files()
        write_atomically(path_of(folder) / GENERATION, json.dumps(files[GENERATION], indent=2))
        write_atomically(path_of(folder) / SETTINGS, json.dumps(files[SETTINGS], indent=2, ensure_ascii=False))
        write_atomically(path_of(folder) / TOKENIZER, files[TOKENIZER])

    def files(self) -> dict[str, Any]:
        """Returns what `save` writes, by the names of the files. Tokenizers that are the same have the same."""
        generation: dict[str, int | list[int]] = {"eos_token_id": list(self.stop)}
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"} | self.settings
        settings.setdefault("eos_token", self.backend.id_to_token(self.stop[0]))
        if self.begin is not None:
            generation["bos_token_id"] = self.begin
            settings.setdefault("bos_token", self.backend.id_to_token(self.begin))
        return {GENERATION: generation, SETTINGS: settings, TOKENIZER: self.backend.to_str(pretty=False)}


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Trains byte-level BPE. Every byte is a token, so any text can be encoded and decodes to itself."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise UserError(
            f"config.model.vocab_size ({vocab_size}) must be at least {len(alphabet) + 2}: one token "
            "per byte and two special tokens"
        )
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[BEGIN, END], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    begin_with(backend, BEGIN)
    end = backend.token_to_id(END)
    assert end is not None  # one of the trainer's special tokens
    return Tokenizer(backend, (end,))


def check_text(text: Any, what: str) -> str:
    """Returns `text`. Raises UserError, naming it `what`, when it is no text or has no UTF-8."""
    if not isinstance(text, str):
        raise UserError(f"{what} is {type(text).__name__}, not a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = f"U+{ord(text[error.start]):04X}"
        raise UserError(f"{what} holds half of a surrogate pair, {half} at character {error.start + 1}") from None
    return text


def token_text(value: Any) -> Any:
    """Returns the text of a special token. Hugging Face writes it as a string, or as an object with a `content`."""
    return value.get("content") if isinstance(value, dict) else value


def begin_with(backend: tokenizers.Tokenizer, token: str) -> None:
    """Makes a backend open every text with `token`, in lsjax and in other tools that read its tokenizer.json."""
    backend.post_processor = processors.TemplateProcessing(
        single=f"{token}:0 $A:0",
        pair=f"{token}:0 $A:0 {token}:1 $B:1",
        special_tokens=[(token, backend.token_to_id(token))],
    )


@contextlib.contextmanager
def building(complaint: str) -> Iterator[None]:
    """Turns the errors of the tokenizers library into UserError. It raises bare Exception, and panics in Rust."""
    try:
        yield
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a Rust panic derives from BaseException
        raise UserError(f"{complaint}: {error}") from None


@contextlib.contextmanager
def panics_silenced() -> Iterator[None]:
    """Drops what a Rust panic prints on standard error within the context, since it is raised as well."""
    with _STANDARD_ERROR, tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        before = os.dup(2)
        os.dup2(held.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = type(error).__name__ == "PanicException"
            raise
        finally:
            os.dup2(before, 2)
            os.close(before)
            held.seek(0)
            if not panicked:
                os.write(2, held.read())


_STANDARD_ERROR = threading.Lock()


def _begin(backend: tokenizers.Tokenizer) -> int | None:
    """Returns the id that the post-processor puts before a text, or None. Raises ValueError for several ids."""
    plain, text = [], ""
    for text in ("a", *itertools.islice(backend.get_vocab(), 9)):  # a vocabulary of whole words may lack "a"
        with contextlib.suppress(Exception):
            plain = backend.encode(text, add_special_tokens=False).ids
        if plain:
            break
    opened = backend.encode(text if plain else "", add_special_tokens=True).ids
    places = range(len(opened) - len(plain) + 1) if plain else [len(opened)]
    head = opened[: next((place for place in places if opened[place : place + len(plain)] == plain), 0)]
    if len(head) > 1 or any(backend.id_to_token(index) is None for index in head):
        raise ValueError(f"its post_processor opens a text with the ids {head}; lsjax knows one id of the vocabulary")
    return head[0] if head else None
