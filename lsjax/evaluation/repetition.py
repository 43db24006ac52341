"""How much a generated text repeats itself, which flatters every speed that depends on predictable text."""

from collections.abc import Sequence


def repetition(tokens: Sequence[int], length: int = 4) -> float | None:
    """Returns the share of n-grams of a text that occurred earlier in the same text.

    tokens: the token ids of the new text, without the prompt. length: n, the tokens per n-gram.
    Returns None for a text shorter than one n-gram.
    """
    grams = [tuple(tokens[start : start + length]) for start in range(len(tokens) - length + 1)]
    return (len(grams) - len(set(grams))) / len(grams) if grams else None
