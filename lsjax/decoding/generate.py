"""`generate`: prompts in, texts out, by any strategy; and the compiled programs behind it."""

import collections
import functools
import operator
import time
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.config import ModelConfig
from lsjax.decoding.loops import Decoding
from lsjax.decoding.passes import Weights
from lsjax.decoding.programs import DecodeShape, lower_decoding
from lsjax.decoding.rules import Greedy, Rule, Sampled
from lsjax.decoding.settings import settle
from lsjax.decoding.strategies import (
    Autoregressive,
    Sampling,
    Strategy,
    check_sampling,
    check_strategy,
    lookahead,
)
from lsjax.errors import UserError
from lsjax.loading import Model
from lsjax.scale.sharding import replicated_like

_CAPACITY_STEP = 64
_SMALLEST_BUCKET = 16


class GenerateResult(NamedTuple):
    """One entry a prompt: new token ids (the stop token included), their text, and what the decoding did."""

    tokens: list[list[int]]
    text: list[str]
    stats: list[dict[str, Any]]


def generate(
    model: Model,
    prompts: Sequence[str | Sequence[int]],
    max_new_tokens: int,
    strategy: Strategy = Autoregressive(),  # noqa: B008 (frozen)
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
) -> GenerateResult:
    """Continuations of prompts (texts or token lists, of any lengths) in one batch, greedy unless `sampling` says else.

    A row's result does not depend on the others: what is drawn depends on the seed, the prompt, and how many equal
    prompts stand before it (so that n copies give n samples). Generation ends at the tokenizer's stop token or after
    max_new_tokens. Raises UserError on an empty or too long prompt, a token, an exit layer or a setting out of range.

    SelfSpeculative("auto", "auto") measures first which setting suits these prompts, each time: seconds that pay for
    long texts (for many calls, `tune` once). Where none is predicted to be faster, decoding is autoregressive; `stats`
    say what it was.
    """
    batch = PromptBatch.make(model, prompts, max_new_tokens, sampling, seed)
    strategy = settle(strategy, model, batch, DecodeProgram)
    program = DecodeProgram(model.config, strategy, batch)
    program.compile(model.decoder_weights)
    return program.run(model, batch)


class PromptBatch(NamedTuple):
    """Prompts ready for the device: tokens [B, bucket] right-padded, lengths [B]."""

    tokens: np.ndarray
    lengths: np.ndarray
    max_new_tokens: int
    stop: np.ndarray
    rule: Rule = Greedy()

    @classmethod
    def make(
        cls,
        model: Model,
        prompts: Sequence[str | Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
        seed: int = 0,
    ) -> "PromptBatch":
        check_sampling(sampling)
        if isinstance(prompts, str) or not len(prompts):
            raise UserError("prompts must be a list of at least one text or token list")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        rows = [_encode(model, index, prompt, max_new_tokens) for index, prompt in enumerate(prompts)]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), _bucket(int(lengths.max()))), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        stop = np.array(model.tokenizer.stop, np.int32)
        return cls(tokens, lengths, max_new_tokens, stop, _rule(sampling, rows, seed))


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


class DecodeProgram:
    """Prefill and decoding loop of one strategy, compiled ahead for the shapes of a batch."""

    def __init__(self, config: ModelConfig, strategy: Strategy, batch: PromptBatch):
        check_strategy(strategy, config.num_layers)
        rows, bucket = batch.tokens.shape
        new = -(-batch.max_new_tokens // _CAPACITY_STEP) * _CAPACITY_STEP
        capacity = -(-(bucket + new + lookahead(strategy)) // _CAPACITY_STEP) * _CAPACITY_STEP
        self.strategy = strategy
        shape = DecodeShape(rows, bucket, capacity, new + lookahead(strategy), batch.stop.size)
        self._arguments = (config, strategy, shape, jax.tree.map(jax.typeof, batch.rule))

    def compile(self, weights: Weights) -> float:
        """Compiles for these weights unless done before; seconds it took."""
        began = time.perf_counter()
        layout = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
        leaves, tree = jax.tree.flatten(layout)
        self._prefill, self._decode = _compiled(tree, tuple(leaves), *self._arguments)
        return time.perf_counter() - began

    def run(self, model: Model, batch: PromptBatch) -> GenerateResult:
        """Decodes, timing prefill (to the first token) and the loop; compilation is never inside."""
        weights = model.decoder_weights
        everywhere = replicated_like(weights["embed"])
        inputs = (batch.tokens, batch.lengths, np.int32(batch.max_new_tokens), batch.stop, batch.rule)
        tokens, lengths, limit, stop, rule = jax.block_until_ready(jax.device_put(inputs, everywhere))
        jax.block_until_ready(weights)
        began = time.perf_counter()
        state = jax.block_until_ready(self._prefill(weights, tokens, lengths, limit, stop, rule))
        first = time.perf_counter()
        state = jax.block_until_ready(self._decode(weights, state, limit, stop, rule))
        ended = time.perf_counter()
        return self._result(model, jax.device_get(state._replace(cache=())), first - began, ended - first)

    def _result(self, model: Model, state: Decoding, prefill_seconds: float, seconds: float) -> GenerateResult:
        rows = len(state.emitted)
        tokens = [state.tokens[row, : state.emitted[row]].tolist() for row in range(rows)]
        # The loop emits all but the first token of each row, which is prefill's.
        looped = int(state.emitted.sum()) - rows
        common = {
            "strategy": self.strategy.name,
            "exit_layer": getattr(self.strategy, "exit_layer", None),
            "num_speculations": getattr(self.strategy, "num_speculations", None),
            "batch_size": rows,
            "seconds": seconds,
            "ms_per_token": 1e3 * seconds / looped if looped else None,
            "tokens_per_second": looped / seconds if looped else None,
            "time_to_first_token_ms": 1e3 * prefill_seconds,
        }
        stats = []
        for row in range(rows):
            drafted, accepted, rounds = (int(a[row]) for a in (state.drafted, state.accepted, state.rounds))
            counts = {
                "new_tokens": len(tokens[row]),
                "rounds": rounds,
                "drafted": drafted,
                "accepted": accepted,
                "acceptance_rate": accepted / drafted if drafted else None,
                "tokens_per_round": (len(tokens[row]) - 1) / rounds if rounds else None,
            }
            stats.append(common | counts)
        return GenerateResult(tokens, [model.tokenizer.decode(row) for row in tokens], stats)


@functools.lru_cache(maxsize=256)
def _compiled(tree, leaves, config: ModelConfig, strategy: Strategy, shape: DecodeShape, rule: Rule):
    """(prefill, decode) executables for these weights' layout and these shapes."""
    programs = lower_decoding(jax.tree.unflatten(tree, leaves), config, strategy, shape, rule)
    return tuple(program.compile() for program in programs)
