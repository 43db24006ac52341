"""Requests: prompts and settings, checked once and laid out for the device."""

import collections
import dataclasses
import numbers
import operator
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.checks import attribute_of, entries_of, length_of
from lsjax.decoding.model import Model, check_model_type
from lsjax.decoding.per_prompt import freeze, is_list_per_prompt, is_per_prompt, named_values, one_per_prompt
from lsjax.decoding.sampling import Coupled, Greedy, Sampled, Sampler
from lsjax.decoding.stop_strings import (
    Stop,
    StopTokens,
    check_stops,
    stop_strings_of_prompts,
    stop_token_of,
    stop_tokens_of_prompts,
)
from lsjax.decoding.strategies import GREEDY, SAMPLING_SETTINGS, Sampling, check_sampling
from lsjax.errors import UserError, shown

Prompt = str | Sequence[int]

_SHORTEST_PADDING = 16
_SEED_BITS = 64
_NO_TOKEN = -1
_STOP_TOKENS_ROUNDING = 4  # lists of stop tokens are filled up, so that other lists seldom compile new programs
_LARGEST_BATCH = 65536  # of prompts that are repeated to fill a batch


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The settings of a request, apart from the model, the prompts and the strategy.

    max_new_tokens: the most new tokens per prompt.
    sampling, seed: how tokens are drawn. stop, stop_tokens: texts and token ids that end a sequence.
    batch_size: sequences decoded side by side; None takes all of them.

    max_new_tokens, stop, stop_tokens and the settings in `sampling` are those of all prompts, or a list with those of
    each prompt.

    Raises UserError for a value of the wrong type or out of range.
    """

    max_new_tokens: int | Sequence[int] = 128
    sampling: Sampling = GREEDY
    seed: int = 0
    stop: Stop = ()
    stop_tokens: StopTokens = ()
    batch_size: int | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "stop", "stop_tokens"):
            object.__setattr__(self, name, freeze(name, getattr(self, name)))
        for name, value in named_values("max_new_tokens", self.max_new_tokens):
            check_whole_number(name, value, least=1)
        if self.batch_size is not None:
            check_whole_number("batch_size", self.batch_size, least=1)
        check_whole_number("seed", self.seed, least=0, most=2**_SEED_BITS - 1)
        check_sampling(self.sampling)
        check_stops(self.stop)

    def check_one_for_all(self) -> None:
        """Raises UserError when a setting has a value per prompt."""
        values = {"max_new_tokens": self.max_new_tokens}
        values |= {name: getattr(self.sampling, name) for name in SAMPLING_SETTINGS}
        per_prompt = [name for name, value in values.items() if is_per_prompt(value)]
        per_prompt += [name for name in ("stop", "stop_tokens") if is_list_per_prompt(getattr(self, name))]
        if per_prompt:
            raise UserError(f"{per_prompt[0]} must be one value for all prompts here: speeds are compared over them")


def check_whole_number(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises UserError unless a value is a whole number (no bool, no float, no text) in least..most."""
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        raise UserError(f"{name} must be a whole number, got {shown(value)}")
    if int(value) < least or (most is not None and int(value) > most):
        limit = f"at least {least}" if most is None else f"in {least}..{most}"
        raise UserError(f"{name} must be {limit}, got {shown(value)}")


