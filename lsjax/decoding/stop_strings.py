"""Stop strings: texts that end a sequence before its limit, looked for on the host as tokens arrive.

A stop string ends a sequence at the token that completes it, wherever in a token or in a round's block of tokens the
string begins or ends. The text is cut just before the string.
"""

import operator
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from lsjax.checks import attribute_of, entries_of, length_of
from lsjax.data.tokenizer import Tokenizer, check_text
from lsjax.decoding.per_prompt import is_list_per_prompt, named_values, one_per_prompt
from lsjax.errors import UserError, shown

Stop = str | Sequence[str | Sequence[str]]
StopTokens = Sequence[int | Sequence[int]]


def check_stop(stop: Stop, name: str = "stop") -> tuple[str, ...]:
    """Returns one or several stop strings as a tuple. Raises UserError for an empty text or anything but text."""
    is_list = isinstance(stop, Sequence) and not isinstance(stop, str | bytes | bytearray | memoryview | range)
    stops: tuple[Any, ...] = tuple(entries_of(stop, name)) if is_list else (stop,)
    wrong = [s for s in stops if not isinstance(s, str) or not s]
    if wrong:
        raise UserError(f"{name} must be non-empty texts, got {shown(wrong[0])} (token ids go into stop_tokens)")
    for text in stops:
        check_text(text, name)
    return stops


def check_stops(stop: Stop) -> None:
    """Raises UserError unless stop strings are those of all prompts, or a list per prompt of its own."""
    for name, value in named_values("stop", stop) if is_list_per_prompt(stop) else [("stop", stop)]:
        check_stop(value, name)


def stop_strings_of_prompts(stop: Stop, count: int) -> list[tuple[str, ...]]:
    """Returns the stop strings of each prompt. Raises UserError when they belong to another number of prompts."""
    return [check_stop(value) for value in one_per_prompt("stop", stop, count, is_list=True)]


def stop_tokens_of_prompts(stop_tokens: StopTokens, count: int, vocab_size: int) -> list[list[int]]:
    """Returns the stop tokens of each prompt. Raises UserError for anything but ids of the vocabulary."""
    if not is_list_per_prompt(stop_tokens):
        return [check_stop_tokens(stop_tokens, vocab_size)] * count
    parts = one_per_prompt("stop_tokens", stop_tokens, count, is_list=True)
    return [check_stop_tokens(part, vocab_size, f"stop_tokens[{index}]") for index, part in enumerate(parts)]


def check_stop_tokens(stop_tokens: StopTokens, vocab_size: int, name: str = "stop_tokens") -> list[int]:
    """Returns stop tokens as a list of ids. Raises UserError for anything but ids of the vocabulary."""
    no_ids = UserError(f"{name} must be token ids, got {shown(stop_tokens)} (texts go into stop)")
    if isinstance(stop_tokens, str | bytes | bytearray | dict) or attribute_of(stop_tokens, "__len__") is None:
        raise no_ids
    if attribute_of(stop_tokens, "ndim", 1) != 1:  # an array of one number has no length
        raise no_ids
    if (count := length_of(stop_tokens, name)) > vocab_size:
        raise UserError(f"{name} has {count} entries, but the vocabulary {vocab_size}")
    entries = entries_of(stop_tokens, name)
    if any(isinstance(token, bool | np.bool_) for token in entries):
        raise no_ids
    try:
        ids = [operator.index(cast(int, token)) for token in entries]
    except Exception:  # TypeError, or what a class of the caller's own raises
        raise no_ids from None
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(f"{name} holds {shown(wrong[0])}, outside the vocabulary 0..{vocab_size - 1}")
    return ids


def stop_token_of(tokenizer: Tokenizer, stop: str) -> int | None:
    """Returns the id of a stop string that is a special token, else None.

    Texts leave special tokens out, so such a string can match as a token only.
    """
    return tokenizer.special_tokens.get(stop)


def final_text(
    tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], context: Sequence[int] = ()
) -> tuple[str, bool]:
    """Returns (the text of a sequence up to its first stop string, whether there is one).

    context: the ids before `tokens`, that is the prompt.
    """
    text = tokenizer.decode(tokens, context)
    starts = [start for start in (text.find(stop) for stop in stops) if start >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def completed_at(
    tokenizer: Tokenizer, tokens: Sequence[int], known: int, stops: Sequence[str], context: Sequence[int] = ()
) -> int | None:
    """Returns the number of tokens that complete a stop string, or None; the first `known` tokens complete none."""
    counts = range(known + 1, len(tokens) + 1)
    return next((count for count in counts if final_text(tokenizer, tokens[:count], stops, context)[1]), None)


def text_so_far(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str], context: Sequence[int] = ()) -> str:
    """Returns the part of the text that no later token can change.

    It ends before a character whose bytes are not complete, and before what may become a stop string.
    """
    text = tokenizer.decode_settled(tokens, context)
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    begun = (size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops))
    return text[: len(text) - next(begun, 0)]
