"""Where a text ends before its limit: stop strings, looked for on the host as tokens arrive.

A stop string ends a row at the token that completes it: the first token with which the decoded text holds it, wherever
in a token, or in a round's block of them, it begins or ends. The row's text is cut just before it.
"""

import operator
from collections.abc import Sequence

from lsjax.data.tokenizer import Tokenizer
from lsjax.errors import UserError


def check_stop(stop: str | Sequence[str]) -> tuple[str, ...]:
    """The stop strings of one or several. Raises UserError on what is no text, or an empty one."""
    stops = tuple(stop) if isinstance(stop, Sequence) and not isinstance(stop, str) else (stop,)
    wrong = [s for s in stops if not isinstance(s, str) or not s]
    if wrong:
        raise UserError(f"stop must be non-empty texts, got {wrong[0]!r} (token ids go into stop_tokens)")
    return stops


def check_stop_tokens(stop_tokens: Sequence[int], vocab_size: int) -> list[int]:
    try:
        ids = [operator.index(token) for token in stop_tokens]
    except TypeError:
        raise UserError(f"stop_tokens must be token ids, got {stop_tokens!r} (texts go into stop)") from None
    wrong = [token for token in ids if not 0 <= token < vocab_size]
    if wrong:
        raise UserError(f"stop_tokens holds {wrong[0]}, outside the vocabulary 0..{vocab_size - 1}")
    return ids


def final_text(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> tuple[str, bool]:
    """(text of a whole row up to the first stop string in it, whether there is one)."""
    text = tokenizer.decode(tokens)
    starts = [start for start in (text.find(stop) for stop in stops) if start >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def completed_at(tokenizer: Tokenizer, tokens: Sequence[int], known: int, stops: Sequence[str]) -> int | None:
    """How many tokens, more than the `known` first that complete none, it takes to complete a stop string."""
    counts = range(known + 1, len(tokens) + 1)
    return next((count for count in counts if final_text(tokenizer, tokens[:count], stops)[1]), None)


def text_so_far(tokenizer: Tokenizer, tokens: Sequence[int], stops: Sequence[str]) -> str:
    """What the final text begins with, whatever follows `tokens`: characters that are whole, and no beginning of a stop
    string."""
    text = tokenizer.decode_settled(tokens)
    longest = min(len(text), max(map(len, stops), default=1) - 1)
    begun = (size for size in range(longest, 0, -1) if any(stop.startswith(text[-size:]) for stop in stops))
    return text[: len(text) - next(begun, 0)]
