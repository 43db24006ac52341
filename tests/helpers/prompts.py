"""Prompts of token ids for small random models, and a tokenizer for models that have none."""

import numpy as np

from lsjax.decoding.batch import PromptBatch

PROMPTS = [[5, 9, 2], [7] * 17, [300, 1, 14, 15, 92, 6, 53]]
NEW = 24


def bare_batch(tokens: np.ndarray, lengths: np.ndarray, max_new_tokens: int, **more) -> PromptBatch:
    """Returns a batch of padded prompts that nothing but their limit ends."""
    count = len(lengths)
    limits, stop_token_ids = np.full(count, max_new_tokens, np.int32), np.full((count, 1), -1, np.int32)
    return PromptBatch(tokens, lengths, limits, stop_token_ids, ((),) * count, **more)


class NoTokenizer:
    """A tokenizer that only names the stop tokens: prompts and results are token ids."""

    begin = None

    def __init__(self, stop=()):
        self.stop = tuple(stop) or (-1,)

    special_tokens: dict = {}  # noqa: RUF012 (never changed)

    def decode(self, ids, context=()):
        return " ".join(map(str, ids))