class PromptBatch(NamedTuple):
    """Prompts and settings of one request, ready for the device.

    tokens: prompts, right-padded [N, S]. lengths: their lengths [N].
    max_new_tokens: [N]. stop_token_ids: ids that end a sequence [N, n], filled up with -1.
    stop_texts: texts that do, a tuple per prompt.
    sampler: chooses tokens, with one key per prompt. max_batch_size: sequences decoded side by side; 0 takes all.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    max_new_tokens: np.ndarray
    stop_token_ids: np.ndarray
    stop_texts: tuple[tuple[str, ...], ...]
    sampler: Sampler = Greedy()
    max_batch_size: int = 0

    @property
    def has_stop_texts(self) -> bool:
        """True if a text may end a sequence, so that the host looks at the texts after every round."""
        return any(self.stop_texts)

    def settings(self, prompts: Sequence[int]) -> "Settings":
        """Returns the settings of some prompts, in that order."""
        rows = np.array(prompts)
        return Settings(self.max_new_tokens[rows], self.stop_token_ids[rows], self.sampler.take(prompts))

    @property
    def batch_size(self) -> int:
        """B, the sequences decoded side by side. The other prompts wait for one of them to finish."""
        return min(self.max_batch_size or len(self.lengths), len(self.lengths))

    def prompt(self, index: int) -> list[int]:
        """Returns the token ids of a prompt."""
        return self.tokens[index, : self.lengths[index]].tolist()

    def part(self, start: int, stop: int) -> "PromptBatch":
        """Returns the batch with the prompts start..stop-1 alone."""
        rows = range(len(self.lengths))[start:stop]
        return self._replace(
            tokens=self.tokens[start:stop],
            lengths=self.lengths[start:stop],
            stop_texts=self.stop_texts[start:stop],
            **self.settings(rows)._asdict(),
        )

    @classmethod
    def make(cls, model: Model, prompts: Sequence[Prompt], request: GenerationConfig) -> "PromptBatch":
        """Tokenizes and pads prompts. Raises UserError for a prompt that is empty, too long or no text or ids."""
        check_model_type(model)
        prompts = checked_prompts(prompts)
        limits = one_per_prompt("max_new_tokens", request.max_new_tokens, len(prompts))
        stop_token_ids, stop_texts = _endings(model, request, len(prompts))
        rows = [
            encode_prompt(model, index, prompt, limit)
            for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True))
        ]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), padded_length(int(lengths.max()))), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return cls(
            tokens=tokens,
            lengths=lengths,
            max_new_tokens=np.array(limits, np.int32),
            stop_token_ids=stop_token_ids,
            stop_texts=stop_texts,
            sampler=_make_sampler(request.sampling, rows, int(request.seed)),
            max_batch_size=int(request.batch_size or 0),
        )


class Settings(NamedTuple):
    """The settings of the sequences of a batch, as arrays: max_new_tokens [B], stop_token_ids [B, n], and the sampler.

    Other values need no other program.
    """

    max_new_tokens: np.ndarray | jax.Array
    stop_token_ids: np.ndarray | jax.Array
    sampler: Sampler


def _endings(model: Model, request: GenerationConfig, count: int) -> tuple[np.ndarray, tuple[tuple[str, ...], ...]]:
    """Returns (stop tokens [N, n], stop texts of each prompt) of `count` prompts.

    A stop text that is a special token counts as that token.
    """
    tokenizer, texts, tokens = model.tokenizer, [], []
    own_tokens = stop_tokens_of_prompts(request.stop_tokens, count, model.config.vocab_size)
    for stops, ids in zip(stop_strings_of_prompts(request.stop, count), own_tokens, strict=True):
        special = {stop: token for stop in stops if (token := stop_token_of(tokenizer, stop)) is not None}
        texts.append(tuple(stop for stop in stops if stop not in special))
        tokens.append([*tokenizer.stop, *ids, *special.values()])
    longest = max(map(len, tokens))
    width = max(1, -(-longest // _STOP_TOKENS_ROUNDING)) * _STOP_TOKENS_ROUNDING
    padded = [ids + [_NO_TOKEN] * (width - len(ids)) for ids in tokens]
    return np.array(padded, np.int32), tuple(texts)


def checked_prompts(prompts: Any) -> list[Any]:
    """Returns prompts as a list. Raises UserError unless they are one, or have a known length, of at least 1."""
    if (
        isinstance(prompts, str | bytes | set | frozenset | range | Mapping)
        or attribute_of(prompts, "__len__") is None
        or attribute_of(prompts, "ndim", 1) == 0
    ):
        raise UserError(f"prompts must be a list of texts or token lists, got {shown(prompts)}")
    prompts = entries_of(prompts, "prompts")
    if not prompts:
        raise UserError("prompts must be a list of at least one text or token list")
    return prompts


def prompt_batches(model: Model, prompts: Sequence[Prompt], request: GenerationConfig) -> list[PromptBatch]:
    """Returns one batch per prompt; with a batch_size above 1 one batch of all, repeating prompts to fill it."""
    prompts = checked_prompts(prompts)
    request.check_one_for_all()
    batch_size = request.batch_size or len(prompts)
    check_whole_number("batch_size", batch_size, least=0, most=_LARGEST_BATCH)
    if batch_size == 1:
        groups = [[prompt] for prompt in prompts]
    else:
        groups = [[prompts[index % len(prompts)] for index in range(max(len(prompts), batch_size))]]
    request = dataclasses.replace(request, batch_size=batch_size)
    return [PromptBatch.make(model, group, request) for group in groups]


def _make_sampler(sampling: Sampling, rows: list[list[int]], seed: int) -> Sampler:
    """Returns the sampler of some prompts; one that takes the likeliest token if every temperature is 0."""
    temperature, top_k, top_p = (one_per_prompt(name, getattr(sampling, name), len(rows)) for name in SAMPLING_SETTINGS)
    if not any(temperature):
        return Greedy()

    def array(values: list[Any], dtype: type) -> Any:
        return np.array(values, dtype)

    kind, keys = Coupled if sampling.coupled else Sampled, _prompt_keys(rows, seed)
    if not any(top_k) and min(top_p) >= 1:
        return kind(keys, array(temperature, np.float32))
    top_k = [min(k, np.iinfo(np.int32).max) for k in top_k]
    return kind(keys, array(temperature, np.float32), array(top_k, np.int32), array(top_p, np.float32))


def _prompt_keys(rows: list[list[int]], seed: int) -> Any:
    """Returns the keys of some prompts, uint32 [N,2].

    The key of a prompt depends on the seed, its tokens, and the number of equal prompts before it. So its text does not
    depend on the others, and n copies of a prompt give n samples.
    """
    seen, marks = collections.Counter(), []
    for text in (np.array(row, np.int32).tobytes() for row in rows):
        marks.append((zlib.crc32(text), seen[text]))
        seen[text] += 1
    root = jax.random.key(seed & 0xFFFFFFFF)
    if seed >> 32:  # JAX keeps 32 bits of a seed here: fold in the others
        root = jax.random.fold_in(root, seed >> 32)

    def prompt_key(mark):
        return jax.random.fold_in(jax.random.fold_in(root, mark[0]), mark[1])

    return np.asarray(jax.random.key_data(jax.vmap(prompt_key)(np.array(marks, np.uint32))))


def encode_prompt(model: Model, index: int, prompt: Prompt, max_new_tokens: int) -> list[int]:
    """Returns the token ids of a prompt, after the token that opens a text.

    index: the number of the prompt in messages. max_new_tokens: the new tokens that must fit into the context too.

    Raises UserError for a prompt that is empty, too long, neither text nor ids, or outside the vocabulary.
    """
    row = _token_ids(model, index, prompt)
    if not row:
        raise UserError(f"prompt {index} is empty, and this tokenizer has no token that opens a text")
    bad = [token for token in row if not 0 <= token < model.config.vocab_size]
    if bad:
        raise UserError(f"prompt {index} holds token {bad[0]}, outside the vocabulary 0..{model.config.vocab_size - 1}")
    context = model.config.context_length
    if len(row) + max_new_tokens > context:
        raise UserError(
            f"prompt {index} has {len(row)} tokens; with max_new_tokens={max_new_tokens} that exceeds the model's "
            f"context of {context}"
        )
    return row


def _token_ids(model: Model, index: int, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        try:
            return model.tokenizer.encode(prompt)
        except (UnicodeEncodeError, TypeError):  # tokenizers raises TypeError for a lone surrogate
            raise UserError(f"prompt {index} holds half of a surrogate pair, which is no character") from None
    wrong = f"prompt {index} must be a text or a list of token ids, got {shown(prompt)}"
    no_ids = isinstance(prompt, bytes | bytearray | memoryview | set | frozenset | Mapping)
    if no_ids or attribute_of(prompt, "__len__") is None or attribute_of(prompt, "ndim", 1) != 1:
        raise UserError(wrong)
    length = length_of(prompt, f"prompt {index}")
    context = model.config.context_length
    if length > context:  # such as a range, whose length is no effort
        raise UserError(f"prompt {index} has {length} tokens, which exceeds the model's context of {context}")
    tokens = entries_of(prompt, f"prompt {index}")
    if any(isinstance(token, bool | np.bool_) for token in tokens):
        raise UserError(wrong)
    try:
        return [operator.index(token) for token in tokens]
    except Exception:  # TypeError, or what a class of the caller's own raises
        raise UserError(wrong) from None


def padded_length(length: int) -> int:
    """Returns a prompt length rounded up to a power of two, so that new lengths seldom compile new programs."""
    return max(_SHORTEST_PADDING, 1 << (length - 1).bit_length())
