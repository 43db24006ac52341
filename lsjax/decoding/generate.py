"""`generate` and `stream`: prompts in, texts out, by any strategy; and the compiled programs behind them."""

import functools
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lsjax.config import ModelConfig
from lsjax.decoding.batch import PromptBatch
from lsjax.decoding.passes import DRAFT, Weights
from lsjax.decoding.programs import DecodeShape, cache_use, choose_kernels, lower_decoding, lower_refill
from lsjax.decoding.rules import Rule
from lsjax.decoding.running import Programs, Row, Running
from lsjax.decoding.settings import settle
from lsjax.decoding.stops import final_text, text_so_far
from lsjax.decoding.strategies import AUTO, Autoregressive, Sampling, Strategy, check_strategy, lookahead
from lsjax.loading import Model
from pallas_kernels.kv_cache.interface import KERNELS, Kernels

_CAPACITY_STEP = 64


class GenerateResult(NamedTuple):
    """One entry a prompt: new token ids (the stop token, or the one that completed a stop string, included), their text
    (up to the stop string), and what the decoding did."""

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
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
    batch_size: int | None = None,
) -> GenerateResult:
    """Continuations of prompts (texts or token lists, of any lengths), greedy unless `sampling` says else.

    batch_size: how many are decoded side by side (None: all of them); one that is done makes room for the next.
    A row's result does not depend on the others: what is drawn depends on the seed, the prompt, and how many equal
    prompts stand before it (so that n copies give n samples). A row ends with the tokenizer's stop token or one of
    `stop_tokens`; with the token that completes one of the texts in `stop`, its own text just before that; or after
    max_new_tokens: its stats say `finish_reason` "stop" or "length". Stop texts are looked for after every round, each
    then a call of the device.

    SelfSpeculative("auto", "auto") measures first which setting suits these prompts, each time: seconds that pay for
    long texts (for many calls, `tune` once). Where none is predicted to be faster, decoding is autoregressive; `stats`
    say what it was. Raises UserError on an empty or too long prompt, a token, an exit layer or a setting out of range.
    """
    batch = PromptBatch.make(model, prompts, max_new_tokens, sampling, seed, stop, stop_tokens, batch_size)
    return _compiled_program(model, strategy, batch).run(model, batch)


class Piece(NamedTuple):
    """What one round adds to a row: its new tokens, and the text that is certain with them. Half a character, or what
    may become a stop string, waits for a later piece; the row's last one says why it ended."""

    tokens: list[int]
    text: str
    row: int = 0
    finish_reason: str | None = None


def stream(
    model: Model,
    prompts: str | Sequence[int] | Sequence[str | Sequence[int]],
    max_new_tokens: int,
    strategy: Strategy = Autoregressive(),  # noqa: B008 (frozen)
    sampling: Sampling = Sampling(),  # noqa: B008 (frozen)
    seed: int = 0,
    stop: str | Sequence[str] = (),
    stop_tokens: Sequence[int] = (),
) -> Iterator[Piece]:
    """Like `generate`, piece by piece: of one prompt (a text or a token list), or of several as they come.

    A row's pieces together are what `generate` returns for the same arguments, tokens and text. Each round is one call
    of the device, made when its pieces are asked for; leaving early costs nothing. Raises UserError as `generate` does,
    when called.
    """
    prompts = [prompts] if _is_one(prompts) else prompts
    batch = PromptBatch.make(model, prompts, max_new_tokens, sampling, seed, stop, stop_tokens)
    return _pieces(model, batch, _compiled_program(model, strategy, batch).start(model, batch))


def _is_one(prompts: object) -> bool:
    """A text, or the token ids of one."""
    if isinstance(prompts, str) or not hasattr(prompts, "__len__"):
        return isinstance(prompts, str)
    return len(prompts) > 0 and all(isinstance(part, int | np.integer) for part in prompts)


def _pieces(model: Model, batch: PromptBatch, running: Running) -> Iterator[Piece]:
    rows = len(batch.lengths)
    taken, shown = [0] * rows, [0] * rows
    running.prefill(look=True)
    while True:
        for row in range(rows):
            tokens, ended = running.tokens(row), running.seen.done[row]
            if len(tokens) == taken[row]:
                continue
            if ended:
                text, reason = _ending(model, batch, tokens)
            else:
                text, reason = text_so_far(model.tokenizer, tokens, batch.stop_texts), None
            yield Piece(tokens[taken[row] :], text[shown[row] :], row, reason)
            taken[row], shown[row] = len(tokens), len(text)
        if running.seen.done.all():
            return
        running.one_round()


def _compiled_program(model: Model, strategy: Strategy, batch: PromptBatch) -> "DecodeProgram":
    program = DecodeProgram(model.config, settle(strategy, model, batch, DecodeProgram), batch)
    program.compile(program.weights(model), model.kernels, model.cache)
    return program


def _ending(model: Model, batch: PromptBatch, tokens: list[int]) -> tuple[str, str]:
    """(text, finish_reason) of a row that ended."""
    text, stopped = final_text(model.tokenizer, tokens, batch.stop_texts)
    return text, "stop" if stopped or tokens[-1] in batch.stop else "length"


def rates_by_position(rows: Sequence[dict[str, Any]]) -> list[float | None]:
    """Of the stats of one row or several: how often the i-th draft of a round was accepted."""
    drafted, accepted = (
        [sum(column) for column in zip(*(row[f"{what}_by_position"] for row in rows), strict=True)]
        for what in ("drafted", "accepted")
    )
    return [part / whole if whole else None for part, whole in zip(accepted, drafted, strict=True)]


