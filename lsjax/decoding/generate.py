"""`generate`: prompts in, texts out, by any strategy; and the compiled programs behind it."""

import functools
import operator
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.config import ModelConfig
from lsjax.decoding.loops import Decoding
from lsjax.decoding.passes import Weights
from lsjax.decoding.programs import DecodeShape, lower_decoding
from lsjax.decoding.strategies import Autoregressive, Strategy, check_strategy, lookahead
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
) -> GenerateResult:
    """Greedy continuations of prompts (texts or token lists, of any lengths) in one batch.

    A row's result does not depend on the others. Generation ends at the tokenizer's stop token or after
    max_new_tokens. Raises UserError on an empty or too long prompt, a token or an exit layer out of range.
    """
    batch = PromptBatch.make(model, prompts, max_new_tokens)
    program = DecodeProgram(model.config, strategy, batch)
    program.compile(model.decoder_weights)
    return program.run(model, batch)


class PromptBatch(NamedTuple):
    """Prompts ready for the device: tokens [B, bucket] right-padded, lengths [B]."""

    tokens: np.ndarray
    lengths: np.ndarray
    max_new_tokens: int
    stop: np.ndarray

    @classmethod
    def make(cls, model: Model, prompts: Sequence[str | Sequence[int]], max_new_tokens: int) -> "PromptBatch":
        if isinstance(prompts, str) or not len(prompts):
            raise UserError("prompts must be a list of at least one text or token list")
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        rows = [_encode(model, index, prompt, max_new_tokens) for index, prompt in enumerate(prompts)]
        lengths = np.array([len(row) for row in rows], np.int32)
        tokens = np.zeros((len(rows), _bucket(int(lengths.max()))), np.int32)
        for index, row in enumerate(rows):
            tokens[index, : len(row)] = row
        return cls(tokens, lengths, max_new_tokens, np.array(model.tokenizer.stop, np.int32))


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
        self._arguments = (config, strategy, shape)

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
        inputs = (batch.tokens, batch.lengths, np.int32(batch.max_new_tokens), batch.stop)
        tokens, lengths, limit, stop = jax.block_until_ready(jax.device_put(inputs, everywhere))
        jax.block_until_ready(weights)
        began = time.perf_counter()
        state = jax.block_until_ready(self._prefill(weights, tokens, lengths, limit, stop))
        first = time.perf_counter()
        state = jax.block_until_ready(self._decode(weights, state, limit, stop))
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
def _compiled(tree, leaves, config: ModelConfig, strategy: Strategy, shape: "DecodeShape"):
    """(prefill, decode) executables for these weights' layout and these shapes."""
    programs = lower_decoding(jax.tree.unflatten(tree, leaves), config, strategy, shape)
    return tuple(program.compile() for program in programs)
