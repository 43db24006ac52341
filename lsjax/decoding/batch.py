"""Prompts and settings, checked and laid out for the device."""

import collections
import operator
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from lsjax.decoding.rules import Greedy, Rule, Sampled
from lsjax.decoding.stops import check_stop, check_stop_tokens
from lsjax.decoding.strategies import Sampling, check_sampling
from lsjax.errors import UserError
from lsjax.loading import Model

_SMALLEST_BUCKET = 16


class PromptBatch(NamedTuple):
    """Prompts ready for the device: tokens [N, bucket] right-padded, lengths [N]; and where texts end: `stop` [n] holds
    token ids, `stop_texts` the stop strings. `at_once`: how many of them are decoded side by side (0: all)."""

    tokens: np.ndarray
    lengths: np.ndarray
    max_new_tokens: int
    stop: np.ndarray
    rule: Rule = Greedy()
    stop_texts: tuple[str, ...] = ()
    at_once: int = 0

    @property
    def rows(self) -> int:
        """B, of the decoding state: the prompts beyond them wait for a row that is done."""
        return min(self.at_once or len(self.lengths), len(self.lengths))

    def part(self, start: int, stop: int) -> "PromptBatch":
        """Some of its prompts."""
        rows = range(len(self.lengths))[start:stop]
        tokens, lengths = self.tokens[start:stop], self.lengths[start:stop]
        return self._replace(tokens=tokens, lengths=lengths, rule=self.rule.of_rows(rows))

    @classmethod
    def make(
        cls,
        model: Model,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
        stop: str | Sequence[str] = (),
        stop_tokens: Sequence[int] = (),
        batch_size: int | None = None,
    ) -> "PromptBatch":
        check_sampling(sampling)
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size must be at least 1, got {batch_size}")
        texts, extra = check_stop(stop), check_stop_tokens(stop_tokens, model.config.vocab_size)
        if isinstance(prompts, str) or not hasattr(prompts, "__len__") or not len(prompts):
            raise UserError("prompts must be a list of at least one text or token list")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        rows = [_encode(model, index, prompt, max_new_tokens) for index, prompt in enumerate(prompts)]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), _bucket(int(lengths.max()))), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        ids = np.array([*model.tokenizer.stop, *extra], np.int32)
        return cls(tokens, lengths, max_new_tokens, ids, _rule(sampling, rows, seed), texts, batch_size or 0)


def _rule(sampling: Sampling, rows: list[list[int]], seed: int) -> Rule:
    if sampling.temperature == 0:
        return Greedy()
    seen, marks = collections.Counter(), []
    for text in (np.array(row, np.int32).tobytes() for row in rows):
        marks.append((zlib.crc32(text), seen[text]))
        seen[text] += 1
    fold = lambda mark: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), mark[0]), mark[1])  # noqa: E731
    keys = jax.vmap(fold)(np.array(marks, np.uint32))
    filters = (np.int32(sampling.top_k), np.float32(sampling.top_p)) if sampling.top_k or sampling.top_p < 1 else ()
    return Sampled(np.asarray(jax.random.key_data(keys)), np.float32(sampling.temperature), *filters)


def _encode(model: Model, index: int, prompt: str | Sequence[int], max_new_tokens: int) -> list[int]:
    if isinstance(prompt, str) and not prompt:
        raise UserError(f"prompt {index} is empty")
    try:
        row = model.tokenizer.encode(prompt) if isinstance(prompt, str) else [operator.index(t) for t in prompt]
    except TypeError:
        raise UserError(f"prompt {index} must be a text or a list of token ids, got {prompt!r}") from None
    if not row:
        raise UserError(f"prompt {index} is empty")
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


def _bucket(length: int) -> int:
    """Prompt lengths rounded up to a power of two, so that a new length seldom compiles anew."""
    return max(_SMALLEST_BUCKET, 1 << (length - 1).bit_length())