class DecodeProgram:
    """Prefill and decoding loop of one strategy, compiled ahead for the shapes of a batch. `kernels`: what writes and
    reads the cache, `entries_read`: of a row's cache, by a pass, about; both once compiled."""

    kernels: Kernels
    entries_read: int

    def __init__(self, config: ModelConfig, strategy: Strategy, batch: PromptBatch):
        check_strategy(strategy, config.num_layers)
        bucket = batch.tokens.shape[1]
        new = -(-batch.max_new_tokens // _CAPACITY_STEP) * _CAPACITY_STEP
        capacity = -(-(bucket + new + lookahead(strategy)) // _CAPACITY_STEP) * _CAPACITY_STEP
        self.strategy, self.capacity = strategy, capacity
        shape = DecodeShape(batch.rows, bucket, capacity, new + lookahead(strategy), batch.stop.size)
        rule = batch.rule.of_rows(range(batch.rows))
        self._arguments = (config, strategy, shape, jax.tree.map(jax.typeof, rule))
        self._refilled = batch.rows < len(batch.lengths)

    def weights(self, model: Model) -> Weights:
        """What it reads of a model: with int8 drafts, two of each early layer."""
        if getattr(self.strategy, "draft_weights", None) is None:
            return model.decoder_weights
        return model.decoder_weights | {DRAFT: model.draft_weights(self.strategy.exit_layer)}

    def compile(self, weights: Weights, kernels: str = AUTO, cache: str = AUTO) -> float:
        """Compiles for these weights, `kernels` and `cache` as of lsjax.load, unless done before; seconds it took."""
        began = time.perf_counter()
        layout = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), weights)
        leaves, tree = jax.tree.flatten(layout)
        config, strategy, shape, rule = self._arguments
        shape = shape._replace(cache=cache)
        self.kernels = choose_kernels(kernels, weights, config, strategy, shape, None)
        self.entries_read = KERNELS[self.kernels.name].entries_read(cache_use(weights, config, strategy, shape))
        shape = shape._replace(kernels=self.kernels.name)
        arguments = tree, tuple(leaves), config, strategy, shape, rule
        refill = _compiled_refill(*arguments) if self._refilled else ()
        self._programs = Programs(*_compiled(*arguments), *refill)
        return time.perf_counter() - began

    def start(self, model: Model, batch: PromptBatch) -> Running:
        return Running(self._programs, self.weights(model), batch, model.tokenizer)

    def run(self, model: Model, batch: PromptBatch) -> GenerateResult:
        """Decodes, timing prefill (to the first token) and the loop; compilation is never inside."""
        running = self.start(model, batch)
        running.prefill(look=bool(batch.stop_texts))
        running.to_the_end()
        return self._result(model, batch, running)

    def _result(self, model: Model, batch: PromptBatch, running: Running) -> GenerateResult:
        rows, seconds = running.results(), running.seconds
        # The loop emits all but the first token of each row, which is prefill's.
        looped = sum(len(row.tokens) - 1 for row in rows)
        common = {
            "strategy": self.strategy.name,
            "exit_layer": getattr(self.strategy, "exit_layer", None),
            "num_speculations": getattr(self.strategy, "num_speculations", None),
            "draft_weights": getattr(self.strategy, "draft_weights", None),
            "lookup": getattr(self.strategy, "lookup", None),
            "batch_size": batch.rows,
            "batch_rounds": int(running.seen.round),
            "kernels": str(self.kernels),
            "seconds": seconds,
            "ms_per_token": 1e3 * seconds / looped if looped else None,
            "tokens_per_second": looped / seconds if looped else None,
        }
        texts, stats = [], []
        for row, prefill_seconds in zip(rows, running.prefill_seconds, strict=True):
            text, reason = _ending(model, batch, row.tokens)
            texts.append(text)
            first = {"finish_reason": reason, "time_to_first_token_ms": 1e3 * float(prefill_seconds)}
            stats.append(common | first | _counts(row))
        return GenerateResult([row.tokens for row in rows], texts, stats)


def _counts(row: Row) -> dict[str, Any]:
    by_position = {
        "drafted_by_position": row.drafted_at.tolist(),
        "accepted_by_position": row.accepted_at.tolist(),
    }
    drafted, accepted = (sum(counts) for counts in by_position.values())
    return {
        "new_tokens": len(row.tokens),
        "rounds": row.rounds,
        "drafted": drafted,
        "accepted": accepted,
        **by_position,
        "acceptance_rate": accepted / drafted if drafted else None,
        "acceptance_by_position": rates_by_position([by_position]),
        "tokens_per_round": (len(row.tokens) - 1) / row.rounds if row.rounds else None,
    }


@functools.lru_cache(maxsize=256)
def _compiled(tree, leaves, config: ModelConfig, strategy: Strategy, shape: DecodeShape, rule: Rule):
    """(prefill, decode) executables for these weights' layout and these shapes."""
    programs = lower_decoding(jax.tree.unflatten(tree, leaves), config, strategy, shape, rule)
    return tuple(program.compile() for program in programs)


@functools.lru_cache(maxsize=256)
def _compiled_refill(tree, leaves, config: ModelConfig, strategy: Strategy, shape: DecodeShape, rule: Rule):
    """(prefill of one row, replace)."""
    programs = lower_refill(jax.tree.unflatten(tree, leaves), config, strategy, shape, rule)
    return tuple(program.compile() for program in programs)
