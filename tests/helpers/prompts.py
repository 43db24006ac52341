"""Prompts of token ids for small random models, and a tokenizer for models that have none."""

PROMPTS = [[5, 9, 2], [7] * 17, [300, 1, 14, 15, 92, 6, 53]]
NEW = 24


class NoTokenizer:
    """A tokenizer that only names the stop tokens: prompts and results are token ids."""

    begin = None

    def __init__(self, stop=()):
        self.stop = tuple(stop) or (-1,)

    special_tokens: dict = {}  # noqa: RUF012 (never changed)

    def decode(self, ids, context=()):
        return " ".join(map(str, ids))
