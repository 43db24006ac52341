"""The cost model of self-speculation: what every exit layer and draft length would give on some prompts and a device.

Tokens a round come from `acceptance`. The time of a round, d (early layers + head) + early layers + late layers for
d+1 tokens + head, is linear in the exit layer and nearly so in the draft length: it is measured, on the very programs
that decode, at the corners of the grid, and interpolated between.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from lsjax.decoding.acceptance import batch_rounds, draft_acceptance, expected_rounds
from lsjax.decoding.strategies import AUTO, INT8, Autoregressive, SelfSpeculative, Strategy, check_strategy, is_auto
from lsjax.errors import UserError
from lsjax.loading import Model
from lsjax.model.transformer import Params

_LONGEST_DRAFT = 12
_SAMPLE_TOKENS = 64  # of each text: what more of them would say is little
_SAMPLE_BATCHES = 8
_TIMED_TOKENS = 24
_REPEATS = 5


class Setting(NamedTuple):
    """One setting as predicted. `speedup` is against autoregressive decoding, the median over the batches."""

    exit_layer: int
    num_speculations: int
    tokens_per_round: float
    milliseconds_per_round: float
    speedup: float


@dataclasses.dataclass(frozen=True)
class Tuning:
    """The setting that is predicted to be the fastest, as a strategy with numbers, and the whole table of them.

    `milliseconds_per_token`: of autoregressive decoding, measured.
    """

    table: tuple[Setting, ...]
    milliseconds_per_token: float

    @property
    def best(self) -> Setting:
        return max(self.table, key=lambda setting: setting.speedup)

    @property
    def strategy(self) -> SelfSpeculative:
        return SelfSpeculative(self.best.exit_layer, self.best.num_speculations)

    @property
    def predicted_speedup(self) -> float:
        return self.best.speedup

    @property
    def predicted_tokens_per_round(self) -> float:
        return self.best.tokens_per_round

    def at(self, strategy: Strategy) -> Setting | None:
        """What was predicted for a strategy, if it is in the table."""
        if getattr(strategy, "draft_weights", None) or getattr(strategy, "lookup", 0):
            return None
        pair = getattr(strategy, "exit_layer", None), getattr(strategy, "num_speculations", None)
        return next((setting for setting in self.table if setting[:2] == pair), None)

    def __str__(self) -> str:
        best = self.best
        setting = f"exit layer {best.exit_layer} with {best.num_speculations} draft(s)"
        figures = f"{best.speedup:.2f} times autoregressive, {best.tokens_per_round:.2f} tokens a round"
        if best.speedup > 1:
            return f"{setting} is predicted to be the fastest: {figures}"
        return f"no setting is predicted to beat autoregressive; the best, {setting}: {figures}"


class Text(NamedTuple):
    """What a batch's prompts became: drafts kept [L,N,n] as of `draft_acceptance`, and new tokens [N]; `rows` of them
    are decoded at a time."""

    acceptance: np.ndarray
    tokens: np.ndarray
    rows: int

    def rounds(self, of_each: np.ndarray) -> float:
        """Of the batch, from those of each prompt [N]."""
        return batch_rounds(of_each, self.rows)


# A batch of prompts, and what runs a strategy on it: lsjax/decoding/generate.py, which stands above this module.
Batch = Any
MakeProgram = Callable[..., Any]


def settle(strategy: Strategy, model: Model, batch: Batch, make_program: MakeProgram) -> Strategy:
    """The strategy with numbers for what is "auto"; autoregressive where nothing is predicted to be faster."""
    if not is_auto(strategy):
        return strategy
    grid = candidates(strategy, model.config.num_layers)
    tuning = measure_settings(model, [batch], make_program, *grid)
    return tuning.strategy if tuning and tuning.predicted_speedup > 1 else Autoregressive()


def candidates(strategy: SelfSpeculative, num_layers: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(exit layers, draft lengths) to choose from. A last quarter that verifies saves too little to be looked at."""
    exit_layer, drafts = strategy.exit_layer, strategy.num_speculations
    if strategy.draft_weights:
        raise UserError('"auto" predicts drafts by the model\'s own weights: with draft_weights give numbers')
    if strategy.lookup:
        raise UserError('lookup is no part of what "auto" measures: tune without it, then add it to the strategy found')
    check_strategy(SelfSpeculative(*(1 if value == AUTO else value for value in (exit_layer, drafts))), num_layers)
    exits = range(1, max(1, 3 * num_layers // 4) + 1) if exit_layer == AUTO else (exit_layer,)
    return tuple(exits), tuple(range(1, _LONGEST_DRAFT + 1)) if drafts == AUTO else (drafts,)


def measure_settings(
    model: Model,
    batches: Sequence[Batch],
    make_program: MakeProgram,
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
    note: Callable[[str], None] = lambda _: None,
) -> Tuning | None:
    """Predictions for every exit layer with every draft length; None when every text ends with its first token.

    Texts are looked at in their first tokens; of many batches a few, spread evenly, of many prompts the first.
    """
    chosen = range(0, len(batches), -(-len(batches) // _SAMPLE_BATCHES))
    batches = [batches[index].part(0, _SAMPLE_BATCHES * batches[index].rows) for index in chosen]
    note(f"tuning: decoding {len(batches)} batch(es) once, to see which exit agrees where")
    runs = [
        _run(model, _compiled(model, make_program, Autoregressive(), batch), batch, _SAMPLE_TOKENS) for batch in batches
    ]
    params = model.params  # once: a model held for decoding makes them each time
    texts = [text_of(model, params, batch, run.tokens) for batch, run in zip(batches, runs, strict=True)]
    longest = max(range(len(texts)), key=lambda index: texts[index].tokens.max())
    if texts[longest].tokens.max() == 1:
        return None
    corners = corners_of(exit_layers, num_speculations)
    token_time, *round_times = _round_times(
        model, batches[longest], make_program, [Autoregressive(), *(SelfSpeculative(*pair) for pair in corners)], note
    )
    corner_times = dict(zip(corners, round_times, strict=True))
    return Tuning(predict(texts, token_time, corner_times, exit_layers, num_speculations), token_time)


def text_of(model: Model, params: Params, batch: Batch, new_tokens: list[list[int]]) -> Text:
    """Reads a batch's prompts with their continuations in one pass."""
    count = min(batch.max_new_tokens, _SAMPLE_TOKENS)
    texts = np.zeros((batch.tokens.shape[0], batch.tokens.shape[1] + count), np.int32)
    texts[:, : batch.tokens.shape[1]] = batch.tokens
    for row, (start, new) in enumerate(zip(batch.lengths, new_tokens, strict=True)):
        texts[row, start : start + len(new)] = new
    dtype = model.decoder_weights["embed"].dtype
    how = model.config, count, dtype, model.cache == INT8
    kept = draft_acceptance(params, texts, batch.lengths, batch.rule, *how)
    return Text(np.asarray(kept, np.float64), np.array([len(new) for new in new_tokens]), batch.rows)


def predict(
    texts: Sequence[Text],
    token_time: float,
    corner_times: dict[tuple[int, int], float],
    exit_layers: Sequence[int],
    num_speculations: Sequence[int],
) -> tuple[Setting, ...]:
    """token_time: of an autoregressive pass; corner_times[E, d]: of a round; both in milliseconds."""
    texts = [text for text in texts if text.tokens.max() > 1]
    emitted = sum(int((text.tokens - 1).sum()) for text in texts)
    table = []
    for d in num_speculations:
        rounds = [expected_rounds(text.acceptance, text.tokens, d) for text in texts]  # [L,N] each
        for e in exit_layers:
            round_time = interpolate(corner_times, e, d)
            ratios = [
                text.rounds(text.tokens - 1) * token_time / (text.rounds(ours[e - 1]) * round_time)
                for text, ours in zip(texts, rounds, strict=True)
            ]
            tokens_per_round = emitted / sum(ours[e - 1].sum() for ours in rounds)
            table.append(Setting(e, d, float(tokens_per_round), round_time, float(statistics.median(ratios))))
    return tuple(sorted(table))


def corners_of(exit_layers: Sequence[int], num_speculations: Sequence[int]) -> list[tuple[int, int]]:
    """Pairs to measure so as to interpolate: the ends of both, and one draft length between, since that is the
    direction which bends."""
    drafts = sorted(num_speculations)
    return [
        (e, d)
        for e in sorted({min(exit_layers), max(exit_layers)})
        for d in sorted({drafts[0], drafts[len(drafts) // 3], drafts[-1]})
    ]


def interpolate(corner_times: dict[tuple[int, int], float], exit_layer: int, num_speculations: int) -> float:
    """Piecewise linear along both, from times at every pair of some exit layers and some draft lengths."""
    exits, drafts = (sorted(set(values)) for values in zip(*corner_times, strict=True))
    along = [np.interp(num_speculations, drafts, [corner_times[e, d] for d in drafts]) for e in exits]
    return float(np.interp(exit_layer, exits, along))


def _round_times(
    model: Model, batch: Batch, make_program: MakeProgram, strategies: Sequence[Strategy], note: Callable[[str], None]
) -> list[float]:
    """Milliseconds of a round of each: medians of interleaved repeats, compilation and a first run apart."""
    programs = []
    for index, strategy in enumerate(strategies, 1):
        note(f"tuning: compiling {index}/{len(strategies)}")
        programs.append(_compiled(model, make_program, strategy, batch))
        _run(model, programs[-1], batch, _TIMED_TOKENS)
    note(f"tuning: timing {len(strategies)} settings")
    times = [[_round_time(_run(model, program, batch, _TIMED_TOKENS)) for program in programs] for _ in range(_REPEATS)]
    # Ratios within a repeat: what slows the machine for a while slows them all.
    first = statistics.median(repeat[0] for repeat in times)
    return [first * statistics.median(repeat[i] / repeat[0] for repeat in times) for i in range(len(strategies))]


def _round_time(result) -> float:
    """All rows share a round."""
    return 1e3 * result.stats[0]["seconds"] / result.stats[0]["batch_rounds"]


def _compiled(model: Model, make_program: MakeProgram, strategy: Strategy, batch: Batch):
    program = make_program(model.config, strategy, batch)
    program.compile(program.weights(model), model.kernels, model.cache)
    return program


def _run(model: Model, program, batch: Batch, tokens: int):
    return program.run(model, batch._replace(max_new_tokens=min(batch.max_new_tokens, tokens)))
